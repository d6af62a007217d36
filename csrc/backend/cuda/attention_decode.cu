// Attention of rows of one token. A block takes segments of one row and KV head, whose query heads are its vectors: as
// many bytes as the pool has of them are read, once. Its warps share out a tile's positions for the scores, and the
// columns of V for the sums over all of the positions. Where several blocks share a row, the last one to be done merges
// what all have left in the workspace; which one that is decides nothing but who does it.
#include "backend/cuda/attention_kernels.h"
#include "backend/cuda/attention_tile.cuh"
#include "backend/cuda/kv_gather.cuh"

namespace fastserve::cuda {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarp;
constexpr int kAhead = 8;                   // segments that a merging thread has on their way at once
constexpr int kScoreStride = kKeyTile + 8;  // floats: eight lanes' rows lie in different banks

// Larger heads take blocks for each panel of V.
template <int kDim>
constexpr int kPanels = kDim / kPanelDim<kDim>;
template <int kDim>
constexpr int kStageBytes = kPanels<kDim> * Panel<kDim>::kBytes;  // K, or one panel of V

// Tiles of K or V in shared memory, all but one of which are on their way: an even number, 64 KiB. Of such blocks a
// multiprocessor has kBlocks, if it has as much shared memory.
template <int kDim>
constexpr int kStages = kDim == 64    ? 8
                        : kDim == 128 ? 4
                                      : 2;
template <int kDim>
constexpr int kBlocks = kDim == 256 ? 2 : 3;
template <int kDim>
constexpr int kSharedBytes = kStages<kDim> * kStageBytes<kDim> + kWarpVectors * kScoreStride * 4;

// Segments of rows that several blocks share: of decode row z with S segments, head h and segment s, the partial at
// first_segments[z] · heads + h · S + s.
struct Partials {
  float* all;  // each as long as a pool's row and kStatFloats
  const int32_t* first_segments;
  int32_t* counters;  // [decode rows, heads]: blocks that are done
};

// grid: (splits, KV heads · passes over its query heads · panels of a head, decode rows)
template <class T, int kDim>
__global__ void __launch_bounds__(kThreads, kBlocks<kDim>)
    decode(AttentionShape shape, const int32_t* decode_rows, int passes, Partials partials) {
  begin_after_predecessor();
  constexpr int kColumns = Panel<kDim>::kChunks / kWarps, kSteps = kDim / 16;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;

  const BatchRow row = shape.rows[decode_rows[blockIdx.z]];
  const int context = row.start + 1, split = blockIdx.x, stride = gridDim.x;
  const int segments = (context + static_cast<int>(kSegment) - 1) / static_cast<int>(kSegment);
  if (row.tokens == 0 || split >= segments) return;
  const int panel = blockIdx.y % kPanels<kDim>, pass = blockIdx.y / kPanels<kDim> % passes;
  const int kv_head = blockIdx.y / kPanels<kDim> / passes;
  const int group_first = kv_head * shape.query_group - shape.query_offset;
  const int group_end = group_first + shape.query_group;
  const int first_head = (group_first < 0 ? 0 : group_first) + pass * kWarpVectors;
  const int rest = (group_end < shape.num_heads ? group_end : shape.num_heads) - first_head;
  const int heads = rest < kWarpVectors ? rest : kWarpVectors;
  if (heads <= 0) return;

  // This block's segments are every stride-th; only the row's last one has fewer tiles than others.
  const int own_segments = (segments - 1 - split) / stride + 1;
  const bool has_last = split + (own_segments - 1) * stride == segments - 1;
  const int last_tiles = has_last ? (context - 1) % static_cast<int>(kSegment) / kKeyTile + 1 : kSegmentTiles;
  const int tiles = (own_segments - 1) * kSegmentTiles + last_tiles;
  const auto position = [&](int j) {
    return (split + j / kSegmentTiles * stride) * static_cast<int>(kSegment) + j % kSegmentTiles * kKeyTile;
  };

  KvGather<kDim, kThreads> gather(shape, kv_head, row.table, context);
  const auto stage = [&](int item) {
    return shared_memory<unsigned char>() + item % kStages<kDim> * kStageBytes<kDim>;
  };
  // Tile j's K is item 2j, its V, after which the next tile is found, 2j + 1.
  const auto copy_keys = [&](int j) {
    if (j < tiles) {
#pragma unroll
      for (int p = 0; p < kPanels<kDim>; ++p)
        gather.copy(kKeys, p, position(j), stage(2 * j) + p * Panel<kDim>::kBytes);
    }
    commit_copies();
  };
  const auto copy_values = [&](int j) {
    if (j < tiles) {
      gather.copy(kValues, panel, position(j), stage(2 * j + 1));
      gather.find(position(j + 1));
    }
    commit_copies();
  };
  gather.find(position(0));
#pragma unroll 1
  for (int j = 0; j < kStages<kDim> / 2 - 1; ++j) {
    copy_keys(j);
    copy_values(j);
  }
  copy_keys(kStages<kDim> / 2 - 1);

  uint32_t query[kSteps][4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int vector = g + i % 2 * 8;
    const T* from = static_cast<const T*>(shape.qkv) + row.first * shape.ld + (first_head + vector) * shape.head_dim;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      query[k][i] = vector < heads ? load_pair(from, 16 * k + i / 2 * 8 + 2 * t, shape.head_dim) : 0;
    }
  }
  float* scores = reinterpret_cast<float*>(shared_memory<unsigned char>() + kStages<kDim> * kStageBytes<kDim>);
  const auto score_pair = [&](int vector, int column) {
    return reinterpret_cast<float2*>(scores + vector * kScoreStride + column + 2 * t);
  };

  const bool alone = segments == 1 || stride == 1;
  const int row_elements = shape.row_bytes / 2;
  const int64_t partial = row_elements + kStatFloats;
  // Of this row's first head here; other heads' follow, `segments` each.
  float* partials_of_row = partials.all;
  if (!alone) {
    partials_of_row +=
        (int64_t{partials.first_segments[blockIdx.z]} * shape.num_heads + first_head * segments) * partial;
  }
  const int first_column = panel * kPanelDim<kDim> + warp * kColumns * 8 + 2 * t;
  SegmentState<kColumns> segment;
  MergedState<kColumns> merged;
  segment.clear();
  merged.clear();
  for (int j = 0; j < tiles; ++j) {
    wait_copies<kStages<kDim> - 2>();
    __syncthreads();  // K of tile j is there, and nobody needs V of tile j - 1 any more
    copy_values(j + kStages<kDim> / 2 - 1);
    float own[2][4];
    score_positions<T, kDim>(
        stage(2 * j), warp * 16,
        [&](int k, uint32_t (&a)[4]) {
#pragma unroll
          for (int i = 0; i < 4; ++i) a[i] = query[k][i];
        },
        own);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      *score_pair(g, warp * 16 + n * 8) = make_float2(own[n][0], own[n][1]);
      *score_pair(g + 8, warp * 16 + n * 8) = make_float2(own[n][2], own[n][3]);
    }
    wait_copies<kStages<kDim> - 2>();
    __syncthreads();  // V of tile j and all of its scores are there, and nobody needs its K any more
    copy_keys(j + kStages<kDim> / 2);
    float score[kKeyTile / 8][4];
#pragma unroll
    for (int n = 0; n < kKeyTile / 8; ++n) {
      const float2 first = *score_pair(g, n * 8), second = *score_pair(g + 8, n * 8);
      score[n][0] = first.x;
      score[n][1] = first.y;
      score[n][2] = second.x;
      score[n][3] = second.y;
    }
    const int seen = context - position(j);
    if (seen < kKeyTile) hide_unseen(score, seen, seen);
    uint32_t weight[kKeyTile / 16][4];
    soften<T>(score, shape.scale, segment, weight);
    weigh_values<T, kDim>(stage(2 * j + 1), warp * kColumns, weight, segment);

    if ((j + 1) % kSegmentTiles != 0 && j + 1 != tiles) continue;
    if (alone) {
      merged.merge(segment);
    } else {
      const int s = split + j / kSegmentTiles * stride;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (g + 8 * h >= heads) continue;
        float* to = partials_of_row + ((g + 8 * h) * segments + s) * partial;
        if (panel == 0 && warp == 0 && t == 0) {
          *reinterpret_cast<float2*>(to + row_elements) = make_float2(segment.max[h], segment.sum[2 * h]);
        }
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
          const int column = first_column + 8 * n;
          if (column < row_elements) {
            *reinterpret_cast<float2*>(to + column) = make_float2(segment.out[n][2 * h], segment.out[n][2 * h + 1]);
          }
        }
      }
    }
    segment.clear();
  }

  T* output = static_cast<T*>(shape.output) + row.first * shape.ld_output;
  if (alone) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (g + 8 * h >= heads) continue;
      T* vector = output + (first_head + g + 8 * h) * shape.head_dim;
      const float inverse = 1.0f / merged.sum[h];
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        store_pair(vector, first_column + 8 * n, shape.head_dim, finish(merged.out[n][2 * h], inverse),
                   finish(merged.out[n][2 * h + 1], inverse));
      }
    }
    return;
  }

  __threadfence();
  __syncthreads();
  int last = 0;
  if (threadIdx.x == 0) {
    int32_t* counter = partials.counters + static_cast<int64_t>(blockIdx.z) * shape.num_heads + first_head;
    last = atomicAdd(counter, 1) == (segments < stride ? segments : stride) * kPanels<kDim> - 1;
    if (last) *counter = 0;
    __threadfence();
  }
  if (!__syncthreads_or(last)) return;

  const int quads = row_elements / 4;
  for (int item = threadIdx.x; item < heads * quads; item += kThreads) {
    const int vector = item / quads, d = item % quads * 4;
    const float* from = partials_of_row + vector * segments * partial;
    float max = kUnseen, sum = 0.0f, total[4] = {};
    for (int first = 0; first < segments; first += kAhead) {
      float2 stat[kAhead];
      float4 out[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (first + i >= segments) continue;
        stat[i] = *reinterpret_cast<const float2*>(from + (first + i) * partial + row_elements);
        out[i] = *reinterpret_cast<const float4*>(from + (first + i) * partial + d);
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (first + i >= segments) continue;
        const Fold fold = fold_segment(stat[i].x, stat[i].y, max, sum);
        total[0] = fold(total[0], out[i].x);
        total[1] = fold(total[1], out[i].y);
        total[2] = fold(total[2], out[i].z);
        total[3] = fold(total[3], out[i].w);
      }
    }
    const float inverse = 1.0f / sum;
    T* to = output + (first_head + vector) * shape.head_dim;
    store_pair(to, d, shape.head_dim, finish(total[0], inverse), finish(total[1], inverse));
    store_pair(to, d + 2, shape.head_dim, finish(total[2], inverse), finish(total[3], inverse));
  }
}

}  // namespace

void attention_decode(DType dtype, const AttentionShape& shape, const DeviceBatch& batch, int64_t splits,
                      void* workspace, cudaStream_t stream) {
  const int64_t segments = ceil_div(batch.max_context, kSegment);  // at most
  auto* counters = static_cast<int32_t*>(workspace);
  const Partials partials = {reinterpret_cast<float*>(counters + kCounters), batch.first_segments, counters};
  const int group = shape.query_group < shape.num_heads ? shape.query_group : shape.num_heads;
  const int passes = static_cast<int>(ceil_div(group, kWarpVectors));
  const auto run = [&](auto kernel, int panels, size_t shared_bytes) {
    const dim3 grid(static_cast<unsigned>(splits < segments ? splits : segments),
                    static_cast<unsigned>(shape.num_kv_heads * passes * panels),
                    static_cast<unsigned>(batch.num_decodes));
    launch(kernel, {grid, dim3(kThreads), shared_bytes, stream, 1, true}, shape, batch.decode_rows, passes, partials);
  };
  const auto run_type = [&](auto element) {
    using T = decltype(element);
    if (shape.row_bytes <= 128) {
      run(decode<T, 64>, kPanels<64>, kSharedBytes<64>);
    } else if (shape.row_bytes <= 256) {
      run(decode<T, 128>, kPanels<128>, kSharedBytes<128>);
    } else {
      run(decode<T, 256>, kPanels<256>, kSharedBytes<256>);
    }
  };
  dtype == DType::kBFloat16 ? run_type(Bf16{}) : run_type(Half{});
}

}  // namespace fastserve::cuda
