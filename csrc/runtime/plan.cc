#include "runtime/plan.h"

#include <unordered_set>

#include "common/check.h"

namespace fastserve {

namespace {

// The slots as they will be once the plan's deltas are applied; only those it touches are copied.
class SlotsAfter {
 public:
  struct State {
    bool open;
    int64_t computed;
    bool has_sampled;
    std::vector<int32_t> table;
  };

  explicit SlotsAfter(const std::unordered_map<int32_t, Slot>& slots) : slots_(slots) {}

  State& operator[](int32_t slot) {
    const auto known = after_.find(slot);
    if (known != after_.end()) return known->second;
    const auto found = slots_.find(slot);
    State state{found != slots_.end(), 0, false, {}};
    if (state.open)
      state = {true, found->second.computed, found->second.last_sampled >= 0 || found->second.sampling > 0,
               found->second.table};
    return after_.emplace(slot, std::move(state)).first->second;
  }

 private:
  const std::unordered_map<int32_t, Slot>& slots_;
  std::unordered_map<int32_t, State> after_;
};

}  // namespace

void validate(const BatchPlan& plan, const std::unordered_map<int32_t, Slot>& slots, const PlanLimits& limits) {
  SlotsAfter after(slots);
  for (const int32_t slot : plan.closed) {
    FS_CHECK(after[slot].open, "plan ", plan.plan_id, " closes slot ", slot, ", which is not open");
    after[slot] = {false, 0, false, {}};
  }
  for (const OpenedSlot& opened : plan.opened) {
    FS_CHECK(opened.slot >= 0 && !after[opened.slot].open, "plan ", plan.plan_id, " opens slot ", opened.slot,
             ", which is open");
    for (const int32_t token : opened.history) {
      FS_CHECK(token >= 0 && token < limits.vocab_size, "history holds token ", token, " outside the vocabulary");
    }
    after[opened.slot] = {true, 0, false, {}};
  }
  for (const TableEntry& entry : plan.table) {
    FS_CHECK(after[entry.slot].open, "block table entry for slot ", entry.slot, ", which is not open");
    FS_CHECK(entry.block >= 0 && entry.block < limits.num_blocks, "block ", entry.block, " of slot ", entry.slot,
             " is outside the pool of ", limits.num_blocks);
    auto& table = after[entry.slot].table;
    FS_CHECK(entry.index >= 0 && entry.index <= static_cast<int64_t>(table.size()), "block table of slot ", entry.slot,
             " would have a hole before index ", entry.index);
    if (entry.index == static_cast<int64_t>(table.size())) {
      table.push_back(entry.block);
    } else {
      table[entry.index] = entry.block;
    }
  }

  std::unordered_set<int32_t> seen;
  int64_t first = 0;
  for (const PlanRow& row : plan.rows) {
    const auto& slot = after[row.slot];
    FS_CHECK(slot.open, "plan ", plan.plan_id, " runs slot ", row.slot, ", which is not open");
    FS_CHECK(seen.insert(row.slot).second, "plan ", plan.plan_id, " runs slot ", row.slot, " twice");
    FS_CHECK(row.tokens >= 1 && row.logits >= 0 && row.logits <= row.tokens, "slot ", row.slot, " has ", row.tokens,
             " tokens and ", row.logits, " logits");
    // A slot may begin, or go on, behind whole blocks that others have computed.
    const bool behind_others = row.start % limits.block_size == 0;
    FS_CHECK(row.start >= 0 && (row.start <= slot.computed || behind_others), "slot ", row.slot, " starts at ",
             row.start, " with only ", slot.computed, " positions computed");
    const int64_t end = int64_t{row.start} + row.tokens;
    FS_CHECK(end <= limits.max_position, "slot ", row.slot, " reaches position ", end, " of ", limits.max_position);
    FS_CHECK(end <= static_cast<int64_t>(slot.table.size()) * limits.block_size, "slot ", row.slot,
             " lacks blocks for position ", end - 1);
    FS_CHECK(first + row.tokens <= static_cast<int64_t>(plan.tokens.size()), "plan ", plan.plan_id, " lacks tokens");
    for (int64_t i = first; i < first + row.tokens; ++i) {
      const int32_t token = plan.tokens[i];
      const bool sampled = token == -1 && slot.has_sampled && i == first;
      FS_CHECK(sampled || (token >= 0 && token < limits.vocab_size), "slot ", row.slot, " has token ", token,
               " outside the vocabulary");
    }
    first += row.tokens;
  }
  FS_CHECK(first == static_cast<int64_t>(plan.tokens.size()), "plan ", plan.plan_id, " has ", plan.tokens.size(),
           " tokens for rows of ", first);
  FS_CHECK(first <= limits.max_tokens, "plan ", plan.plan_id, " has ", first, " tokens; the limit is ",
           limits.max_tokens);
}

}  // namespace fastserve
