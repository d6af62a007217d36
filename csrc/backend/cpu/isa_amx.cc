// The kernels for AMX, and for AVX-512 with dot products where tiles do not help; CMakeLists.txt sets the compiler
// flags.
#if defined(FS_AMX_EMULATED)
#define FS_ISA amx_emulated
#else
#define FS_ISA amx
#endif
#include "backend/cpu/attention_amx.h"
#include "backend/cpu/gemm_amx.h"
#include "backend/cpu/gemm_quantized_amx.h"
#include "backend/cpu/isa_table.h"

namespace fastserve::cpu {

namespace FS_ISA {

constexpr KernelTable make_amx_table(const char* name) {
  KernelTable table = make_table(name);
  table.operand_bf16.rows = kAmxRows;
  table.operand_bf16.level = false;  // a tile takes as long for one row as for all
  table.input_step = kAmxInputs;
  table.paired_rows = kAmxRows;
  table.cached_bytes = 1024 * 1024;
  table.place_rows = place_amx_rows;
  table.gemm = gemm_amx;
  table.gemm_quantized = gemm_quantized_amx;
  table.attention_vectors = 2 * kAmxRows;
  table.attention_bf16 = {attention_amx, attention_amx_segment, attention_amx_merge};
  return table;
}

// One product of each kind, of small integers, which are exact in every type. False when the machine gets it wrong.
inline bool tiles_work() {
  alignas(64) Bf16 a[kAmxRows][kAmxInputs], b[kAmxRows][kAmxInputs];
  alignas(64) uint8_t bytes[2][kAmxRows][kAmxBytes];
  alignas(64) float sums[kAmxRows][kAmxOutputs];
  alignas(64) int32_t byte_sums[kAmxRows][kAmxOutputs];
  for (int i = 0; i < kAmxRows; ++i) {
    for (int j = 0; j < kAmxInputs; ++j) {
      a[i][j] = to_bf16(static_cast<float>((i * 7 + j * 5) % 23 - 11));
      b[i][j] = to_bf16(static_cast<float>((i * 3 + j * 11) % 19 - 9));
    }
    for (int j = 0; j < kAmxBytes; ++j) {
      bytes[0][i][j] = static_cast<uint8_t>(i * 37 + j * 101);
      bytes[1][i][j] = static_cast<uint8_t>(i * 59 + j * 13);
    }
    for (int n = 0; n < kAmxOutputs; ++n) {
      sums[i][n] = static_cast<float>(i - n);
      byte_sums[i][n] = i - n;
    }
  }
  amx_shape(kAmxRows);
  amx_load<6>(a, kAmxBytes);
  amx_load<4>(b, kAmxBytes);
  amx_load<0>(sums, kAmxBytes);
  amx_dot_bf16<0, 6, 4>();
  amx_store<0>(sums, kAmxBytes);
  amx_load<7>(bytes[0], kAmxBytes);
  amx_load<5>(bytes[1], kAmxBytes);
  amx_load<1>(byte_sums, kAmxBytes);
  amx_dot_bytes<1, 7, 5>();
  amx_store<1>(byte_sums, kAmxBytes);
  amx_release();
  for (int i = 0; i < kAmxRows; ++i) {
    for (int n = 0; n < kAmxOutputs; ++n) {
      float sum = static_cast<float>(i - n);
      for (int k = 0; k < kAmxInputs; ++k) sum += to_float(a[i][k]) * to_float(b[k / 2][2 * n + k % 2]);
      int32_t byte_sum = i - n;
      for (int k = 0; k < kAmxBytes; ++k)
        byte_sum += static_cast<int8_t>(bytes[0][i][k]) * bytes[1][k / 4][4 * n + k % 4];
      if (sums[i][n] != sum || byte_sums[i][n] != byte_sum) return false;
    }
  }
  return true;
}

}  // namespace FS_ISA

#if defined(FS_AMX_EMULATED)
const KernelTable kAmxEmulatedKernels = FS_ISA::make_amx_table("amx_emulated");
bool emulated_amx_works() { return FS_ISA::tiles_work(); }
#else
const KernelTable kAmxKernels = FS_ISA::make_amx_table("amx");
bool amx_works() { return FS_ISA::tiles_work(); }
#endif

}  // namespace fastserve::cpu
