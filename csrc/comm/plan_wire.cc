#include "comm/plan_wire.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <type_traits>

#include "common/check.h"

namespace fastserve {

namespace {

constexpr uint64_t kMagic = 0x31306e616c507346;  // "FsPlan01"
constexpr size_t kFirstBytes = 4096;             // of every broadcast
constexpr uint64_t kMostBytes = 1 << 30;         // far beyond any plan

enum Array { kRows, kTokens, kClosed, kOpened, kHistory, kBiases, kStopTokens, kTable, kCopies, kArrays };

struct Header {
  uint64_t magic;
  uint64_t bytes;  // this and all arrays
  int64_t plan_id;
  uint64_t return_logits;
  std::array<uint64_t, kArrays> counts;  // of elements
};

// OpenedSlot without what it has a variable number of, which follows in arrays of all slots.
struct WireSlot {
  int32_t slot, prompt_length, top_k, logprobs, min_tokens;
  float temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty;
  uint32_t history, biases, stop_tokens;  // of them that are this slot's
  uint64_t seed;
};

struct WireBias {
  int32_t token;
  float value;
};

static_assert(sizeof(Header) == 104 && sizeof(WireSlot) == 64 && sizeof(WireBias) == 8);
static_assert(sizeof(PlanRow) == 16 && sizeof(TableEntry) == 12 && sizeof(CopyRow) == 16);

// The arrays in the order of the buffer, each aligned to 8 bytes.
template <class Visit>
void visit_arrays(Visit&& visit, auto& rows, auto& tokens, auto& closed, auto& opened, auto& history, auto& biases,
                  auto& stop_tokens, auto& table, auto& copies) {
  visit(kRows, rows);
  visit(kTokens, tokens);
  visit(kClosed, closed);
  visit(kOpened, opened);
  visit(kHistory, history);
  visit(kBiases, biases);
  visit(kStopTokens, stop_tokens);
  visit(kTable, table);
  visit(kCopies, copies);
}

constexpr size_t padded(size_t bytes) { return (bytes + 7) / 8 * 8; }

struct Pooled {  // what all opened slots have
  std::vector<WireSlot> slots;
  std::vector<int32_t> history, stop_tokens;
  std::vector<WireBias> biases;
};

Pooled pooled(const std::vector<OpenedSlot>& opened) {
  Pooled all;
  for (const OpenedSlot& slot : opened) {
    const SamplingParams& params = slot.params;
    all.slots.push_back({.slot = slot.slot,
                         .prompt_length = slot.prompt_length,
                         .top_k = params.top_k,
                         .logprobs = params.logprobs,
                         .min_tokens = params.min_tokens,
                         .temperature = params.temperature,
                         .top_p = params.top_p,
                         .min_p = params.min_p,
                         .repetition_penalty = params.repetition_penalty,
                         .presence_penalty = params.presence_penalty,
                         .frequency_penalty = params.frequency_penalty,
                         .history = static_cast<uint32_t>(slot.history.size()),
                         .biases = static_cast<uint32_t>(params.bias.size()),
                         .stop_tokens = static_cast<uint32_t>(params.stop_tokens.size()),
                         .seed = params.seed});
    all.history.insert(all.history.end(), slot.history.begin(), slot.history.end());
    for (const auto& [token, value] : params.bias) all.biases.push_back({token, value});
    all.stop_tokens.insert(all.stop_tokens.end(), params.stop_tokens.begin(), params.stop_tokens.end());
  }
  return all;
}

// The next `count` elements of `all`, from `next` on, which moves behind them.
template <class T>
std::span<const T> take(const std::vector<T>& all, size_t& next, uint32_t count, int64_t plan_id) {
  FS_CHECK(count <= all.size() - next, "plan ", plan_id, " came damaged: its slots have more than it holds");
  next += count;
  return {all.data() + next - count, count};
}

std::vector<OpenedSlot> unpooled(const Pooled& all, int64_t plan_id) {
  std::vector<OpenedSlot> opened;
  size_t history = 0, biases = 0, stop_tokens = 0;
  for (const WireSlot& wire : all.slots) {
    const auto tokens = take(all.history, history, wire.history, plan_id);
    const auto stops = take(all.stop_tokens, stop_tokens, wire.stop_tokens, plan_id);
    OpenedSlot slot;
    slot.slot = wire.slot;
    slot.prompt_length = wire.prompt_length;
    slot.history.assign(tokens.begin(), tokens.end());
    slot.params = {.temperature = wire.temperature,
                   .top_k = wire.top_k,
                   .top_p = wire.top_p,
                   .min_p = wire.min_p,
                   .repetition_penalty = wire.repetition_penalty,
                   .presence_penalty = wire.presence_penalty,
                   .frequency_penalty = wire.frequency_penalty,
                   .logprobs = wire.logprobs,
                   .min_tokens = wire.min_tokens,
                   .seed = wire.seed,
                   .bias = {},
                   .stop_tokens = {}};
    slot.params.stop_tokens.assign(stops.begin(), stops.end());
    for (const WireBias& bias : take(all.biases, biases, wire.biases, plan_id)) {
      slot.params.bias.emplace_back(bias.token, bias.value);
    }
    opened.push_back(std::move(slot));
  }
  FS_CHECK(history == all.history.size() && biases == all.biases.size() && stop_tokens == all.stop_tokens.size(),
           "plan ", plan_id, " came damaged: it holds more than its slots have");
  return opened;
}

Header read_header(std::span<const std::byte> buffer) {
  Header header = {};
  FS_CHECK(buffer.size() >= sizeof header, "a plan of ", buffer.size(), " bytes is too short");
  std::memcpy(&header, buffer.data(), sizeof header);
  FS_CHECK(header.magic == kMagic, "what came is no plan, or one of another version");
  FS_CHECK(header.bytes >= sizeof header && header.bytes <= kMostBytes && header.return_logits <= 1, "plan ",
           header.plan_id, " came damaged: its header cannot be");
  return header;
}

}  // namespace

std::vector<std::byte> encode_plan(const BatchPlan& plan) {
  const Pooled all = pooled(plan.opened);
  Header header{.magic = kMagic,
                .bytes = sizeof(Header),
                .plan_id = plan.plan_id,
                .return_logits = plan.return_logits ? 1u : 0u,
                .counts = {}};
  const auto with_arrays = [&](auto&& visit) {
    visit_arrays(visit, plan.rows, plan.tokens, plan.closed, all.slots, all.history, all.biases, all.stop_tokens,
                 plan.table, plan.copies);
  };
  with_arrays([&](Array array, const auto& values) {
    header.counts[array] = values.size();
    header.bytes += padded(std::span(values).size_bytes());
  });
  std::vector<std::byte> buffer(header.bytes);
  std::memcpy(buffer.data(), &header, sizeof header);
  std::byte* next = buffer.data() + sizeof header;
  with_arrays([&](Array, const auto& values) {
    const auto bytes = std::as_bytes(std::span(values));
    std::copy(bytes.begin(), bytes.end(), next);
    next += padded(bytes.size());
  });
  return buffer;
}

BatchPlan decode_plan(std::span<const std::byte> buffer) {
  const Header header = read_header(buffer);
  FS_CHECK(header.bytes == buffer.size(), "plan ", header.plan_id, " came with ", buffer.size(), " bytes of ",
           header.bytes);
  BatchPlan plan;
  plan.plan_id = header.plan_id;
  plan.return_logits = header.return_logits == 1;
  Pooled all;
  std::span<const std::byte> rest = buffer.subspan(sizeof header);
  visit_arrays(
      [&](Array array, auto& values) {
        using Value = typename std::remove_reference_t<decltype(values)>::value_type;
        const uint64_t count = header.counts[array];
        FS_CHECK(count <= rest.size() / sizeof(Value) && padded(count * sizeof(Value)) <= rest.size(), "plan ",
                 header.plan_id, " came damaged: it counts more than it holds");
        values.resize(count);
        if (count > 0) std::memcpy(values.data(), rest.data(), count * sizeof(Value));
        rest = rest.subspan(padded(count * sizeof(Value)));
      },
      plan.rows, plan.tokens, plan.closed, all.slots, all.history, all.biases, all.stop_tokens, plan.table,
      plan.copies);
  FS_CHECK(rest.empty(), "plan ", header.plan_id, " came damaged: it holds more than it counts");
  plan.opened = unpooled(all, header.plan_id);
  return plan;
}

void broadcast_plan(Communicator& communicator, BatchPlan& plan, int root) {
  const bool sends = communicator.rank() == root;
  std::vector<std::byte> buffer;
  if (sends) buffer = encode_plan(plan);
  const size_t bytes = buffer.size();
  buffer.resize(std::max(bytes, kFirstBytes));
  communicator.broadcast(std::span(buffer).first(kFirstBytes), root);
  const size_t length = sends ? bytes : read_header(buffer).bytes;
  buffer.resize(std::max(length, kFirstBytes));
  if (length > kFirstBytes) communicator.broadcast(std::span(buffer).subspan(kFirstBytes), root);
  if (!sends) plan = decode_plan(std::span(buffer).first(length));
}

}  // namespace fastserve
