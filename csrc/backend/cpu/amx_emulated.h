// The tile instructions of amx.h in vectors, as Intel's manual (volume 2, "Operation") defines them, for tests on
// machines without them. Whatever would be an invalid-opcode exception ends the program and says why.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace fastserve::cpu::FS_ISA {

struct alignas(64) AmxShape {
  uint8_t palette = 0, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

struct AmxState {
  AmxShape shape;
  alignas(64) uint8_t tile[8][16][64];
};
inline thread_local AmxState amx_state;

inline void amx_check(bool legal, const char* rule) {
  if (legal) return;
  std::fprintf(stderr, "fastserve: emulated AMX: %s\n", rule);
  std::abort();
}

inline void amx_release() { amx_state = AmxState{}; }
inline void amx_load_shape(const AmxShape& shape) {
  if (shape.palette == 0) return amx_release();
  amx_check(shape.palette == 1 && shape.start_row == 0, "palette 1 and start row 0");
  for (const uint8_t byte : shape.reserved) amx_check(byte == 0, "reserved bytes are 0");
  for (int t = 0; t < 16; ++t) {
    amx_check(t < 8
                  ? shape.rows[t] <= 16 && shape.row_bytes[t] <= 64 && (shape.rows[t] == 0) == (shape.row_bytes[t] == 0)
                  : shape.rows[t] == 0 && shape.row_bytes[t] == 0,
              "8 tiles of at most 16 rows of 64 bytes");
  }
  amx_release();
  amx_state.shape = shape;
}
inline void amx_store_shape(AmxShape& shape) { shape = amx_state.shape; }

inline int amx_rows(int tile) {
  amx_check(amx_state.shape.palette == 1 && amx_state.shape.rows[tile] != 0, "a tile is shaped before it is used");
  return amx_state.shape.rows[tile];
}
inline int amx_row_bytes(int tile) { return amx_state.shape.row_bytes[tile]; }

template <int T>
inline void amx_zero() {
  amx_rows(T);
  __builtin_memset(amx_state.tile[T], 0, sizeof amx_state.tile[T]);
}
template <int T>
inline void amx_load(const void* p, int64_t stride) {
  const int rows = amx_rows(T), bytes = amx_row_bytes(T);
  __builtin_memset(amx_state.tile[T], 0, sizeof amx_state.tile[T]);
  for (int r = 0; r < rows; ++r)
    __builtin_memcpy(amx_state.tile[T][r], static_cast<const char*>(p) + r * stride, bytes);
}
template <int T>
inline void amx_store(void* p, int64_t stride) {
  for (int r = 0; r < amx_rows(T); ++r) {
    __builtin_memcpy(static_cast<char*>(p) + r * stride, amx_state.tile[T][r], amx_row_bytes(T));
  }
}

inline void amx_check_product(int c, int a, int b) {
  amx_check(c != a && c != b && a != b, "the tiles of a product differ");
  amx_check(amx_rows(c) == amx_rows(a) && amx_row_bytes(c) == amx_row_bytes(b) && amx_row_bytes(a) == amx_rows(b) * 4,
            "the tiles of a product fit each other");
}

// Two fused chains, of even and of odd inputs, which start at zero; their sum is added to C. Denormals count as zero,
// going in and coming out; the rounding is to nearest even.
inline void amx_multiply_bf16(int c, int a, int b) {
  amx_check_product(c, a, b);
  const unsigned mode = _mm_getcsr();
  _mm_setcsr(0x9fc0);
  asm volatile("" ::: "memory");
  const int pairs = amx_row_bytes(a) / 4;
  const __m512i odd_mask = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  constexpr int kBeside = 4;  // rows, which hide each other's latency; those that are not there are zeros
  for (int m = 0; m < amx_rows(c); m += kBeside) {
    __m512 even[kBeside], odd[kBeside];
    for (int i = 0; i < kBeside; ++i) even[i] = odd[i] = _mm512_setzero_ps();
    for (int k = 0; k < pairs; ++k) {
      const __m512i y = _mm512_load_si512(amx_state.tile[b][k]);
      const __m512 y_even = _mm512_castsi512_ps(_mm512_slli_epi32(y, 16));
      const __m512 y_odd = _mm512_castsi512_ps(_mm512_and_si512(y, odd_mask));
      for (int i = 0; i < kBeside; ++i) {
        int pair;
        __builtin_memcpy(&pair, amx_state.tile[a][m + i] + 4 * k, sizeof pair);
        const __m512i x = _mm512_set1_epi32(pair);
        even[i] = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)), y_even, even[i]);
        odd[i] = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(x, odd_mask)), y_odd, odd[i]);
      }
    }
    for (int i = 0; i < kBeside; ++i) {
      auto* out = reinterpret_cast<float*>(amx_state.tile[c][m + i]);
      _mm512_store_ps(out, _mm512_add_ps(_mm512_load_ps(out), _mm512_add_ps(even[i], odd[i])));
    }
  }
  for (int m = amx_rows(c); m < 16; ++m) __builtin_memset(amx_state.tile[c][m], 0, 64);
  asm volatile("" ::: "memory");
  _mm_setcsr(mode);
}

// Sums wrap around; signed by unsigned bytes.
inline void amx_multiply_bytes(int c, int a, int b) {
  amx_check_product(c, a, b);
  for (int m = 0; m < amx_rows(c); ++m) {
    __m512i sum = _mm512_load_si512(amx_state.tile[c][m]);
    for (int k = 0; k < amx_row_bytes(a) / 4; ++k) {
      for (int i = 0; i < 4; ++i) {
        const __m512i x = _mm512_set1_epi32(static_cast<int8_t>(amx_state.tile[a][m][4 * k + i]));
        const __m512i y = _mm512_load_si512(amx_state.tile[b][k]);
        const __m512i byte = _mm512_and_si512(_mm512_srli_epi32(y, 8 * i), _mm512_set1_epi32(255));
        sum = _mm512_add_epi32(sum, _mm512_mullo_epi32(x, byte));
      }
    }
    _mm512_store_si512(amx_state.tile[c][m], sum);
  }
  for (int m = amx_rows(c); m < 16; ++m) __builtin_memset(amx_state.tile[c][m], 0, 64);
}

template <int C, int A, int B>
inline void amx_dot_bf16() {
  amx_multiply_bf16(C, A, B);
}
template <int C, int A, int B>
inline void amx_dot_bytes() {
  amx_multiply_bytes(C, A, B);
}

}  // namespace fastserve::cpu::FS_ISA
