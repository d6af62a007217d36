#include "bench/random_model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <random>

#include "common/check.h"
#include "model/dequantize.h"

namespace fastserve::bench {

namespace {

constexpr int64_t kChunkBytes = int64_t{8} << 20;
constexpr float kMagnitude = 0.035f;  // uniform in ±0.035: a standard deviation of 0.02

using Generator = std::mt19937;  // seeded alike every time

ModelSpec llama(int64_t vocab_size, int64_t hidden, int64_t layers, int64_t heads, int64_t kv_heads, int64_t inner,
                float theta, int64_t head_dim = 64, bool tied = true) {
  ModelSpec spec{};
  spec.vocab_size = vocab_size;
  spec.hidden_size = hidden;
  spec.num_layers = layers;
  spec.num_heads = heads;
  spec.num_kv_heads = kv_heads;
  spec.head_dim = head_dim;
  spec.intermediate_size = inner;
  spec.max_position = 8192;
  spec.rms_norm = true;
  spec.norm_eps = 1e-5f;
  spec.activation = Activation::kSilu;
  spec.gated_mlp = true;
  spec.rope_scale = 1.0f;
  spec.tied_embeddings = tied;
  for (int64_t i = 0; i < spec.head_dim / 2; ++i) {
    spec.rope_inv_freq.push_back(std::pow(theta, -2.0f * static_cast<float>(i) / static_cast<float>(spec.head_dim)));
  }
  return spec;
}

SourceType source_type(WeightFormat format) {
  switch (format) {
    case WeightFormat::kFloat32:
      return SourceType::kF32;
    case WeightFormat::kQ8_0:
      return SourceType::kQ8_0;
    case WeightFormat::kQ4_0:
      return SourceType::kQ4_0;
    case WeightFormat::kQ4_1:
      return SourceType::kQ4_1;
    default:
      return SourceType::kBF16;
  }
}

// Scales of quantized blocks, float16: 2^-12 for bytes, 2^-8 for nibbles, and a minimum of -7.5 · 2^-8.
constexpr uint16_t kByteScale = 0x0C00, kNibbleScale = 0x1C00, kNibbleMinimum = 0xA780;

}  // namespace

const std::vector<std::string>& preset_names() {
  static const std::vector<std::string> names = {"smollm2", "llama-1b", "llama-8b", "tiny"};
  return names;
}

ModelSpec preset(const std::string& name) {
  if (name == "smollm2") return llama(49152, 576, 30, 9, 3, 1536, 1e5f);
  if (name == "llama-8b") return llama(128256, 4096, 32, 32, 8, 14336, 5e5f, 128, false);
  if (name == "tiny") return llama(512, 128, 2, 4, 2, 192, 1e4f, 32);
  FS_CHECK(name == "llama-1b", "no preset is called '", name, "'");
  return llama(128256, 2048, 16, 32, 8, 8192, 5e5f);
}

const std::vector<std::string>& weight_names() {
  static const std::vector<std::string> names = {"float32", "bfloat16", "int8", "q8_0", "q4_0", "q4_1"};
  return names;
}

const std::vector<std::string>& dtype_names() {
  static const std::vector<std::string> names = {"float32", "bfloat16", "int8"};
  return names;
}

RandomRows::RandomRows(WeightFormat format, int64_t columns)
    : type_(source_type(format)), row_bytes_(source_bytes(type_, columns)) {
  const int64_t rows = std::max<int64_t>(1, kChunkBytes / row_bytes_);
  bytes_.resize(rows * row_bytes_);
  Generator generator(1);
  if (type_ == SourceType::kF32 || type_ == SourceType::kBF16) {
    std::uniform_real_distribution<float> draw(-kMagnitude, kMagnitude);
    for (int64_t i = 0; i < rows * columns; ++i) {
      const float value = draw(generator);
      if (type_ == SourceType::kF32) {
        std::memcpy(bytes_.data() + i * 4, &value, 4);
      } else {
        const Bf16 rounded = to_bf16(value);
        std::memcpy(bytes_.data() + i * 2, &rounded, 2);
      }
    }
    return;
  }
  for (std::byte& byte : bytes_) byte = static_cast<std::byte>(generator() & 255u);
  const uint16_t scale = type_ == SourceType::kQ8_0 ? kByteScale : kNibbleScale;
  const int64_t block = block_bytes(type_);
  for (int64_t at = 0; at < static_cast<int64_t>(bytes_.size()); at += block) {
    std::memcpy(bytes_.data() + at, &scale, 2);
    if (type_ == SourceType::kQ4_1) std::memcpy(bytes_.data() + at + 2, &kNibbleMinimum, 2);
  }
}

void fill(Backend& backend, Matrix& matrix, const RandomRows& rows) {
  for (int64_t first = 0; first < matrix.n; first += rows.most()) {
    backend.load_rows(matrix, first, std::min(rows.most(), matrix.n - first), rows.type(), rows.data());
  }
}

std::vector<float> random_floats(int64_t count, float magnitude) {
  Generator generator(2);
  std::uniform_real_distribution<float> draw(-magnitude, magnitude);
  std::vector<float> values(count);
  for (float& value : values) value = draw(generator);
  return values;
}

DType dtype_of(WeightFormat format) { return format == WeightFormat::kFloat32 ? DType::kFloat32 : DType::kBFloat16; }

Buffer random_activations(Backend& backend, int64_t count) {
  constexpr int64_t kDrawn = int64_t{1} << 20;
  const std::vector<float> values = random_floats(std::min(count, kDrawn), 1.0f);
  const DType dtype = backend.activations();
  std::vector<std::byte> bytes(values.size() * size_of(dtype));
  for (size_t i = 0; i < values.size(); ++i) {
    if (dtype == DType::kFloat32) {
      std::memcpy(bytes.data() + i * 4, &values[i], 4);
    } else {
      const uint16_t bits = dtype == DType::kBFloat16 ? to_bf16(values[i]).bits : to_half(values[i]).bits;
      std::memcpy(bytes.data() + i * 2, &bits, 2);
    }
  }
  Buffer buffer = backend.allocate(count * size_of(dtype));
  for (int64_t first = 0; first < count; first += static_cast<int64_t>(values.size())) {
    const int64_t part = std::min(count - first, static_cast<int64_t>(values.size()));
    backend.upload(bytes.data(), buffer.as<std::byte>() + first * size_of(dtype), part * size_of(dtype));
  }
  return buffer;
}

std::vector<int32_t> random_tokens(int64_t count, int64_t vocab_size) {
  Generator generator(3);
  std::uniform_int_distribution<int32_t> draw(0, static_cast<int32_t>(vocab_size) - 1);
  std::vector<int32_t> tokens(count);
  for (int32_t& token : tokens) token = draw(generator);
  return tokens;
}

Cost cost_of(const ModelSpec& spec, WeightFormat weights, KvFormat kv) {
  const double hidden = static_cast<double>(spec.hidden_size), inner = static_cast<double>(spec.intermediate_size);
  const auto heads = static_cast<double>(spec.num_heads * spec.head_dim);
  const auto layers = static_cast<double>(spec.num_layers);
  const double layer =
      hidden * static_cast<double>(spec.qkv_width()) + heads * hidden + (spec.gated_mlp ? 3 : 2) * hidden * inner;
  const double head = hidden * static_cast<double>(spec.vocab_size);
  const int64_t scale_bytes = kv == KvFormat::kInt8 ? 4 : 0;
  double bits = 0;
  switch (weights) {
    case WeightFormat::kFloat32:
      bits = 32;
      break;
    case WeightFormat::kBFloat16:
    case WeightFormat::kFloat16:
      bits = 16;
      break;
    case WeightFormat::kInt8:
      bits = 8;
      break;
    case WeightFormat::kQ8_0:
      bits = 8.5;
      break;
    case WeightFormat::kQ4_0:
      bits = 4.5;
      break;
    case WeightFormat::kQ4_1:
      bits = 5;
      break;
  }
  return {(layers * layer + head) * bits / 8, layers * layer, head,
          2.0 * layers * static_cast<double>(spec.num_kv_heads * (spec.head_dim * size_of(kv) + scale_bytes)),
          4 * layers * heads};
}

void add_model_options(Options& options, const ModelDefaults& defaults) {
  if (!defaults.host_only) options.add_device();
  options.add("preset", "NAME,...", defaults.presets, "shapes of: smollm2, llama-1b, llama-8b, tiny", "llama-8b");
  options.add("weights", "NAME,...", defaults.weights,
              "how weights are held: float32, bfloat16, int8, q8_0, q4_0, q4_1", "bfloat16");
  options.add("dtype", "NAME", "auto",
              "of keys and values: float32, bfloat16, int8; auto: float32 with float32 weights, else bfloat16");
  options.add("memory", "GB", defaults.gigabytes, "refuse what takes more", "60");
}

std::vector<Candidate> candidates(const Options& options, int64_t kv_tokens, int copies) {
  const auto presets = options.choices("preset", preset_names());
  const auto weights = options.choices("weights", weight_names());
  const std::string& dtype = options.text("dtype");
  if (dtype != "auto") options.choices("dtype", dtype_names());
  const auto most = static_cast<double>(options.integer("memory", 1, 1 << 20));
  std::vector<Candidate> made;
  double bytes = 0;
  for (const std::string& name : presets) {
    for (const std::string& format_name : weights) {
      const WeightFormat format = parse_weight_format(format_name);
      const std::string held = dtype != "auto" ? dtype : format == WeightFormat::kFloat32 ? "float32" : "bfloat16";
      const KvFormat kv = parse_kv_format(held);
      made.push_back({name, format_name, held, format, kv, preset(name), cost_of(preset(name), format, kv)});
      const Cost& cost = made.back().cost;
      bytes += copies * (cost.weight_bytes + static_cast<double>(kv_tokens) * cost.kv_bytes_per_token);
    }
  }
  if (bytes > 1e9 * most) {
    char line[160];
    std::snprintf(line, sizeof line, "these models take %.1f GB side by side; name fewer --weights or raise --memory",
                  bytes / 1e9);
    throw UsageError(line);
  }
  return made;
}

std::unique_ptr<Runtime> random_model(const Candidate& candidate, const RuntimeSize& size) {
  return random_model(candidate, size, candidate.spec, Shard::whole(candidate.spec), {});
}

std::unique_ptr<Runtime> random_model(const Candidate& candidate, const RuntimeSize& size, const ModelSpec& spec,
                                      const Shard& shard, const Neighbours& neighbours) {
  std::vector<std::pair<std::string, std::pair<int64_t, int64_t>>> matrices;
  std::vector<std::string> norms;
  const int64_t hidden = spec.hidden_size, q = spec.num_heads * spec.head_dim, kv = spec.num_kv_heads * spec.head_dim;
  if (shard.has_embedding(spec)) matrices.push_back({"token_embedding.weight", {shard.num_tokens, hidden}});
  if (shard.last_stage) norms.push_back("final_norm.weight");
  if (shard.last_stage && !spec.tied_embeddings) matrices.push_back({"lm_head.weight", {shard.num_tokens, hidden}});
  for (int64_t i = 0; i < spec.num_layers; ++i) {
    const std::string prefix = "layers." + std::to_string(i) + ".";
    norms.push_back(prefix + "attn_norm.weight");
    norms.push_back(prefix + "mlp_norm.weight");
    matrices.push_back({prefix + "q.weight", {q, hidden}});
    matrices.push_back({prefix + "k.weight", {kv, hidden}});
    matrices.push_back({prefix + "v.weight", {kv, hidden}});
    matrices.push_back({prefix + "o.weight", {hidden, q}});
    matrices.push_back({prefix + "gate.weight", {spec.intermediate_size, hidden}});
    matrices.push_back({prefix + "up.weight", {spec.intermediate_size, hidden}});
    matrices.push_back({prefix + "down.weight", {hidden, spec.intermediate_size}});
  }
  RuntimeOptions given{.device = size.device,
                       .dtype = dtype_of(candidate.format),
                       .kv_format = candidate.kv,
                       .block_size = size.block_size,
                       .num_blocks = size.num_blocks,
                       .max_tokens = size.max_tokens,
                       .threads = size.threads,
                       .num_host_blocks = size.num_host_blocks};
  for (const auto& [name, shape] : matrices) given.formats[name] = candidate.format;
  auto runtime = std::make_unique<Runtime>(spec, shard, given, neighbours);
  const std::vector<float> ones(hidden, 1.0f);
  for (const std::string& name : norms) {
    runtime->load_tensor(name, SourceType::kF32, {hidden}, 0, ones.data(), hidden * 4);
  }
  std::map<int64_t, RandomRows> made;
  for (const auto& [name, shape] : matrices) {
    const auto [n, k] = shape;
    const RandomRows& rows = made.try_emplace(k, candidate.format, k).first->second;
    for (int64_t first = 0; first < n; first += rows.most()) {
      const int64_t count = std::min(rows.most(), n - first);
      runtime->load_tensor(name, rows.type(), {n, k}, first, rows.data(), count * rows.row_bytes());
    }
  }
  runtime->finish_loading();
  return runtime;
}

// One job a slot, all with the same context.
std::vector<BatchPlan> prompt_plans(const ModelSpec& spec, int64_t jobs, int64_t context, int64_t blocks) {
  std::vector<BatchPlan> plans;
  const int64_t per_plan = std::max<int64_t>(1, kPromptTokens / context);
  const auto tokens = random_tokens(jobs * context, spec.vocab_size);
  for (int64_t first = 0; first < jobs; first += per_plan) {
    const int64_t last = std::min(jobs, first + per_plan);
    for (int64_t start = 0; start < context; start += kPromptTokens) {
      BatchPlan plan;
      const int64_t end = std::min(context, start + kPromptTokens);
      for (int64_t job = first; job < last; ++job) {
        const auto slot = static_cast<int32_t>(job);
        if (start == 0) open_slot(plan, slot, context, job * blocks, blocks);
        plan.rows.push_back({slot, static_cast<int32_t>(start), static_cast<int32_t>(end - start), end == context});
        plan.tokens.insert(plan.tokens.end(), tokens.begin() + job * context + start,
                           tokens.begin() + job * context + end);
      }
      plans.push_back(std::move(plan));
    }
  }
  return plans;
}

void check_result(const StepResult& result) {
  if (result.error) std::rethrow_exception(result.error);
  for (const Sampled& sampled : result.sampled) FS_CHECK(sampled.error.empty(), sampled.error);
}

void run_plans(Runtime& runtime, std::vector<BatchPlan> plans) {
  int64_t queued = 0;
  for (BatchPlan& plan : plans) {
    runtime.submit(std::move(plan));
    if (++queued == 2) {
      check_result(*runtime.poll(-1));
      --queued;
    }
  }
  for (; queued > 0; --queued) check_result(*runtime.poll(-1));
}

void open_slot(BatchPlan& plan, int32_t slot, int64_t prompt_length, int64_t first_block, int64_t blocks) {
  OpenedSlot opened{.slot = slot, .prompt_length = static_cast<int32_t>(prompt_length), .params = {}, .history = {}};
  opened.params.temperature = 0;
  plan.opened.push_back(opened);
  for (int64_t i = 0; i < blocks; ++i) {
    plan.table.push_back({slot, static_cast<int32_t>(i), static_cast<int32_t>(first_block + i)});
  }
}

}  // namespace fastserve::bench
