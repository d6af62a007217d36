// Stands in for csrc/backend/cuda/hopper.cuh where g++ compiles kernels.
#pragma once

#include <cuda.h>

#include "backend/cuda/matrix_descriptor.h"
#include "backend/cuda/simt.cuh"
#include "machine/barriers.h"
#include "machine/warpgroup.h"

#undef __grid_constant__
#define __grid_constant__

namespace fastserve::cuda {

constexpr int kWarpgroup = 4 * kWarp;

#define FS_HOPPER 1

inline uint32_t shared_address(const void* pointer) { return simt::shared_address(pointer); }

// ---- clusters

inline unsigned cluster_rank() { return simt::cluster_rank(); }
inline void cluster_barrier(const simt::Site& site = simt::Site::current()) { simt::cluster_barrier(site); }

// ---- barriers in shared memory

using Barrier = uint64_t;

inline void init_barrier(Barrier* barrier, int arrivals) { simt::init_barrier(barrier, arrivals); }
inline void publish_barriers() { simt::publish_barriers(); }
inline void arrive_and_expect(Barrier* barrier, int bytes) { simt::arrive_and_expect(barrier, bytes); }
inline void arrive_at(Barrier* barrier, unsigned rank) { simt::arrive_at(barrier, rank); }
inline void wait_barrier(Barrier* barrier, int parity, const simt::Site& site = simt::Site::current()) {
  simt::wait_barrier(barrier, parity, site);
}

// ---- copies of tiles

inline void copy_tile(void* to, const CUtensorMap* map, int column, int row, Barrier* barrier) {
  simt::copy_tile(to, map, column, row, barrier, 1u << simt::cluster_rank());
}
inline void copy_tile_to(unsigned blocks, void* to, const CUtensorMap* map, int column, int row, Barrier* barrier) {
  simt::copy_tile(to, map, column, row, barrier, blocks);
}

// ---- registers, of which there are enough here

template <int kRegisters>
inline void give_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
}
template <int kRegisters>
inline void take_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
}

// ---- products of a warpgroup

template <int kSums>
inline void fence_sums(float (&d)[kSums], const simt::Site& site = simt::Site::current()) {
  simt::fence_sums(d, kSums, site);
}
// Fences sums that no thread has touched: nothing.
inline void fence_products(const simt::Site& site = simt::Site::current()) {
  simt::meet("fence_products", kAllLanes, site, nullptr, nullptr);
}
inline void commit_products(const simt::Site& site = simt::Site::current()) { simt::commit_products(site); }
template <int kOpen>
inline void wait_products(const simt::Site& site = simt::Site::current()) {
  static_assert(kOpen >= 0);
  simt::wait_products(kOpen, site);
}
template <int kSums>
inline void wait_for_sums(float (&)[kSums], const simt::Site& site = simt::Site::current()) {
  simt::wait_products(0, site);
}
template <class T, int kColumns>
inline void multiply_async(float (&d)[kColumns / 2], uint64_t a, uint64_t b,
                           const simt::Site& site = simt::Site::current()) {
  static_assert(std::is_same_v<T, Bf16> || std::is_same_v<T, Half>);
  static_assert(kColumns % 8 == 0 && kColumns >= 8 && kColumns <= 256);
  simt::multiply_async(std::is_same_v<T, Bf16> ? simt::Element::kBf16 : simt::Element::kHalf, kColumns, d, a, b, site);
}

}  // namespace fastserve::cuda
