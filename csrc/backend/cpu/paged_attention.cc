#include "backend/cpu/paged_attention.h"

#include <algorithm>
#include <atomic>

#include "backend/cpu/round_row.h"

namespace fastserve::cpu {

namespace {

// A tile is cut into segments when it is more than this share of a thread's work.
constexpr int64_t kGrains = 8;
// Fewer products of a query vector and a position than this are not worth waking a thread for.
constexpr int64_t kSerialPairs = 1024;

char* reserve(Buffer& buffer, int64_t floats) {
  const auto bytes = floats * static_cast<int64_t>(sizeof(float));
  if (static_cast<int64_t>(buffer.bytes()) < bytes) buffer = Buffer(bytes);
  return buffer.as<char>();
}

// Calls put(d, element) for every element of x as it is held, and returns their scale.
template <class Put>
float convert(const float* x, int64_t n, float*, Put put) {
  for (int64_t d = 0; d < n; ++d) put(d, x[d]);
  return 1.0f;
}
template <class Put>
float convert(const float* x, int64_t n, Bf16*, Put put) {
  for (int64_t d = 0; d < n; ++d) put(d, to_bf16(x[d]));
  return 1.0f;
}
template <class Put>
float convert(const float* x, int64_t n, uint8_t*, Put put) {
  return round_row(x, n, 127.0f, [&](int64_t d, int32_t value) { put(d, value + 128); });
}

template <class T>
void store_head(const KvLayout& kv, const float* k, const float* v, int64_t slot, T* head) {
  constexpr int64_t kStep = 4 / sizeof(T);
  const int64_t stride = kv.slots_padded() * kStep;
  T* keys = head + slot * kStep;
  T* values = head + kv.value_offset() + slot / kStep * kStep * kv.head_dim_padded() + slot % kStep;
  const float scales[] = {
      convert(k, kv.head_dim, head,
              [&](int64_t d, auto x) { keys[d / kStep * stride + d % kStep] = static_cast<T>(x); }),
      convert(v, kv.head_dim, head, [&](int64_t d, auto x) { values[d * kStep] = static_cast<T>(x); }),
  };
  if constexpr (sizeof(T) == 1) {
    float* held = reinterpret_cast<float*>(head + kv.scale_offset()) + slot;
    for (const float scale : scales) {
      *held = scale;
      held += kv.slots_padded();
    }
  }
}

}  // namespace

void PagedAttention::store(const RopeAndStoreArgs& args, const Row& row, int64_t i) const {
  const int64_t position = row.start + i, slot = position % kv_.block_size;
  const float* k = static_cast<const float*>(args.qkv) + (row.first + i) * args.ld + args.num_heads * kv_.head_dim;
  const float* v = k + kv_.num_kv_heads * kv_.head_dim;
  char* block = base_ + row.table[position / kv_.block_size] * kv_.block_bytes();
  for (int64_t h = 0; h < kv_.num_kv_heads; ++h, k += kv_.head_dim, v += kv_.head_dim) {
    char* head = block + head_offset(args.layer, h) * size_of(kv_.format);
    switch (kv_.format) {
      case KvFormat::kFloat32:
        store_head(kv_, k, v, slot, reinterpret_cast<float*>(head));
        break;
      case KvFormat::kBFloat16:
        store_head(kv_, k, v, slot, reinterpret_cast<Bf16*>(head));
        break;
      case KvFormat::kInt8:
        store_head(kv_, k, v, slot, reinterpret_cast<uint8_t*>(head));
        break;
      case KvFormat::kFloat16:  // refused by layout_of()
        break;
    }
  }
}

void PagedAttention::run(const AttentionArgs& args, std::span<const Row> rows) {
  if (cut(args, rows) < kSerialPairs) {
    for (const Task& task : tasks_) attend(args, task, 0);
    return;
  }
  threads_.run(static_cast<int64_t>(tasks_.size()),
               [&](int64_t task, int thread) { attend(args, tasks_[task], thread); });
}

// Makes the list of tasks and returns how many pairs they are. Heads one after the other, so that one's K and V stay in
// the cache; later queries see more, so the longest tiles come first.
int64_t PagedAttention::cut(const AttentionArgs& args, std::span<const Row> rows) {
  const int64_t ld = kv_.head_dim_padded();
  const auto seen = [](const Tile& tile) { return tile.row->start + tile.first + tile.queries; };
  int64_t pairs = 0, largest = 0;
  tiles_.clear();
  tasks_.clear();
  for (const Row& row : rows) {
    for (int64_t head = 0; head < kv_.num_kv_heads; ++head) {
      const int64_t group_begin = head * args.query_group - args.query_offset;
      const int64_t first_head = std::max<int64_t>(0, group_begin);
      const int64_t heads = std::min(args.num_heads, group_begin + args.query_group) - first_head;
      const int64_t height = std::max<int64_t>(1, kernels_.attention_vectors / heads);
      for (int64_t first = (row.tokens - 1) / height * height; first >= 0; first -= height) {
        tiles_.push_back({&row, head, first_head, heads, first, std::min(height, row.tokens - first), 0, 0});
        pairs += tiles_.back().queries * heads * seen(tiles_.back());
        largest = std::max(largest, tiles_.back().queries * heads);
      }
    }
  }
  const int64_t grain = threads_.size() == 1 ? pairs : pairs / (threads_.size() * kGrains);
  int64_t partials = 0;
  open_.assign(tiles_.size(), 0);
  for (int64_t i = 0; i < static_cast<int64_t>(tiles_.size()); ++i) {
    Tile& tile = tiles_[i];
    const int64_t vectors = tile.queries * tile.heads, segments = ceil_div(seen(tile), kSegment);
    if (segments == 1 || vectors * seen(tile) <= grain) {
      tasks_.push_back({i, -1});
      continue;
    }
    tile.segments = segments;
    tile.partial = partials;
    partials += segments * attention_partial(vectors, ld);
    open_[i] = static_cast<int32_t>(segments);
    for (int64_t s = 0; s < segments; ++s) tasks_.push_back({i, s});
  }
  reserve(partials_, partials);
  scratch_floats_ = round_up(attention_scratch(largest, ld), 16);
  reserve(scratch_, scratch_floats_ * threads_.size());
  return pairs;
}

void PagedAttention::attend(const AttentionArgs& args, const Task& task, int thread) {
  const AttentionKernels& kernels = kv_.format == KvFormat::kFloat32    ? kernels_.attention_f32
                                    : kv_.format == KvFormat::kBFloat16 ? kernels_.attention_bf16
                                                                        : kernels_.attention_int8;
  const Tile& tile = tiles_[task.tile];
  const int64_t token = tile.row->first + tile.first, column = tile.first_head * kv_.head_dim;
  const AttentionTile work{.q = static_cast<const float*>(args.qkv) + token * args.ld + column,
                           .ld_q = args.ld,
                           .output = static_cast<float*>(args.output) + token * args.ld_output + column,
                           .ld_output = args.ld_output,
                           .queries = tile.queries,
                           .heads = tile.heads,
                           .head_dim = kv_.head_dim,
                           .head_dim_padded = kv_.head_dim_padded(),
                           .position = tile.row->start + tile.first,
                           .scale = args.scale,
                           .pool = base_ + head_offset(args.layer, tile.kv_head) * size_of(kv_.format),
                           .block_stride = kv_.num_layers * kv_.layer_elements(),
                           .value_offset = kv_.value_offset(),
                           .scale_offset = kv_.scale_offset(),
                           .block_size = kv_.block_size,
                           .slots_padded = kv_.slots_padded(),
                           .table = tile.row->table,
                           .scratch = scratch_.as<float>() + thread * scratch_floats_};
  if (tile.segments == 0) return kernels.tile(work);
  float* partials = partials_.as<float>() + tile.partial;
  kernels.segment(work, task.segment,
                  partials + task.segment * attention_partial(tile.queries * tile.heads, kv_.head_dim_padded()));
  // Whoever is last sees everybody's results and merges them.
  std::atomic_ref<int32_t> open(open_[task.tile]);
  if (open.fetch_sub(1, std::memory_order_acq_rel) == 1) kernels.merge(work, partials);
}

}  // namespace fastserve::cpu
