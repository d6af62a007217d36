// What one iteration does and what comes back: the C++ side of BatchPlan and StepResult in fastserve/types.py, where
// the columns are explained.
#pragma once

#include <cstdint>
#include <exception>
#include <unordered_map>
#include <vector>

#include "model/sampler.h"

namespace fastserve {

struct PlanRow {
  int32_t slot, start, tokens, logits;
};

struct OpenedSlot {
  int32_t slot;
  int32_t prompt_length;
  SamplingParams params;
  std::vector<int32_t> history;  // prompt and output so far, where penalties look at them
};

struct TableEntry {
  int32_t slot, index, block;
};

enum CopyDirection : int32_t { kOffload = 0, kUpload = 1 };

struct CopyRow {
  int32_t copy, direction, source, destination;
};

struct BatchPlan {
  int64_t plan_id = 0;
  std::vector<PlanRow> rows;
  std::vector<int32_t> tokens;  // of all rows; -1: the slot's last sampled token
  std::vector<int32_t> closed;
  std::vector<OpenedSlot> opened;
  std::vector<TableEntry> table;
  std::vector<CopyRow> copies;
  bool return_logits = false;  // for tests and evaluation: copy every logit row into the result
};

struct FinishedCopy {
  int32_t copy;
  double seconds;  // on its stream, from its turn on
};

struct StepResult {
  int64_t plan_id = 0;
  std::vector<Sampled> sampled;      // one for each row with logits, in row order
  std::vector<float> logits;         // [sum of rows' logits, vocab] when asked for
  std::vector<FinishedCopy> copies;  // since the last result
  double seconds = 0;
  std::exception_ptr error;  // the plan failed: nothing else is set
};

// What the runtime remembers of one job: a cache the engine can rebuild.
struct Slot {
  int64_t job = 0;  // tells it from others that have the slot before or after it
  int32_t prompt_length = 0;
  std::vector<int32_t> table;
  int64_t computed = 0;  // positions whose KV is in the pool
  int32_t last_sampled = -1;
  int64_t sampling = 0;  // plans that are to sample its next tokens and have not yet
};

struct PlanLimits {
  int64_t vocab_size;
  int64_t max_position;
  int64_t max_tokens;
  int64_t block_size;
  int64_t num_blocks;
};

// Throws, changing nothing, when the plan does not fit the slots as they are or the limits.
void validate(const BatchPlan& plan, const std::unordered_map<int32_t, Slot>& slots, const PlanLimits& limits);

}  // namespace fastserve
