// Weight matrices on the device, and their way there.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <optional>

#include "backend/backend.h"
#include "backend/cuda/kernels.h"
#include "backend/cuda/runtime_api.h"

namespace fastserve::cuda {

// Pinned memory through which rows go to the device; one for all matrices that are loaded one after the other.
class Staging {
 public:
  explicit Staging(size_t bytes = size_t{16} << 20) : memory_(Place::kPinned, bytes) {}

  // Fills memory of the device in pieces: `fill(first, count, host)` leaves bytes [first, first + count) of `bytes` at
  // `host`. Pieces begin at multiples of `granule` bytes; one has a granule even if that is more than the staging was
  // made with. Granules lie `step` of them apart, from `to` on. Returns when all bytes are there.
  void upload(void* to, size_t bytes, size_t granule, size_t step,
              const std::function<void(size_t first, size_t count, char* host)>& fill);

 private:
  Memory memory_;
  Stream stream_;
};

struct CublasShape;

class CudaMatrix final : public Matrix {
 public:
  // Paired: the inner weights of a gated block (Backend::make_gated_matrix), `outputs` of each, held as pairs
  // (DeviceMatrix).
  enum class Rows { kPlain, kPaired };
  // Zeros. Throws where a format of GGUF's groups is asked for k inputs that are no multiple of 32.
  CudaMatrix(int64_t outputs, int64_t inputs, WeightFormat format, Staging& staging, Rows rows = Rows::kPlain);

  int64_t bytes() const override { return static_cast<int64_t>(data_.bytes() + scales_.bytes()); }
  int64_t outputs() const override { return paired_ ? held_ / 2 : held_; }
  bool paired() const { return paired_; }
  DeviceMatrix view() const { return {format_, held_, k, k_padded_, data_.as<void>(), scales_.as<void>(), paired_}; }

  // Converts source rows [rows, k] to the matrix's format and places them at rows [first_row, first_row + rows). Throws
  // for a matrix of GGUF's groups and rows of another type. The rows are there when it returns.
  void load_rows(int64_t first_row, int64_t rows, SourceType type, const void* source);

  // By which of cuBLASLt's products it is multiplied, null for ours, where outputs are activations and where they are
  // wide; nothing before the first product. The backend's to find.
  mutable std::array<std::optional<const CublasShape*>, 2> theirs;

 private:
  // Rows that lie on the device at place.first, place.first + place.step, …
  struct Places {
    int64_t first, step, count;
    int64_t end() const { return count == 0 ? first : first + (count - 1) * step + 1; }
  };
  void load_at(const Places& places, SourceType type, const char* source);
  void load_plain(const Places& places, SourceType type, const char* source);
  void load_quantized(const Places& places, SourceType type, const char* source);

  WeightFormat format_;
  bool paired_;
  int64_t held_;  // rows on the device
  int64_t k_padded_;
  Staging& staging_;
  Memory data_, scales_;
};

}  // namespace fastserve::cuda
