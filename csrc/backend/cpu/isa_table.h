// Fills a KernelTable from the kernels of the including file's instruction set.
#pragma once

#include "backend/cpu/activation.h"
#include "backend/cpu/attention.h"
#include "backend/cpu/gemm.h"
#include "backend/cpu/gemm_quantized.h"
#include "backend/cpu/logits.h"
#include "backend/cpu/norm.h"
#include "backend/cpu/rope.h"

namespace fastserve::cpu::FS_ISA {

constexpr KernelTable make_table(const char* name) {
  return {
      .name = name,
      .panel = kPanel,
      .operand_f32 = {sizeof(Float32Format::Operand), kMaxRows, true},
      .operand_bf16 = {sizeof(BFloat16Format::Operand), kMaxRows, true},
      .input_step = 2,
      .paired_rows = kMaxRows / 2,
      .cached_bytes = 0,
      .pack_panel = pack_panel,
      .unpack_row = unpack_row,
      .place_rows = place_rows,
      .gemm = gemm,
      .quant_bytes = sizeof(Quant),
      .quantize_input = quantize_input,
      .gemm_quantized = gemm_quantized,
      .rms_norm = rms_norm,
      .layer_norm = layer_norm,
      .rotate = rotate,
      // Enough to reuse every load of K and V, few enough for their scores to stay in the L1 cache.
      .attention_vectors = 24,
      .attention_f32 = attention_kernels<Float32Kv>(),
      .attention_bf16 = attention_kernels<BFloat16Kv>(),
      .attention_int8 = attention_kernels<Int8Kv>(),
      .activate = activate,
      .logits = {maximum_logit, sum_weights, weigh_logits, collect_logits},
  };
}

}  // namespace fastserve::cpu::FS_ISA
