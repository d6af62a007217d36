// The weights of one model in the backend's layout, filled one named tensor at a time.
#pragma once

#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "backend/backend.h"
#include "common/buffer.h"
#include "model/shard.h"
#include "model/spec.h"

namespace fastserve {

// A vector of float32 in the backend's memory, zero-padded to kPad; empty when the model has none.
struct Vector {
  int64_t size = 0;
  Buffer data;
  const float* get() const { return size == 0 ? nullptr : data.as<float>(); }
};

struct NormWeights {
  Vector weight, bias;
};

struct Linear {
  std::unique_ptr<Matrix> weight;
  Vector bias;
};

struct LayerWeights {
  NormWeights attn_norm, mlp_norm;
  Linear qkv;  // rows: q heads, k heads, v heads
  Vector q_norm, k_norm;
  Linear out;
  Linear up;  // gated: gate at row 0, up at row spec.up_offset()
  Linear down;
};

using WeightFormats = std::unordered_map<std::string, WeightFormat>;

class Weights {
 public:
  // Allocates everything the spec asks for, of which `shard` is the part held here. `formats` says how to hold
  // matrices, by canonical name; where it says nothing that is `dtype`. Throws unless the parts of one matrix (q, k and
  // v; gate and up) are held alike.
  Weights(const ModelSpec& spec, const Shard& shard, DType dtype, const WeightFormats& formats, Backend& backend);

  // Stores a tensor, or the next rows of one, under its canonical name (loaders/spec.py). `shape` is that of the whole
  // tensor, [rows, columns] or [size]; `data` holds `bytes` bytes of it: whole rows from `first_row` on, which is where
  // the call before left off. Throws for an unknown or repeated name, or a shape, place or size that does not fit.
  void load(const std::string& name, SourceType type, const std::vector<int64_t>& shape, int64_t first_row,
            const void* data, int64_t bytes);
  // Throws, naming them, while tensors are missing.
  void check_complete() const;
  int64_t bytes() const;

  const Matrix& lm_head() const { return lm_head_ ? *lm_head_ : *token_embedding; }

  std::unique_ptr<Matrix> token_embedding, position_embedding;  // null where not held
  NormWeights final_norm;
  std::vector<LayerWeights> layers;

 private:
  struct Target {
    Matrix* matrix;  // else a vector
    float* vector;   // in the backend's memory
    int64_t first;   // row or element at which the tensor starts
    int64_t rows;
    int64_t columns;     // of a matrix
    int64_t loaded = 0;  // rows
  };

  void expect_matrix(const std::string& name, Matrix& matrix, int64_t first, int64_t rows);
  void expect_vector(const std::string& name, Vector& vector, int64_t first, int64_t size);
  void make_vector(Vector& vector, int64_t size);
  void make_norm(const std::string& name, NormWeights& norm, int64_t size);

  const ModelSpec spec_;
  Backend& backend_;
  std::unique_ptr<Matrix> lm_head_;
  std::unordered_map<std::string, Target> targets_;
};

}  // namespace fastserve
