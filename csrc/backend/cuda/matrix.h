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

  // Fills [to, to + bytes) of the device's memory in pieces: `fill(first, count, host)` leaves bytes [first, first +
  // count) at `host`. Pieces begin at multiples of `granule` bytes; one has a granule even if that is more than the
  // staging was made with. Returns when all bytes are there.
  void upload(void* to, size_t bytes, size_t granule,
              const std::function<void(size_t first, size_t count, char* host)>& fill);

 private:
  Memory memory_;
  Stream stream_;
};

struct CublasShape;

class CudaMatrix final : public Matrix {
 public:
  // Zeros. Throws where a format of GGUF's groups is asked for k inputs that are no multiple of 32.
  CudaMatrix(int64_t outputs, int64_t inputs, WeightFormat format, Staging& staging);

  int64_t bytes() const override { return static_cast<int64_t>(data_.bytes() + scales_.bytes()); }
  DeviceMatrix view() const { return {format_, n, k, k_padded_, data_.as<void>(), scales_.as<void>()}; }

  // Converts source rows [rows, k] to the matrix's format and places them at rows [first_row, first_row + rows). Throws
  // for a matrix of GGUF's groups and rows of another type. The rows are there when it returns.
  void load_rows(int64_t first_row, int64_t rows, SourceType type, const void* source);

  // By which of cuBLASLt's products it is multiplied, null for ours, where outputs are activations and where they are
  // wide; nothing before the first product. The backend's to find.
  mutable std::array<std::optional<const CublasShape*>, 2> theirs;

 private:
  void load_plain(int64_t first_row, int64_t rows, SourceType type, const char* source);
  void load_quantized(int64_t first_row, int64_t rows, SourceType type, const char* source);

  WeightFormat format_;
  int64_t k_padded_;
  Staging& staging_;
  Memory data_, scales_;
};

}  // namespace fastserve::cuda
