// CUDA's intrinsics, those that backend/cuda/simt.cuh lets kernels use.
#pragma once

#include <math.h>

#include <bit>
#include <cstdint>
#include <type_traits>

#include "machine/machine.h"

// ---- barriers

inline void __syncthreads(const simt::Site& site = simt::Site::current()) {
  simt::block_barrier("__syncthreads", site, false);
}
inline int __syncthreads_or(int predicate, const simt::Site& site = simt::Site::current()) {
  return simt::block_barrier("__syncthreads_or", site, predicate != 0);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, const simt::Site& site = simt::Site::current()) {
  simt::meet("__syncwarp", mask, site, nullptr, nullptr);
}

// Blocks run one after the other and threads until they wait, so that every write is seen at once as it is.
inline void __threadfence() {}

// ---- shuffles: each lane brings a value and the number of the lane whose value it wants

namespace simt {

template <class T>
struct Shuffle {
  T value;
  int source;
  T result;
};

template <class T>
T shuffle(const char* operation, unsigned mask, T value, int source, const Site& site) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  if ((mask >> lane() & 1u) != 0 && (mask >> source & 1u) == 0) {
    fault(join(operation, " at ", describe(site), " reads lane ", source, ", which is not in the mask"));
  }
  Shuffle<T> own{value, source, {}};
  meet(operation, mask, site, &own, [](void* const(&payloads)[kLanes], unsigned lanes) {
    for (; lanes != 0; lanes &= lanes - 1) {
      auto& to = *static_cast<Shuffle<T>*>(payloads[std::countr_zero(lanes)]);
      to.result = static_cast<const Shuffle<T>*>(payloads[to.source])->value;
    }
  });
  return own.result;
}

inline void check_width(const char* operation, int width, const Site& site) {
  if (width < 1 || width > kLanes || (width & (width - 1)) != 0) {
    fault(join(operation, " at ", describe(site), " has a width of ", width, ", which is no power of 2 up to 32"));
  }
}

}  // namespace simt

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, const simt::Site& site = simt::Site::current()) {
  simt::check_width("__shfl_sync", width, site);
  const int first = simt::lane() & ~(width - 1);
  return simt::shuffle("__shfl_sync", mask, value, first | (source & (width - 1)), site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, const simt::Site& site = simt::Site::current()) {
  simt::check_width("__shfl_xor_sync", width, site);
  const int source = (simt::lane() ^ bits) & 31;
  // From a later group of `width` lanes there is nothing to be had; from an earlier one there is.
  const bool within = source < (simt::lane() & ~(width - 1)) + width;
  return simt::shuffle("__shfl_xor_sync", mask, value, within ? source : simt::lane(), site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 const simt::Site& site = simt::Site::current()) {
  simt::check_width("__shfl_up_sync", width, site);
  const int within = simt::lane() & (width - 1);
  const bool there = delta <= static_cast<unsigned>(within);
  return simt::shuffle("__shfl_up_sync", mask, value, simt::lane() - (there ? static_cast<int>(delta) : 0), site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   const simt::Site& site = simt::Site::current()) {
  simt::check_width("__shfl_down_sync", width, site);
  const int within = simt::lane() & (width - 1);
  const bool there = delta < static_cast<unsigned>(width - within);
  return simt::shuffle("__shfl_down_sync", mask, value, simt::lane() + (there ? static_cast<int>(delta) : 0), site);
}

// ---- votes

namespace simt {

struct Vote {
  bool predicate;
  unsigned lanes;
};

inline unsigned vote(const char* operation, unsigned mask, bool predicate, const Site& site) {
  Vote own{predicate, 0};
  meet(operation, mask, site, &own, [](void* const(&payloads)[kLanes], unsigned all) {
    unsigned lanes = 0;
    for (unsigned rest = all; rest != 0; rest &= rest - 1) {
      const int lane = std::countr_zero(rest);
      lanes |= static_cast<unsigned>(static_cast<const Vote*>(payloads[lane])->predicate) << lane;
    }
    for (; all != 0; all &= all - 1) static_cast<Vote*>(payloads[std::countr_zero(all)])->lanes = lanes;
  });
  return own.lanes;
}

}  // namespace simt

inline unsigned __ballot_sync(unsigned mask, int predicate, const simt::Site& site = simt::Site::current()) {
  return simt::vote("__ballot_sync", mask, predicate != 0, site);
}
inline int __any_sync(unsigned mask, int predicate, const simt::Site& site = simt::Site::current()) {
  return simt::vote("__any_sync", mask, predicate != 0, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, const simt::Site& site = simt::Site::current()) {
  return simt::vote("__all_sync", mask, predicate != 0, site) == mask;
}

// ---- atomics, on integers. (No thread is interrupted between two waits, so that anything is atomic.)

namespace simt {

template <class T, class Change>
T atomic(const char* operation, T* address, Change change) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T) != 0) fault(join(operation, " at a misaligned address"));
  const T old = *address;
  *address = change(old);
  return old;
}

}  // namespace simt

#define SIMT_ATOMICS(T)                                                                                     \
  inline T atomicAdd(T* address, T value) {                                                                 \
    return simt::atomic("atomicAdd", address, [value](T old) {                                              \
      return static_cast<T>(static_cast<unsigned long long>(old) + static_cast<unsigned long long>(value)); \
    });                                                                                                     \
  }
SIMT_ATOMICS(int)
SIMT_ATOMICS(unsigned)
SIMT_ATOMICS(unsigned long long)
#undef SIMT_ATOMICS

#define SIMT_ATOMICS(T)                                                                              \
  inline T atomicMax(T* address, T value) {                                                          \
    return simt::atomic("atomicMax", address, [value](T old) { return old > value ? old : value; }); \
  }                                                                                                  \
  inline T atomicMin(T* address, T value) {                                                          \
    return simt::atomic("atomicMin", address, [value](T old) { return old < value ? old : value; }); \
  }
SIMT_ATOMICS(int)
SIMT_ATOMICS(unsigned)
SIMT_ATOMICS(long long)
SIMT_ATOMICS(unsigned long long)
#undef SIMT_ATOMICS

#define SIMT_ATOMICS(T)                                                                              \
  inline T atomicOr(T* address, T value) {                                                           \
    return simt::atomic("atomicOr", address, [value](T old) { return old | value; });                \
  }                                                                                                  \
  inline T atomicCAS(T* address, T expected, T value) {                                              \
    return simt::atomic("atomicCAS", address, [=](T old) { return old == expected ? value : old; }); \
  }
SIMT_ATOMICS(int)
SIMT_ATOMICS(unsigned)
SIMT_ATOMICS(unsigned long long)
#undef SIMT_ATOMICS

// ---- the rest

// Byte i of the result is the byte of y:x that nibble i of the selector names. (Its highest bit would spread a sign.)
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  if ((selector & 0x8888u) != 0) simt::fault("__byte_perm with a selector that replicates signs");
  const unsigned long long bytes = static_cast<unsigned long long>(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<unsigned>(bytes >> (selector >> (4 * i) & 7u) * 8 & 0xffu) << (8 * i);
  }
  return result;
}

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }
inline int __ffsll(long long x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned long long>(x)) + 1; }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }

inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }

inline float rsqrtf(float x) { return static_cast<float>(1.0 / sqrt(static_cast<double>(x))); }

template <class T>
constexpr T min(T a, std::type_identity_t<T> b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, std::type_identity_t<T> b) {
  return a < b ? b : a;
}
