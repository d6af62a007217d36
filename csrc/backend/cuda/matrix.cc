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

void Staging::upload(void* to, size_t bytes, size_t granule, size_t step,
                     const std::function<void(size_t first, size_t count, char* host)>& fill) {
  if (granule > memory_.bytes()) memory_ = Memory(Place::kPinned, granule);
  const size_t piece = memory_.bytes() / granule * granule;
  for (size_t first = 0; first < bytes; first += piece) {
    const size_t count = std::min(piece, bytes - first);
    char *from = memory_.as<char>(), *at = static_cast<char*>(to) + first * step;
    fill(first, count, from);
    if (step == 1) {
      check(cudaMemcpyAsync(at, from, count, cudaMemcpyHostToDevice, stream_));
    } else {
      check(cudaMemcpy2DAsync(at, granule * step, from, granule, granule, count / granule, cudaMemcpyHostToDevice,
                              stream_));
    }
    stream_.synchronize();
  }
}

CudaMatrix::CudaMatrix(int64_t outputs, int64_t inputs, WeightFormat format, Staging& staging, Rows rows)
    : format_(format),
      paired_(rows == Rows::kPaired),
      held_(paired_ ? 2 * outputs : outputs),
      k_padded_(round_up(inputs, kPad)),
      staging_(staging) {
  FS_CHECK(!is_quantized(format) || format == WeightFormat::kInt8 || inputs % kGroup == 0,
           "a matrix held in GGUF's blocks has a multiple of ", kGroup, " inputs, not ", inputs);
  n = paired_ ? round_up(outputs, kPad) + outputs : outputs;
  k = inputs;
  data_ = Memory(Place::kDevice, data_bytes(format, held_, k_padded_));
  scales_ = Memory(Place::kDevice, scale_bytes(format, held_, k_padded_));
}

void CudaMatrix::load_rows(int64_t first_row, int64_t rows, SourceType type, const void* source) {
  FS_CHECK(first_row >= 0 && rows >= 0 && first_row + rows <= n, "a matrix of ", n, " rows has no rows [", first_row,
           ", ", first_row + rows, ")");
  check_source(format_, type);
  const auto* bytes = static_cast<const char*>(source);
  if (!paired_) return load_at({first_row, 1, rows}, type, bytes);
  const int64_t width = held_ / 2, up = n - width;
  for (int64_t half = 0; half < 2; ++half) {
    const int64_t begins = half * up, first = std::max(first_row, begins);
    const int64_t last = std::min(first_row + rows, begins + width);
    if (first >= last) continue;
    load_at({(first - begins) * 2 + half, 2, last - first}, type, bytes + (first - first_row) * source_bytes(type, k));
  }
}

void CudaMatrix::load_at(const Places& places, SourceType type, const char* source) {
  if (is_quantized(format_)) {
    load_quantized(places, type, source);
  } else {
    load_plain(places, type, source);
  }
}

void CudaMatrix::load_plain(const Places& places, SourceType type, const char* source) {
  const int64_t row_bytes = k_padded_ * element_bytes(format_), source_row = source_bytes(type, k);
  std::vector<float> unpacked(same_type(format_, type) ? 0 : k);
  staging_.upload(data_.as<char>() + places.first * row_bytes, places.count * row_bytes, row_bytes, places.step,
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

void CudaMatrix::load_quantized(const Places& places, SourceType type, const char* source) {
  const int64_t data_row = data_bytes(format_, kUnitOutputs, k_padded_);  // of the outputs that share units
  const bool channels = format_ == WeightFormat::kInt8;
  const int64_t scale_row = channels ? 0 : scale_bytes(format_, kUnitOutputs, k_padded_);
  const int64_t source_row = source_bytes(type, k);
  const int64_t first_unit = places.first / kUnitOutputs, units = ceil_div(places.end(), kUnitOutputs) - first_unit;
  // What is there already of other rows stays.
  const bool shared = places.step > 1 || places.first % kUnitOutputs != 0 || places.end() % kUnitOutputs != 0;
  const int64_t first_scale = channels ? places.first * static_cast<int64_t>(sizeof(float)) : first_unit * scale_row;
  std::vector<char> scales(channels ? (places.end() - places.first) * sizeof(float) : units * scale_row);
  const auto fetch = [&](char* to, const Memory& memory, int64_t first, int64_t bytes) {
    if (shared) check(cudaMemcpy(to, memory.as<char>() + first, bytes, cudaMemcpyDeviceToHost));
  };
  fetch(scales.data(), scales_, first_scale, static_cast<int64_t>(scales.size()));
  std::vector<float> unpacked(channels ? k : 0);
  Units piece{format_, 0, k, k_padded_, std::vector<char>(data_row), std::vector<char>(scale_row)};
  int64_t row = 0;  // the next of the source
  staging_.upload(
      data_.as<char>() + first_unit * data_row, units * data_row, data_row, 1,
      [&](size_t first, size_t count, char* host) {
        const int64_t from = static_cast<int64_t>(first) / data_row;
        fetch(host, data_, first_unit * data_row + static_cast<int64_t>(first), static_cast<int64_t>(count));
        for (int64_t unit = from; unit < from + static_cast<int64_t>(count) / data_row; ++unit, host += data_row) {
          char* unit_scales = scales.data() + unit * scale_row;
          piece.first = (first_unit + unit) * kUnitOutputs;
          if (shared) {
            std::memcpy(piece.data.data(), host, data_row);
            std::copy_n(unit_scales, scale_row, piece.scales.data());
          } else {
            std::fill(piece.data.begin(), piece.data.end(), 0);
            std::fill(piece.scales.begin(), piece.scales.end(), 0);
          }
          for (; row < places.count; ++row) {
            const int64_t place = places.first + row * places.step;
            if (place >= piece.first + kUnitOutputs) break;
            const char* given = source + row * source_row;
            if (channels) {
              dequantize(type, given, k, unpacked.data());
              piece.place_channel(place, unpacked.data(),
                                  reinterpret_cast<float*>(scales.data()) + (place - places.first));
            } else {
              piece.place_blocks(place, type, given);
            }
          }
          std::memcpy(host, piece.data.data(), data_row);
          std::copy_n(piece.scales.data(), scale_row, unit_scales);
        }
      });
  staging_.upload(scales_.as<char>() + first_scale, scales.size(), 1, 1,
                  [&](size_t first, size_t count, char* host) { std::memcpy(host, scales.data() + first, count); });
}

}  // namespace fastserve::cuda
