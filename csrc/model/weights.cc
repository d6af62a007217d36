#include "model/weights.h"

#include <algorithm>

#include "common/check.h"
#include "model/dequantize.h"

namespace fastserve {

Weights::Weights(const ModelSpec& spec, const Shard& shard, DType dtype, const WeightFormats& formats, Backend& backend)
    : layers(spec.num_layers), spec_(spec), backend_(backend) {
  const int64_t hidden = spec.hidden_size, q = spec.num_heads * spec.head_dim, kv = spec.num_kv_heads * spec.head_dim;
  const auto format = [&](const std::string& name) {
    const auto found = formats.find(name);
    return found == formats.end() ? format_of(dtype) : found->second;
  };
  const auto shared_format = [&](const std::vector<std::string>& parts) {
    for (const std::string& part : parts) {
      FS_CHECK(format(part) == format(parts.front()), "'", part, "' and '", parts.front(),
               "' are one matrix and need one weight format");
    }
    return format(parts.front());
  };
  const auto matrix = [&](int64_t n, int64_t k, const std::vector<std::string>& parts) {
    return backend.make_matrix(n, k, shared_format(parts));
  };

  if (shard.has_embedding(spec)) {
    token_embedding = matrix(shard.num_tokens, hidden, {"token_embedding.weight"});
    expect_matrix("token_embedding.weight", *token_embedding, 0, shard.num_tokens);
  }
  if (shard.first_stage && spec.rope_inv_freq.empty()) {
    const int64_t rows = spec.max_position + spec.position_offset;
    position_embedding = matrix(rows, hidden, {"position_embedding.weight"});
    expect_matrix("position_embedding.weight", *position_embedding, 0, rows);
  }
  if (shard.last_stage && !spec.tied_embeddings) {
    lm_head_ = matrix(shard.num_tokens, hidden, {"lm_head.weight"});
    expect_matrix("lm_head.weight", *lm_head_, 0, shard.num_tokens);
  }
  if (shard.last_stage) make_norm("final_norm", final_norm, hidden);

  for (int64_t i = 0; i < spec.num_layers; ++i) {
    LayerWeights& layer = layers[i];
    const std::string prefix = "layers." + std::to_string(i) + ".";
    make_norm(prefix + "attn_norm", layer.attn_norm, hidden);
    make_norm(prefix + "mlp_norm", layer.mlp_norm, hidden);

    layer.qkv.weight = matrix(q + 2 * kv, hidden, {prefix + "q.weight", prefix + "k.weight", prefix + "v.weight"});
    if (spec.qkv_bias) make_vector(layer.qkv.bias, q + 2 * kv);
    int64_t first = 0;
    for (const auto& [name, rows] : {std::pair{"q", q}, {"k", kv}, {"v", kv}}) {
      expect_matrix(prefix + name + ".weight", *layer.qkv.weight, first, rows);
      if (spec.qkv_bias) expect_vector(prefix + name + ".bias", layer.qkv.bias, first, rows);
      first += rows;
    }
    if (spec.qk_norm) {
      make_vector(layer.q_norm, spec.head_dim);
      make_vector(layer.k_norm, spec.head_dim);
      expect_vector(prefix + "q_norm.weight", layer.q_norm, 0, spec.head_dim);
      expect_vector(prefix + "k_norm.weight", layer.k_norm, 0, spec.head_dim);
    }
    layer.out.weight = matrix(hidden, q, {prefix + "o.weight"});
    expect_matrix(prefix + "o.weight", *layer.out.weight, 0, hidden);
    if (spec.out_bias && shard.adds_biases) {
      make_vector(layer.out.bias, hidden);
      expect_vector(prefix + "o.bias", layer.out.bias, 0, hidden);
    }

    const int64_t inner = spec.intermediate_size, up = spec.up_offset();
    if (spec.gated_mlp) {
      const WeightFormat both = shared_format({prefix + "gate.weight", prefix + "up.weight"});
      layer.up.weight = spec.mlp_bias ? backend.make_matrix(up + inner, hidden, both)
                                      : backend.make_gated_matrix(inner, hidden, both, spec.activation);
    } else {
      layer.up.weight = matrix(inner, hidden, {prefix + "up.weight"});
    }
    layer.down.weight = matrix(hidden, inner, {prefix + "down.weight"});
    if (spec.gated_mlp) expect_matrix(prefix + "gate.weight", *layer.up.weight, 0, inner);
    expect_matrix(prefix + "up.weight", *layer.up.weight, up, inner);
    expect_matrix(prefix + "down.weight", *layer.down.weight, 0, hidden);
    if (spec.mlp_bias) {
      make_vector(layer.up.bias, up + inner);
      if (spec.gated_mlp) expect_vector(prefix + "gate.bias", layer.up.bias, 0, inner);
      expect_vector(prefix + "up.bias", layer.up.bias, up, inner);
    }
    if (spec.mlp_bias && shard.adds_biases) {
      make_vector(layer.down.bias, hidden);
      expect_vector(prefix + "down.bias", layer.down.bias, 0, hidden);
    }
  }
}

void Weights::make_vector(Vector& vector, int64_t size) {
  vector.size = size;
  vector.data = backend_.allocate(round_up(size, kPad) * static_cast<int64_t>(sizeof(float)));
}

void Weights::make_norm(const std::string& name, NormWeights& norm, int64_t size) {
  make_vector(norm.weight, size);
  expect_vector(name + ".weight", norm.weight, 0, size);
  if (!spec_.rms_norm) {
    make_vector(norm.bias, size);
    expect_vector(name + ".bias", norm.bias, 0, size);
  }
}

void Weights::expect_matrix(const std::string& name, Matrix& matrix, int64_t first, int64_t rows) {
  targets_[name] = {&matrix, nullptr, first, rows, matrix.k};
}

void Weights::expect_vector(const std::string& name, Vector& vector, int64_t first, int64_t size) {
  targets_[name] = {nullptr, vector.data.as<float>() + first, first, size, 1};
}

void Weights::load(const std::string& name, SourceType type, const std::vector<int64_t>& shape, int64_t first_row,
                   const void* data, int64_t bytes) {
  const auto found = targets_.find(name);
  FS_CHECK(found != targets_.end(), "tensor '", name, "' does not belong to this model");
  Target& target = found->second;
  FS_CHECK(target.loaded < target.rows, "tensor '", name, "' was loaded twice");
  const bool fits = target.matrix != nullptr
                        ? shape.size() == 2 && shape[0] == target.rows && shape[1] == target.columns
                        : shape.size() == 1 && shape[0] == target.rows;
  if (!fits) {
    std::string given;
    for (const int64_t size : shape) given += (given.empty() ? "" : ", ") + std::to_string(size);
    const std::string columns = target.matrix != nullptr ? ", " + std::to_string(target.columns) : "";
    FS_CHECK(false, "tensor '", name, "' has shape [", given, "]; the model's configuration asks for [", target.rows,
             columns, "]");
  }
  FS_CHECK(first_row == target.loaded, "tensor '", name, "' goes on at row ", first_row, ", not ", target.loaded);
  if (target.matrix != nullptr) {
    const int64_t row_bytes = source_bytes(type, target.columns), rows = bytes / row_bytes;
    FS_CHECK(rows > 0 && bytes == rows * row_bytes && first_row + rows <= target.rows, "tensor '", name, "' has ",
             bytes, " bytes from row ", first_row, " on; its shape and type ask for ",
             (target.rows - first_row) * row_bytes);
    backend_.load_rows(*target.matrix, target.first + first_row, rows, type, data);
    target.loaded += rows;
  } else {
    const int64_t expected = source_bytes(type, target.rows);
    FS_CHECK(bytes == expected, "tensor '", name, "' has ", bytes, " bytes; its shape and type ask for ", expected);
    std::vector<float> values(target.rows);
    dequantize(type, data, target.rows, values.data());
    backend_.upload(values.data(), target.vector, target.rows * static_cast<int64_t>(sizeof(float)));
    target.loaded = target.rows;
  }
}

void Weights::check_complete() const {
  std::vector<std::string> missing;
  for (const auto& [name, target] : targets_) {
    if (target.loaded < target.rows) missing.push_back(name);
  }
  if (missing.empty()) return;
  std::sort(missing.begin(), missing.end());
  std::string names = missing.front();
  for (size_t i = 1; i < std::min<size_t>(missing.size(), 3); ++i) names += ", " + missing[i];
  FS_CHECK(false, "the model lacks ", missing.size(), " tensors: ", names, missing.size() > 3 ? ", …" : "");
}

int64_t Weights::bytes() const {
  int64_t total = token_embedding ? token_embedding->bytes() : 0;
  if (position_embedding) total += position_embedding->bytes();
  if (lm_head_) total += lm_head_->bytes();
  for (const LayerWeights& layer : layers) {
    for (const Linear* linear : {&layer.qkv, &layer.out, &layer.up, &layer.down}) total += linear->weight->bytes();
  }
  return total;
}

}  // namespace fastserve
