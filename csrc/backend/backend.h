// What a device must offer to run a decoder. model/transformer.cc is written once over this interface.
//
// Activations are float32 matrices [tokens, ld] whose row stride `ld` is a multiple of kPad, so that kernels may write
// whole vectors; columns beyond the logical width are scratch.
#pragma once

#include <cstdint>
#include <memory>

#include "backend/logits.h"
#include "common/dtype.h"

namespace fastserve {

constexpr int64_t kPad = 64;
// Attention cuts every context at absolute multiples of this many positions, whatever the batch or the block size, and
// merges the pieces in ascending order. This is what makes preemption invisible (DESIGN §3).
constexpr int64_t kSegment = 256;

enum class Activation { kSilu, kGelu, kGeluTanh, kRelu };

// Element types a model file may hold. Quantized rows are made of blocks of 32 elements as GGUF stores them.
enum class SourceType { kF32, kF16, kBF16, kQ8_0, kQ8_1, kQ4_0, kQ4_1 };

// A weight matrix [n outputs, k inputs] in the backend's own layout.
class Matrix {
 public:
  virtual ~Matrix() = default;
  int64_t n = 0;
  int64_t k = 0;
  virtual int64_t bytes() const = 0;
};

struct GemmArgs {
  const float* input;  // [m, k], stride ld_input
  int64_t ld_input;
  const Matrix* weight;  // [n, k]
  const float* bias;     // [n] padded to kPad, or null
  float* output;         // [m, n], stride ld_output >= n rounded up to kPad
  int64_t ld_output;
  int64_t m;
  bool accumulate;  // output += input · weightᵀ + bias
};

struct NormArgs {
  const float* input;   // [rows, width], stride ld
  float* output;        // [rows, width], stride ld
  const float* weight;  // [width]
  const float* bias;    // [width] or null: then RMS norm, else layer norm
  int64_t rows;
  int64_t width;
  int64_t ld;
  float eps;
};

// Geometry of the paged KV pool. A block holds all local layers, so that moving it is one copy:
// [layers][kv heads]{ K [dimensions / step][slots][step], V [slots / step][dimensions][step] }. K lies transposed so
// that the score of many tokens is one vector; `step` neighbours in the direction of a sum are together, which is what
// dot product instructions read: 2 of bfloat16, 4 of int8. All of it is padded to whole vectors, with zeros. int8,
// held as value + 128, is followed by the float32 scales of K [slots] and of V [slots].
struct KvLayout {
  KvFormat format;
  int64_t num_layers;
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t block_size;

  int64_t step() const { return 4 / size_of(format); }
  int64_t slots_padded() const { return round_up(block_size, 16); }
  int64_t head_dim_padded() const { return round_up(head_dim, 16); }
  int64_t value_offset() const { return round_up(head_dim, step()) * slots_padded(); }
  int64_t scale_offset() const { return value_offset() + round_up(block_size, step()) * head_dim_padded(); }
  int64_t scale_bytes() const { return format == KvFormat::kInt8 ? 2 * slots_padded() * 4 : 0; }
  int64_t head_elements() const { return scale_offset() + scale_bytes(); }  // an element of int8 is a byte
  int64_t layer_elements() const { return num_kv_heads * head_elements(); }
  int64_t block_bytes() const { return num_layers * layer_elements() * size_of(format); }
};

// One job's tokens in this iteration.
struct Row {
  int64_t first;  // index of its first token in the batch
  int64_t tokens;
  int64_t start;         // absolute position of its first token
  const int32_t* table;  // its blocks, by position / block_size
};

// Rotates q and k, normalizes them per head first where the model does, and writes k and v to the pool.
struct RopeAndStoreArgs {
  float* qkv;  // [tokens, (heads + 2 * kv_heads) * head_dim], stride ld; q is rotated in place
  int64_t ld;
  const float* cos_sin;  // [tokens, 2, rotary_half], scaled; null: no rotation
  int64_t rotary_half;   // pairs (i, i + rotary_half) of each head are rotated
  const float* q_norm;   // [head_dim] or null: RMS norm over each head before rotation
  const float* k_norm;
  float eps;
  int64_t num_heads;
  const Row* rows;
  int64_t num_rows;
  int64_t layer;
};

// Causal attention of every token over its job's pool blocks, its own chunk included (which is in the pool by now).
struct AttentionArgs {
  const float* qkv;  // [tokens, …]: rotated q comes first, stride ld
  int64_t ld;
  float* output;  // [tokens, heads * head_dim], stride ld_output
  int64_t ld_output;
  int64_t num_heads;
  int64_t query_group;   // query head h reads KV head (h + query_offset) / query_group
  int64_t query_offset;  // below query_group
  float scale;           // applied to q · k
  const Row* rows;
  int64_t num_rows;
  int64_t layer;
};

class Backend {
 public:
  virtual ~Backend() = default;

  virtual const char* name() const = 0;  // the instruction set or device
  virtual int threads() const = 0;

  virtual std::unique_ptr<Matrix> make_matrix(int64_t n, int64_t k, WeightFormat format) = 0;
  // Converts source rows [rows, k] to the matrix's format and places them at rows [first_row, first_row + rows). Throws
  // for a matrix of GGUF's groups and rows of another type.
  virtual void load_rows(Matrix& matrix, int64_t first_row, int64_t rows, SourceType type, const void* source) = 0;
  virtual void set_kv_pool(const KvLayout& layout, void* base) = 0;

  // output[i] (+)= row token_ids[i] of the table; a negative token_id is a row of zeros.
  virtual void embed(const Matrix& table, const int32_t* token_ids, int64_t tokens, float* output, int64_t ld,
                     bool accumulate) = 0;
  virtual void gemm(const GemmArgs& args) = 0;
  virtual void norm(const NormArgs& args) = 0;
  virtual void rope_and_store(const RopeAndStoreArgs& args) = 0;
  virtual void attention(const AttentionArgs& args) = 0;
  // x[t, i] = act(x[t, i]) for i < width; gated: act(x[t, i]) * x[t, round_up(width, kPad) + i].
  virtual void activate(Activation kind, bool gated, float* x, int64_t tokens, int64_t width, int64_t ld) = 0;
  // output[i] += input[i].
  virtual void add(const float* input, float* output, int64_t count) = 0;
  // What a row of logits is sampled by, on whichever thread has it.
  virtual const LogitKernels& logit_kernels() const = 0;
  // Runs body(i, thread) for i in [0, count) on the device's host threads.
  virtual void parallel_for(int64_t count, void (*body)(void*, int64_t, int), void* context) = 0;
};

}  // namespace fastserve
