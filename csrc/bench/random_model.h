// Models of a known shape and random weights: their speed is that of real ones.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "bench/harness.h"
#include "model/spec.h"
#include "runtime/runtime.h"

namespace fastserve::bench {

// Llama-like shapes: "smollm2" (SmolLM2-135M), "llama-1b" (Llama-3.2-1B), "llama-8b" (Llama-3.1-8B), and "tiny", with
// which the benchmarks themselves are tested.
const std::vector<std::string>& preset_names();
ModelSpec preset(const std::string& name);

const std::vector<std::string>& weight_names();
const std::vector<std::string>& dtype_names();

// Rows of weights with a standard deviation near 0.02, as a file would hold them for this format; the same bytes again
// and again.
class RandomRows {
 public:
  RandomRows(WeightFormat format, int64_t columns);
  SourceType type() const { return type_; }
  int64_t row_bytes() const { return row_bytes_; }
  int64_t most() const { return static_cast<int64_t>(bytes_.size()) / row_bytes_; }  // rows at a time
  const void* data() const { return bytes_.data(); }

 private:
  SourceType type_;
  int64_t row_bytes_;
  std::vector<std::byte> bytes_;
};

void fill(Backend& backend, Matrix& matrix, const RandomRows& rows);

std::vector<float> random_floats(int64_t count, float magnitude);
// So many random activations, in the backend's memory and of its type.
Buffer random_activations(Backend& backend, int64_t count);
// What a backend computes in whose matrices are held in this format.
DType dtype_of(WeightFormat format);
std::vector<int32_t> random_tokens(int64_t count, int64_t vocab_size);

// What forward passes need, of matrices the layers' and the head; a pair is a query and a position it sees.
struct Cost {
  double weight_bytes, layer_parameters, head_parameters, kv_bytes_per_token, flops_per_pair;
};
Cost cost_of(const ModelSpec& spec, WeightFormat weights, KvFormat kv);

// A model that a benchmark measures.
struct Candidate {
  std::string preset, weights, dtype;
  WeightFormat format;
  KvFormat kv;
  ModelSpec spec;
  Cost cost;
};
// What --preset, --weights and --memory are when not given.
struct ModelDefaults {
  std::string presets = "smollm2", weights = "bfloat16,q8_0,q4_0", gigabytes = "6";
  bool host_only = true;  // else --device says where, and llama-8b is the model there
};
// Adds --preset, --weights, --dtype and --memory.
void add_model_options(Options& options, const ModelDefaults& defaults = {});
// Every preset with every weight format. Throws UsageError when `copies` of them take more than --memory side by side,
// each with the keys and values of `kv_tokens` tokens.
std::vector<Candidate> candidates(const Options& options, int64_t kv_tokens, int copies = 1);

struct RuntimeSize {
  int64_t block_size;
  int64_t num_blocks;
  int64_t max_tokens;
  int threads;
  std::string device = "cpu";
  int64_t num_host_blocks = 0;
};
std::unique_ptr<Runtime> random_model(const Candidate& candidate, const RuntimeSize& size);
// A part of it.
std::unique_ptr<Runtime> random_model(const Candidate& candidate, const RuntimeSize& size, const ModelSpec& spec,
                                      const Shard& shard, const Neighbours& neighbours);

inline constexpr int64_t kPromptTokens = 512;  // of a plan that fills the context
// Opens slots 0 … jobs - 1, each with `blocks` blocks of its own, and fills `context` positions of each.
std::vector<BatchPlan> prompt_plans(const ModelSpec& spec, int64_t jobs, int64_t context, int64_t blocks);
// Throws for a plan or a sample that failed.
void check_result(const StepResult& result);
// Runs plans one after another, keeping one queued behind the running one, as the engine does; throws for a plan or a
// sample that failed.
void run_plans(Runtime& runtime, std::vector<BatchPlan> plans);
// Opens slot `slot` with greedy sampling and gives it `blocks` blocks from `first_block` on.
void open_slot(BatchPlan& plan, int32_t slot, int64_t prompt_length, int64_t first_block, int64_t blocks);

}  // namespace fastserve::bench
