// What the host calls: one function for each operation, which queues its kernels on a stream and returns. Pointers are
// to device memory unless they say otherwise. Nothing is allocated and nothing waited for, so that all of it can be
// captured in a graph.
//
// Activations are matrices [tokens, ld] of the model's element type (`DType`); ld is a multiple of kPad, rows are
// 128-byte aligned, and columns from the logical width up to the next multiple of kPad are zero when read and left as
// they are. The residual, partial sums and logits are float32, laid out alike.
//
// A row's arithmetic depends on its own tokens and their absolute positions only (DESIGN §3): not on which kernel of
// several computes it, nor on its place in the batch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "backend/backend.h"
#include "backend/cuda/kv_layout.h"

namespace fastserve::cuda {

// ---- the batch of one iteration

// One job's tokens: `tokens` of them from batch index `first` on, at positions from `start` on. Its blocks are
// tables[table + position / block_size]. None (tokens == 0) in rows that only fill a graph's batch up.
struct BatchRow {
  int32_t first, tokens, start, table;
};

// A part of a row that a prefill kernel takes at once: up to kPrefillTile tokens from batch index `first` on.
struct PrefillTile {
  int32_t row, first;
};
constexpr int kPrefillTile = 128;  // tokens

struct DeviceBatch {
  // Known to the host:
  int64_t num_tokens;    // with those that only fill up
  int64_t num_rows;      // likewise
  int64_t num_decodes;   // rows of one token, or none: decode_rows
  int64_t max_context;   // no decode row has more positions, its own included; bounds the grid
  int64_t num_segments;  // of decode rows' contexts together, those of one segment left out
  int64_t num_tiles;     // of the rows of several tokens
  int64_t num_logits;
  // In device memory:
  const int32_t* token_ids;       // [num_tokens]; -1 - slot: what was last sampled in that slot
  const int32_t* positions;       // [num_tokens], position embeddings' offset included
  const int32_t* token_rows;      // [num_tokens]: its row, or -1 where it only fills up
  const BatchRow* rows;           // [num_rows]
  const int32_t* tables;          // block ids of all rows
  const int32_t* decode_rows;     // [num_decodes]: indices into rows
  const int32_t* first_segments;  // [num_decodes]: how many of num_segments come before its own
  const PrefillTile* tiles;       // [num_tiles]
  const int32_t* logit_tokens;    // [num_logits]: batch indices of the tokens whose logits are wanted
};

// ---- the KV pool: block b lies from base + b · block_elements on
struct KvView : KvLayout {
  void* base;
};

// ---- matrices (gemm.cu)

// A weight matrix [n, k] on the device. Rows are padded with zeros to k_padded, a multiple of kPad. `paired`: it is of
// a gated feed-forward block, and rows 2j and 2j + 1 are the j-th of gate and of up.
struct DeviceMatrix {
  WeightFormat format;  // kFloat32, kBFloat16, kFloat16, or one of the quantized
  int64_t n, k, k_padded;
  const void* data;    // as gemm.cu lays it out
  const void* scales;  // of the quantized formats
  bool paired = false;
};

// The sum over k is cut in so many parts, at multiples of 64 as equal as these allow: part p begins at input k_padded /
// 64 · p / kGemmParts · 64.
constexpr int kGemmParts = 4;
// Bytes of a workspace of products, zero-filled before its first use.
constexpr int64_t kGemmWorkspace = int64_t{32} << 20;

struct GemmCall {
  DType dtype;        // of the activations; that of weights that are not quantized
  const void* input;  // [m, ld_input] activations
  int64_t ld_input;
  DeviceMatrix weight;
  const float* bias;  // [n], 16-byte aligned, or null
  void* output;       // [m, ld_output]: float32 if `wide`, else activations
  int64_t ld_output;
  int64_t m;
  bool wide;
  bool accumulate;  // output += …; only if wide
  // Only if the weight is paired, then neither wide nor with a bias: the output is [m, n / 2], and its column j is
  // silu(column 2j) · column 2j + 1, of columns that are rounded as if they had been written.
  bool gated = false;
  // kGemmWorkspace bytes that no product of another stream has, or null: then some shapes take longer. The result is
  // the same.
  void* workspace = nullptr;
};
// output[i, j] (+)= Σ_k input[i, k] · weight[j, k] + bias[j]. The order of the sum over k depends on k alone: each part
// is summed from zero in ascending steps of 16 (as one mma does those; float32: input by input), then the parts are
// added in ascending order, then int8's scale applied. 16-bit activations meet weights rounded to their type.
void gemm(const GemmCall& call, cudaStream_t stream);

// ---- elementwise (elementwise.cu, norm.cu, rope.cu). Weights of norms are 16-byte aligned.

struct EmbedCall {
  DeviceMatrix table;
  const int32_t* ids;           // [tokens]
  const int32_t* last_sampled;  // [slots]: what an id -1 - slot stands for; null: ids are not negative
  int32_t first, count;         // ids in [first, first + count) are rows id - first of the table; others give zeros
  int64_t tokens;
  float* output;  // [tokens, ld]
  int64_t ld;
  bool accumulate;
};
void embed(const EmbedCall& call, cudaStream_t stream);

struct NormCall {
  DType dtype;
  const float* input;    // [rows, ld]
  const int32_t* order;  // [rows]: output row i is of input row order[i]; null: i
  void* output;          // [rows, ld] activations
  const float* weight;   // [width]
  const float* bias;     // [width] or null: then RMS norm, else layer norm
  int64_t rows, width, ld;
  float eps;
};
void norm(const NormCall& call, cudaStream_t stream);

// cos and sin of every token's angles, times `scale`: out [tokens, 2, half]; inv_freq [half].
void rotation_table(const int32_t* positions, int64_t tokens, const float* inv_freq, int64_t half, float scale,
                    float* out, cudaStream_t stream);

struct RopeAndStoreCall {
  DType dtype;
  void* qkv;  // [tokens, ld] activations: q heads, k heads, v heads; q is rotated in place
  int64_t ld;
  const float* cos_sin;  // [tokens, 2, rotary_half] or null: no rotation
  int64_t rotary_half;   // pairs (i, i + rotary_half) of each head are rotated
  const float* q_norm;   // [head_dim] or null: RMS norm over each head before rotation
  const float* k_norm;
  float eps;
  int64_t num_heads;
  KvView pool;
  int64_t layer;
};
void rope_and_store(const RopeAndStoreCall& call, const DeviceBatch& batch, cudaStream_t stream);

// x[t, i] = act(x[t, i]) for i < width; gated: act(x[t, i]) · x[t, round_up(width, kPad) + i].
void activate(DType dtype, Activation kind, bool gated, void* x, int64_t tokens, int64_t width, int64_t ld,
              cudaStream_t stream);

// Copies whole words of 4 bytes, from and to multiples of 16, between the device's memory and pinned memory of the
// host, by a kernel: a device's copy engines take what they are given one after the other, and so what an iteration
// waits for would stand behind KV blocks.
void copy_words(const void* from, void* to, int64_t bytes, cudaStream_t stream);

// output[i] += input[i]
void add(const float* input, float* output, int64_t count, cudaStream_t stream);

// output[i] = ((parts[0][i] + parts[1][i]) + parts[2][i]) + …: parts [ranks, count], ranks > 0, count a multiple
// of 4.
void sum_parts(const float* parts, int64_t ranks, int64_t count, float* output, cudaStream_t stream);

// ---- attention (attention.cu, attention_{prefill,decode,f32}.cu)

struct AttentionCall {
  DType dtype;
  const void* qkv;  // [tokens, ld] activations: rotated q comes first
  int64_t ld;
  void* output;  // [tokens, ld_output] activations: heads · head_dim
  int64_t ld_output;
  int64_t num_heads;
  int64_t query_group;   // query head h reads KV head (h + query_offset) / query_group
  int64_t query_offset;  // below query_group
  float scale;           // applied to q · k
  KvView pool;
  int64_t layer;
  // attention_workspace() bytes, 16-byte aligned and zero before the first call, and nobody else's: it begins with
  // counters that every call leaves at zero.
  void* workspace;
};
// Causal attention of every token over its job's pool blocks, its own chunk included (which is in the pool by now).
// Contexts are cut at absolute multiples of kSegment positions; segments merge in ascending order.
void attention(const AttentionCall& call, const DeviceBatch& batch, cudaStream_t stream);
// Bytes that `decodes` rows with so many segments together (num_segments) need. Few where each row has one block for
// each KV head, because there are rows enough to fill the device.
int64_t attention_workspace(int64_t num_heads, const KvLayout& pool, int64_t decodes, int64_t segments);

}  // namespace fastserve::cuda
