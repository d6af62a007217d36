// The table of kernels one instruction set provides. Kernels are single-threaded; cpu_backend.cc splits the work.
#pragma once

#include <cstdint>
#include <vector>

#include "backend/backend.h"
#include "backend/cpu/quantized.h"
#include "backend/logits.h"

namespace fastserve::cpu {

// Layout of a packed matrix: panels of `panel` outputs; inside a panel, for float32 [k][panel], for bfloat16
// [k / 2][panel][2], so that one vector holds the same two inputs for neighbouring outputs. Both are zero-padded.
struct PanelLayout {
  DType dtype;
  int64_t n, k;
  int64_t panel;     // outputs of a panel
  int64_t k_padded;  // k, for bfloat16 rounded up to KernelTable::input_step
  int64_t panels() const { return ceil_div(n, panel); }
  int64_t panel_elements() const { return k_padded * panel; }
};

// The operand of a product lies in groups of neighbouring rows, one behind the other: [m / rows][k_padded / step][rows,
// or m if there are fewer][step], so that a kernel, which takes the rows of a group together, reads it from front to
// back.
struct OperandLayout {
  int64_t element_bytes;
  int64_t rows;  // of a group
  bool level;    // whether a group may have fewer, so that all have about as many; else only the last one has
};

// Columns [first_panel, last_panel) of output = operand · weightᵀ (+ bias) (+ output), or part of the sums.
struct PanelGemm {
  const PanelLayout* layout;
  const void* weight;   // all panels
  const void* operand;  // as place_rows left it, from the first of the rows meant on, which begins a group
  int64_t group_rows;   // of its groups
  const float* bias;    // [n] padded, or null
  float* output;        // [m][ld_output]
  int64_t ld_output;
  int64_t m;
  int64_t first_panel, last_panel;
  int64_t next_panel;  // which the caller will probably want next, or panels() if none
  bool accumulate;
  // Where cached_bytes is set: inputs [first_input, last_input), multiples of input_step. Sums that do not start at the
  // first input are taken from `partial` ([m rounded up to 32][ld_partial], column 0 is first_panel's), those that do
  // not end with the last one go there. Storing float32 sums changes no bit of them.
  int64_t first_input, last_input;
  float* partial;
  int64_t ld_partial;
};

// A tile of queries that share one KV head of one job.
struct AttentionTile {
  const float* q;  // query i of head h: q + i * ld_q + h * head_dim
  int64_t ld_q;
  float* output;  // likewise
  int64_t ld_output;
  int64_t queries;  // consecutive positions
  int64_t heads;    // query heads that share the KV head
  int64_t head_dim, head_dim_padded;
  int64_t position;  // of the first query
  float scale;
  const void* pool;      // element 0 of this layer and KV head in block 0
  int64_t block_stride;  // elements from one block to the next
  int64_t value_offset;  // elements from K to V
  int64_t scale_offset;  // elements from K to the scales, where there are any
  int64_t block_size, slots_padded;
  const int32_t* table;
  float* scratch;  // attention_scratch() floats, exclusive to the caller
};

// Floats from one query vector's scores to the next one's: not a multiple of the cache's ways.
constexpr int64_t kAttentionStride = kSegment + 16;

// Floats of scratch for a tile of `vectors` = queries * heads query vectors.
constexpr int64_t attention_scratch(int64_t vectors, int64_t head_dim_padded) {
  return (vectors + 15) / 16 * 16 * (kAttentionStride + 2 * head_dim_padded + 10) +
         (2 * kSegment + 48) * head_dim_padded + 2 * kSegment + 320;
}
// Floats of one segment's result: weighted sums of V, maxima and sums of weights.
constexpr int64_t attention_partial(int64_t vectors, int64_t head_dim_padded) {
  return vectors * (head_dim_padded + 2);
}

// A tile in one go, or one segment of it at a time, by anybody and in any order, and then their results, which lie one
// behind the other, merged: the same bits.
struct AttentionKernels {
  void (*tile)(const AttentionTile&);
  void (*segment)(const AttentionTile&, int64_t segment, float* partial);
  void (*merge)(const AttentionTile&, const float* partials);
};

struct KernelTable {
  const char* name;
  int64_t panel;                            // outputs of a weight panel
  OperandLayout operand_f32, operand_bf16;  // by the type of the weights
  int64_t input_step;                       // inputs of bfloat16 panels are padded to a multiple of it
  int64_t paired_rows;                      // a GEMM of as many rows at most takes two panels at a time
  int64_t cached_bytes;  // of a bfloat16 GEMM's operand that a call should take at most; 0: it has no limit
  void (*pack_panel)(const PanelLayout&, const float* rows, int64_t count, int64_t first, void* panel);
  void (*unpack_row)(const PanelLayout&, const void* weight, int64_t row, float* output, bool accumulate);
  // Places the first `rows` rows of a group of the operand, for bfloat16 rounded.
  void (*place_rows)(const PanelLayout&, const float* input, int64_t ld_input, int64_t rows, int64_t group_rows,
                     void* group);
  void (*gemm)(const PanelGemm&);
  int64_t quant_bytes;  // of one value of a quantized GEMM's operand
  void (*quantize_input)(const QuantizedLayout&, const float* input, void* output);
  void (*gemm_quantized)(const QuantizedGemm&);
  void (*rms_norm)(const float* x, const float* weight, float* y, int64_t width, float eps);
  void (*layer_norm)(const float* x, const float* weight, const float* bias, float* y, int64_t width, float eps);
  void (*rotate)(float* head, const float* cos_sin, int64_t half);
  int64_t attention_vectors;  // a tile has as many query vectors at most, unless one position has more
  AttentionKernels attention_f32, attention_bf16, attention_int8;
  void (*activate)(Activation kind, float* x, const float* gate_product, int64_t width);
  LogitKernels logits;
};

// Every instruction set this build has and this machine can run, best first; the emulated one, for tests, is last.
std::vector<const KernelTable*> supported_kernels();
// The best one, or the one named by the environment variable FASTSERVE_ISA. Throws when that one is not available.
const KernelTable& select_kernels();

extern const KernelTable kPortableKernels;
#ifdef FS_X86
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512Kernels;
extern const KernelTable kAvx512Bf16Kernels;
extern const KernelTable kAmxKernels;
extern const KernelTable kAmxEmulatedKernels;  // for tests: the same code, its tile instructions emulated
// Whether products of tiles are what they should be, tried out; only where the processor and the system have tiles.
bool amx_works();
bool emulated_amx_works();
#endif

}  // namespace fastserve::cpu
