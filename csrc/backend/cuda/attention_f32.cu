// Attention in float32, where results are to be exact rather than soon: a warp takes a token's head, in prefill and
// decode alike. Segments are cut and merged as in 16 bits; inside one, plain softmax attention, positions ascending.
#include "backend/cuda/attention_kernels.h"
#include "backend/cuda/attention_tile.cuh"

namespace fastserve::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kSegmentPositions = static_cast<int>(kSegment);
constexpr int kLanePositions = kSegmentPositions / kWarp;
constexpr int kLaneDims = static_cast<int>(kMaxHeadDim) / kWarp;

// A warp's share of shared memory: of the positions of a segment.
struct Segment {
  float weight[kSegmentPositions];
  const float* keys[kSegmentPositions];
};

__global__ void __launch_bounds__(kWarps* kWarp)
    attention_by_token(AttentionShape shape, const int32_t* token_rows, int num_tokens) {
  const int lane = threadIdx.x % kWarp;
  const int64_t task = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const int token = static_cast<int>(task / shape.num_heads), head = static_cast<int>(task % shape.num_heads);
  const int row_index = token < num_tokens ? token_rows[token] : -1;
  if (row_index < 0) return;
  const BatchRow row = shape.rows[row_index];
  const int context = row.start + token - row.first + 1;
  const int64_t kv_head = (head + shape.query_offset) / shape.query_group;
  const unsigned char* head_base = shape.pool + 2 * kv_head * shape.head_bytes;
  const int64_t to_values = shape.head_bytes / 4;
  const float* query = static_cast<const float*>(shape.qkv) + token * shape.ld + head * shape.head_dim;
  Segment& segment = shared_memory<Segment>()[threadIdx.x / kWarp];

  float max = kUnseen, sum = 0.0f, total[kLaneDims] = {};
  for (int begin = 0; begin < context; begin += kSegmentPositions) {
    const int seen = context - begin < kSegmentPositions ? context - begin : kSegmentPositions;
    float score[kLanePositions], segment_max = kUnseen, segment_sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kLanePositions; ++i) {
      const int column = i * kWarp + lane, position = begin + column;
      score[i] = kUnseen;
      if (column >= seen) continue;
      const int64_t block = shape.tables[row.table + position / shape.block_size];
      const auto* key = reinterpret_cast<const float*>(
          head_base + block * shape.block_bytes + static_cast<int64_t>(position % shape.block_size) * shape.row_bytes);
      float product = 0.0f;
      for (int d = 0; d < shape.head_dim; ++d) product = fmaf(query[d], key[d], product);
      score[i] = product * shape.scale;
      segment_max = fmaxf(segment_max, score[i]);
      segment.keys[column] = key;
    }
    for (int step = 1; step < kWarp; step *= 2) {
      segment_max = fmaxf(segment_max, __shfl_xor_sync(kAllLanes, segment_max, step));
    }
#pragma unroll
    for (int i = 0; i < kLanePositions; ++i) {
      const float weight = exp2f(score[i] - segment_max);
      segment_sum += weight;
      segment.weight[i * kWarp + lane] = weight;
    }
    for (int step = 1; step < kWarp; step *= 2) segment_sum += __shfl_xor_sync(kAllLanes, segment_sum, step);
    __syncwarp();
    const Fold fold = fold_segment(segment_max, segment_sum, max, sum);
#pragma unroll
    for (int i = 0; i < kLaneDims; ++i) {
      const int d = i * kWarp + lane;
      if (d >= shape.head_dim) continue;
      float out = 0.0f;
      for (int column = 0; column < seen; ++column) {
        out = fmaf(segment.weight[column], segment.keys[column][to_values + d], out);
      }
      total[i] = fold(total[i], out);
    }
    __syncwarp();  // nobody needs the segment any more
  }
  float* output = static_cast<float*>(shape.output) + token * shape.ld_output + head * shape.head_dim;
  const float inverse = 1.0f / sum;
#pragma unroll
  for (int i = 0; i < kLaneDims; ++i) {
    const int d = i * kWarp + lane;
    if (d < shape.head_dim) output[d] = finish(total[i], inverse);
  }
}

}  // namespace

void attention_f32(const AttentionShape& shape, const int32_t* token_rows, int64_t num_tokens, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(num_tokens * shape.num_heads, kWarps)));
  launch(attention_by_token, {grid, dim3(kWarps * kWarp), kWarps * sizeof(Segment), stream}, shape, token_rows,
         static_cast<int>(num_tokens));
}

}  // namespace fastserve::cuda
