// The tile instructions of AMX: eight registers of up to 16 rows of 64 bytes, and products of them.
//
// A product C += A · B: A [rows][64 bytes] of inputs, B [16][64 bytes] whose row p holds the p-th 4 bytes of inputs of
// 16 neighbouring outputs, C [rows][16] float32 or int32. Written as assembly, because GCC 12's intrinsics declare
// neither all they read nor that they read memory, and so may run before the stores they depend on.
#pragma once

#include <cstdint>

#if defined(FS_AMX_EMULATED)
#include "backend/cpu/amx_emulated.h"
#endif

namespace fastserve::cpu::FS_ISA {

constexpr int64_t kAmxRows = 16;
constexpr int64_t kAmxBytes = 64;   // of a row
constexpr int64_t kAmxInputs = 32;  // bfloat16 inputs of one product
constexpr int64_t kAmxOutputs = 16;

#if !defined(FS_AMX_EMULATED)

struct alignas(64) AmxShape {
  uint8_t palette = 0, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

inline void amx_load_shape(const AmxShape& shape) { asm volatile("ldtilecfg %0" ::"m"(shape) : "memory"); }
inline void amx_store_shape(AmxShape& shape) { asm volatile("sttilecfg %0" : "=m"(shape)); }
inline void amx_release() { asm volatile("tilerelease" ::: "memory"); }

template <int T>
inline void amx_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
inline void amx_load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
inline void amx_store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
// C += A · B for pairs of bfloat16.
template <int C, int A, int B>
inline void amx_dot_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
// The same for four signed bytes of A by four unsigned ones of B, in int32.
template <int C, int A, int B>
inline void amx_dot_bytes() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#endif

// Makes tiles 0 to 3 (C) and 6, 7 (A) have `rows` rows, and those of 4, 5 (B) as many as hold `inputs` bfloat16 inputs,
// which A's rows are wide. Other libraries use the tiles of a thread too, so its shape is asked for and not remembered:
// that takes a tenth of the time that setting it does.
inline void amx_shape(int64_t rows, int64_t inputs = kAmxInputs) {
  AmxShape wanted, current;
  wanted.palette = 1;
  for (int t = 0; t < 8; ++t) {
    wanted.rows[t] = static_cast<uint8_t>(t == 4 || t == 5 ? inputs / 2 : rows);
    wanted.row_bytes[t] = static_cast<uint16_t>(t >= 6 ? inputs * 2 : kAmxBytes);
  }
  amx_store_shape(current);
  if (__builtin_memcmp(&wanted, &current, sizeof wanted) != 0) amx_load_shape(wanted);
}

}  // namespace fastserve::cpu::FS_ISA
