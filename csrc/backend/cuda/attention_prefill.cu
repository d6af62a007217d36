// Attention of rows of several tokens: a block takes a tile of tokens of one head, a warp 16 of them. K and V pass
// through shared memory, the next tile on its way while one is used.
#include "backend/cuda/attention_kernels.h"
#include "backend/cuda/attention_tile.cuh"
#include "backend/cuda/kv_gather.cuh"

namespace fastserve::cuda {
namespace {

constexpr int kStages = 2;

// A warp has registers for the sums of the columns of one panel, twice. Larger heads take blocks for each of theirs.
template <int kDim>
constexpr int kPanels = kDim / kPanelDim<kDim>;
template <int kDim>
constexpr int kStageBytes = (kPanels<kDim> + 1) * Panel<kDim>::kBytes;  // K, and one panel of V

// grid: (heads · panels of a head, tiles, parts of a tile)
template <class T, int kDim, int kWarps>
__global__ void __launch_bounds__(kWarps* kWarp) prefill(AttentionShape shape, const PrefillTile* tiles) {
  constexpr int kThreads = kWarps * kWarp, kTokens = kWarps * kWarpVectors;
  constexpr int kColumns = Panel<kDim>::kChunks, kSteps = kDim / 16;
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int head = blockIdx.x / kPanels<kDim>, panel = blockIdx.x % kPanels<kDim>;
  // The last tiles of a row have the most to do, and begin first.
  const PrefillTile tile = tiles[gridDim.y - 1 - blockIdx.y];
  const BatchRow row = shape.rows[tile.row];
  const int tile_end = tile.first + kPrefillTile, row_end = row.first + row.tokens;
  const int first = tile.first + static_cast<int>(blockIdx.z) * kTokens;
  const int rest = (tile_end < row_end ? tile_end : row_end) - first, tokens = rest < kTokens ? rest : kTokens;
  if (tokens <= 0) return;
  const int position = row.start + first - row.first, context = position + tokens;

  // This warp's tokens. Of those that do not exist the last one is a copy, and not stored.
  const int warp_first = static_cast<int>(threadIdx.x) / kWarp * kWarpVectors;
  const int first_position = position + warp_first;
  const int last_position = warp_first >= tokens                 ? -1
                            : warp_first + kWarpVectors < tokens ? first_position + kWarpVectors - 1
                                                                 : context - 1;
  const int token[2] = {warp_first + g, warp_first + g + 8};
  const T* query[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int64_t index = first + (token[h] < tokens ? token[h] : tokens - 1);
    query[h] = static_cast<const T*>(shape.qkv) + index * shape.ld + head * shape.head_dim;
  }
  const auto load_query = [&](int k, uint32_t (&a)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = load_pair(query[i % 2], 16 * k + i / 2 * 8 + 2 * t, shape.head_dim);
  };
  constexpr bool kHeld = kPanels<kDim> == 1;  // queries stay in registers
  uint32_t held[kHeld ? kSteps : 1][4];
  if constexpr (kHeld) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) load_query(k, held[k]);
  }

  const int kv_head = (head + shape.query_offset) / shape.query_group;
  KvGather<kDim, kThreads> gather(shape, kv_head, row.table, context);
  const auto stage = [&](int key_tile) {
    return shared_memory<unsigned char>() + key_tile % kStages * kStageBytes<kDim>;
  };
  // Copies the tile that was found last, and finds the one after it.
  const auto copy = [&](int key_tile) {
#pragma unroll
    for (int p = 0; p < kPanels<kDim>; ++p)
      gather.copy(kKeys, p, key_tile * kKeyTile, stage(key_tile) + p * Panel<kDim>::kBytes);
    gather.copy(kValues, panel, key_tile * kKeyTile, stage(key_tile) + kPanels<kDim> * Panel<kDim>::kBytes);
    commit_copies();
    gather.find((key_tile + 1) * kKeyTile);
  };

  SegmentState<kColumns> segment;
  MergedState<kColumns> merged;
  segment.clear();
  merged.clear();
  const int key_tiles = (context + kKeyTile - 1) / kKeyTile;
  gather.find(0);
  copy(0);
  for (int j = 0; j < key_tiles; ++j) {
    wait_copies<0>();
    __syncthreads();  // tile j is there, and nobody needs tile j - 1 any more
    if (j + 1 < key_tiles) copy(j + 1);
    const int begin = j * kKeyTile;
    if (begin <= last_position) {
      float score[kKeyTile / 8][4];
      score_positions<T, kDim>(
          stage(j), 0,
          [&](int k, uint32_t (&a)[4]) {
            if constexpr (kHeld) {
#pragma unroll
              for (int i = 0; i < 4; ++i) a[i] = held[k][i];
            } else {
              load_query(k, a);
            }
          },
          score);
      const bool whole = begin + kKeyTile - 1 <= first_position;  // all of the warp's tokens see all of the tile
      const int context = first_position + g + 1 - begin, next_context = context + 8;
      if (!whole) hide_unseen(score, context, next_context);
      uint32_t weight[kKeyTile / 16][4];
      soften<T>(score, shape.scale, segment, weight);
      const unsigned char* values = stage(j) + kPanels<kDim> * Panel<kDim>::kBytes;
      if (whole) {
        weigh_values<T, kDim>(values, 0, weight, segment);
      } else {
        weigh_seen_values<T, kDim>(values, 0, weight, context, next_context, segment);
      }
    }
    if ((j + 1) % kSegmentTiles == 0 || j + 1 == key_tiles) {
      merged.merge(segment);
      segment.clear();
    }
  }

#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (token[h] >= tokens) continue;
    T* output = static_cast<T*>(shape.output) + static_cast<int64_t>(first + token[h]) * shape.ld_output +
                head * shape.head_dim;
    const float inverse = 1.0f / merged.sum[h];
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      store_pair(output, panel * kPanelDim<kDim> + 8 * n + 2 * t, shape.head_dim, finish(merged.out[n][2 * h], inverse),
                 finish(merged.out[n][2 * h + 1], inverse));
    }
  }
}

template <class T, int kDim, int kWarps>
void launch_prefill(const AttentionShape& shape, const PrefillTile* tiles, int64_t num_tiles, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(shape.num_heads * kPanels<kDim>), static_cast<unsigned>(num_tiles),
                  kPrefillTile / (kWarps * kWarpVectors));
  launch(prefill<T, kDim, kWarps>, {grid, dim3(kWarps * kWarp), kStages * kStageBytes<kDim>, stream}, shape, tiles);
}

template <class T, int kWarps>
void launch_prefill(const AttentionShape& shape, const PrefillTile* tiles, int64_t num_tiles, cudaStream_t stream) {
  if (shape.row_bytes <= 128) {
    launch_prefill<T, 64, kWarps>(shape, tiles, num_tiles, stream);
  } else if (shape.row_bytes <= 256) {
    launch_prefill<T, 128, kWarps>(shape, tiles, num_tiles, stream);
  } else {
    launch_prefill<T, 256, kWarps>(shape, tiles, num_tiles, stream);
  }
}

}  // namespace

void attention_prefill(DType dtype, const AttentionShape& shape, const PrefillTile* tiles, int64_t num_tiles,
                       int block_warps, cudaStream_t stream) {
  FS_CHECK(block_warps == 4 || block_warps == 8, "a prefill block has 4 or 8 warps, got ", block_warps);
  const auto run = dtype == DType::kBFloat16 ? (block_warps == 4 ? launch_prefill<Bf16, 4> : launch_prefill<Bf16, 8>)
                                             : (block_warps == 4 ? launch_prefill<Half, 4> : launch_prefill<Half, 8>);
  run(shape, tiles, num_tiles, stream);
}

}  // namespace fastserve::cuda
