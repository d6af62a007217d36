#include "backend/cuda/matrix.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "backend/cuda/quantized_layout.h"
#include "model/dequantize.h"

namespace fastserve::cuda {

namespace {

int64_t element_bytes(WeightFormat format) { return format == WeightFormat::kFloat32 ? 4 : 2; }

int64_t data_bytes(WeightFormat format, int64_t n, int64_t k_padded) {
  if (!is_quantized(format)) return n * k_padded * element_bytes(format);
  return ceil_div(n, kUnitOutputs) * (k_padded / kSlab) * unit_bytes(format);
}

int64_t scale_bytes(WeightFormat format, int64_t n, int64_t k_padded) {
  if (!is_quantized(format)) return 0;
  if (format == WeightFormat::kInt8) return n * static_cast<int64_t>(sizeof(float));
  return ceil_div(n, kUnitOutputs) * (k_padded / kSlab) * unit_scale_bytes(format);
}

bool same_type(WeightFormat format, SourceType type) {
  return (format == WeightFormat::kFloat32 && type == SourceType::kF32) ||
         (format == WeightFormat::kFloat16 && type == SourceType::kF16) ||
         (format == WeightFormat::kBFloat16 && type == SourceType::kBF16);
}

void check_source(WeightFormat format, SourceType type) {
  const bool fits = !is_quantized(format) || format == WeightFormat::kInt8 ||
                    (format == WeightFormat::kQ8_0 && (type == SourceType::kQ8_0 || type == SourceType::kQ8_1)) ||
                    (format == WeightFormat::kQ4_0 && type == SourceType::kQ4_0) ||
                    (format == WeightFormat::kQ4_1 && type == SourceType::kQ4_1);
  FS_CHECK(fits, "a matrix held in GGUF's blocks takes only rows of its own type");
}

void narrow_row(WeightFormat format, const float* row, int64_t count, char* to) {
  if (format == WeightFormat::kFloat32) {
    std::memcpy(to, row, count * sizeof(float));
  } else if (format == WeightFormat::kBFloat16) {
    auto* values = reinterpret_cast<Bf16*>(to);
    for (int64_t i = 0; i < count; ++i) values[i] = to_bf16(row[i]);
  } else {
    auto* values = reinterpret_cast<Half*>(to);
    for (int64_t i = 0; i < count; ++i) values[i] = to_half(row[i]);
  }
}

// Units of some outputs, on the host: `first` is a multiple of kUnitOutputs.
struct Units {
  WeightFormat format;
  int64_t first, k, k_padded;
  std::vector<char> data, scales;

  // A row of GGUF's blocks, bit by bit.
  void place_blocks(int64_t output, SourceType type, const char* row) {
    const int64_t stored = block_bytes(type), values = has_nibbles(format) ? kGroup / 2 : kGroup;
    auto* halves = reinterpret_cast<uint16_t*>(scales.data());
    uint8_t group[kGroup];
    for (int64_t input = 0; input < k; input += kGroup, row += stored) {
      uint16_t* scale = halves + scale_place(format, k_padded, output - first, input);
      std::memcpy(scale, row, 2);
      if (format == WeightFormat::kQ4_1) std::memcpy(scale + 1, row + 2, 2);
      const auto* bytes = reinterpret_cast<const uint8_t*>(row + stored - values);
      for (int64_t i = 0; i < values; ++i) {
        if (has_nibbles(format)) {  // low nibbles are the first half of a block
          group[i] = bytes[i] & 15;
          group[i + kGroup / 2] = bytes[i] >> 4;
        } else {
          group[i] = bytes[i] ^ 0x80u;
        }
      }
      place(output, input, group);
    }
  }

  // One scale for the row, max |w| / 127; a row with a weight that is infinite or NaN becomes NaN.
  void place_channel(int64_t output, const float* row, float* scale) {
    float largest = 0.0f, poison = 0.0f;
    for (int64_t i = 0; i < k; ++i) {
      largest = std::max(largest, std::fabs(row[i]));
      poison += row[i] * 0.0f;
    }
    const bool sound = poison == 0.0f;
    *scale = sound ? largest / 127.0f : std::numeric_limits<float>::quiet_NaN();
    uint8_t group[kGroup];
    for (int64_t input = 0; input < k_padded; input += kGroup) {
      for (int64_t i = 0; i < kGroup; ++i) {
        const bool held = sound && *scale > 0.0f && input + i < k;
        group[i] = static_cast<uint8_t>((held ? static_cast<int>(std::nearbyint(row[input + i] / *scale)) : 0) + 128);
      }
      place(output, input, group);
    }
  }

 private:
  // 32 inputs from a multiple of 32 on, as weight_place() says for each.
  void place(int64_t output, int64_t input, const uint8_t (&group)[kGroup]) {
    char* words = &data[weight_place(format, k_padded, output - first, input).offset];
    for (int t = 0; t < 4; ++t) {
      if (has_nibbles(format)) {
        uint32_t word = 0;
        for (int i = 0; i < 8; ++i) {
          word |= static_cast<uint32_t>(group[i / 2 * 8 + 2 * t + i % 2]) << (i / 2 * 4 + i % 2 * 16);
        }
        std::memcpy(words + t * 8, &word, 4);
      } else {
        for (int i = 0; i < 8; ++i) words[t * 16 + i] = static_cast<char>(group[i / 2 * 8 + 2 * t + i % 2]);
      }
    }
  }
};

}  // namespace

void Staging::upload(void* to, size_t bytes, size_t granule,
                     const std::function<void(size_t first, size_t count, char* host)>& fill) {
  if (granule > memory_.bytes()) memory_ = Memory(Place::kPinned, granule);
  const size_t piece = memory_.bytes() / granule * granule;
  for (size_t first = 0; first < bytes; first += piece) {
    const size_t count = std::min(piece, bytes - first);
    fill(first, count, memory_.as<char>());
    check(cudaMemcpyAsync(static_cast<char*>(to) + first, memory_.as<char>(), count, cudaMemcpyHostToDevice, stream_));
    stream_.synchronize();
  }
}

CudaMatrix::CudaMatrix(int64_t outputs, int64_t inputs, WeightFormat format, Staging& staging)
    : format_(format), k_padded_(round_up(inputs, kPad)), staging_(staging) {
  FS_CHECK(!is_quantized(format) || format == WeightFormat::kInt8 || inputs % kGroup == 0,
           "a matrix held in GGUF's blocks has a multiple of ", kGroup, " inputs, not ", inputs);
  n = outputs;
  k = inputs;
  data_ = Memory(Place::kDevice, data_bytes(format, n, k_padded_));
  scales_ = Memory(Place::kDevice, scale_bytes(format, n, k_padded_));
}

void CudaMatrix::load_rows(int64_t first_row, int64_t rows, SourceType type, const void* source) {
  FS_CHECK(first_row >= 0 && rows >= 0 && first_row + rows <= n, "a matrix of ", n, " rows has no rows [", first_row,
           ", ", first_row + rows, ")");
  check_source(format_, type);
  const auto* bytes = static_cast<const char*>(source);
  if (is_quantized(format_)) {
    load_quantized(first_row, rows, type, bytes);
  } else {
    load_plain(first_row, rows, type, bytes);
  }
}

void CudaMatrix::load_plain(int64_t first_row, int64_t rows, SourceType type, const char* source) {
  const int64_t row_bytes = k_padded_ * element_bytes(format_), source_row = source_bytes(type, k);
  std::vector<float> unpacked(same_type(format_, type) ? 0 : k);
  staging_.upload(data_.as<char>() + first_row * row_bytes, rows * row_bytes, row_bytes,
                  [&](size_t first, size_t count, char* host) {
                    const int64_t from = static_cast<int64_t>(first) / row_bytes;
                    for (int64_t i = 0; i < static_cast<int64_t>(count) / row_bytes; ++i, host += row_bytes) {
                      const char* row = source + (from + i) * source_row;
                      if (unpacked.empty()) {
                        std::memcpy(host, row, source_row);
                      } else {
                        dequantize(type, row, k, unpacked.data());
                        narrow_row(format_, unpacked.data(), k, host);
                      }
                      std::memset(host + k * element_bytes(format_), 0, row_bytes - k * element_bytes(format_));
                    }
                  });
}

void CudaMatrix::load_quantized(int64_t first_row, int64_t rows, SourceType type, const char* source) {
  const int64_t data_row = data_bytes(format_, kUnitOutputs, k_padded_);  // of the outputs that share units
  const bool channels = format_ == WeightFormat::kInt8;
  const int64_t scale_row = channels ? 0 : scale_bytes(format_, kUnitOutputs, k_padded_);
  const int64_t source_row = source_bytes(type, k), last_row = first_row + rows;
  const int64_t first_unit = first_row / kUnitOutputs, units = ceil_div(last_row, kUnitOutputs) - first_unit;
  std::vector<float> unpacked(channels ? k : 0), channel_scales(channels ? rows : 0);
  Units piece{format_, 0, k, k_padded_, std::vector<char>(data_row), std::vector<char>(scale_row)};
  std::vector<char> scales(units * scale_row);
  staging_.upload(
      data_.as<char>() + first_unit * data_row, units * data_row, data_row,
      [&](size_t first, size_t count, char* host) {
        const int64_t from = first_unit + static_cast<int64_t>(first) / data_row;
        for (int64_t unit = from; unit < from + static_cast<int64_t>(count) / data_row; ++unit, host += data_row) {
          piece.first = unit * kUnitOutputs;
          const int64_t begin = std::max(first_row, piece.first);
          const int64_t end = std::min(last_row, piece.first + kUnitOutputs);
          if (end - begin < kUnitOutputs) {  // the others' rows stay
            check(cudaMemcpy(piece.data.data(), data_.as<char>() + unit * data_row, data_row, cudaMemcpyDeviceToHost));
            if (scale_row > 0) {
              check(cudaMemcpy(piece.scales.data(), scales_.as<char>() + unit * scale_row, scale_row,
                               cudaMemcpyDeviceToHost));
            }
          } else {
            std::fill(piece.data.begin(), piece.data.end(), 0);
            std::fill(piece.scales.begin(), piece.scales.end(), 0);
          }
          for (int64_t row = begin; row < end; ++row) {
            const char* given = source + (row - first_row) * source_row;
            if (channels) {
              dequantize(type, given, k, unpacked.data());
              piece.place_channel(row, unpacked.data(), &channel_scales[row - first_row]);
            } else {
              piece.place_blocks(row, type, given);
            }
          }
          std::memcpy(host, piece.data.data(), data_row);
          if (scale_row > 0) std::memcpy(&scales[(unit - first_unit) * scale_row], piece.scales.data(), scale_row);
        }
      });
  const char* whole = channels ? reinterpret_cast<const char*>(channel_scales.data()) : scales.data();
  const size_t bytes = channels ? rows * sizeof(float) : scales.size();
  char* to = scales_.as<char>() + (channels ? first_row * static_cast<int64_t>(sizeof(float)) : first_unit * scale_row);
  staging_.upload(to, bytes, 1,
                  [&](size_t first, size_t count, char* host) { std::memcpy(host, whole + first, count); });
}

}  // namespace fastserve::cuda
