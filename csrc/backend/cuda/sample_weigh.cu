// What the logits weigh: the sum of each group, or a histogram of the row where top-k or top-p cut.
#include "backend/cuda/histogram.cuh"
#include "backend/cuda/sample.cuh"

namespace fastserve::cuda {

namespace {

constexpr int kThreads = 512;
constexpr int kBlockGroups = 32;

struct Shared {
  uint64_t scratch[kWarp];
  Histogram<kBins> mass;
  uint32_t count[kBins];
};

// Grid: (groups / kBlockGroups, rows).
__global__ void __launch_bounds__(kThreads) weigh_kernel(SampleArguments arguments) {
  auto& shared = *shared_memory<Shared>();
  const SampleCall& call = arguments.call;
  const SampleWorkspace& work = arguments.work;
  const int64_t index = blockIdx.y;
  const SampleRow row = call.rows[index];
  if (row.logits < 0 || row.scale == 0.0f) return;
  const GroupStats* stats = work.stats + index * work.groups;
  const Summary summary = summarize(stats, work.groups, shared.scratch);
  if (summary.error != SampleError::kNone) return;
  const Weights weights(row, logit_of(summary.best));
  const RowLogits logits(call, row, true);
  const bool binned = truncates(row, call.vocab);
  const int thread = static_cast<int>(threadIdx.x);
  if (binned) {
    shared.mass.clear();
    for (int b = thread; b < kBins; b += kThreads) shared.count[b] = 0;
    __syncthreads();
  }
  const int first = static_cast<int>(blockIdx.x) * kBlockGroups;
  const int end = first + kBlockGroups < work.groups ? first + kBlockGroups : work.groups;
  for (int group = first + thread / kWarp; group < end; group += kThreads / kWarp) {
    uint64_t sum = 0;
    if (logit_of(stats[group].best) >= weights.cut()) {
      float x[kPerLane];
      logits.load_group(x, group);
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        if (x[i] < weights.cut()) continue;
        const uint64_t weight = weights.of(x[i]);
        sum += weight;
        if (!binned) continue;
        const int bin = weights.bin_of(x[i]);
        shared.mass.add(bin, weight);
        atomicAdd(&shared.count[bin], 1u);
      }
    }
    if (binned) continue;
    sum = warp_reduce(sum, Sum{});
    if (thread % kWarp == 0) work.masses[index * work.groups + group] = sum;
  }
  if (!binned) return;
  __syncthreads();
  for (int b = thread; b < kBins; b += kThreads) {
    if (shared.count[b] == 0) continue;
    atomicAdd(&work.bin_count[index * kBins + b], shared.count[b]);
    atomicAdd(&work.bin_mass[index * kBins + b], static_cast<unsigned long long>(shared.mass.at(b)));
  }
}

}  // namespace

void weigh(const SampleArguments& arguments, cudaStream_t stream) {
  launch(weigh_kernel,
         {.grid = dim3(static_cast<unsigned>(ceil_div(arguments.work.groups, kBlockGroups)),
                       static_cast<unsigned>(arguments.call.num_rows)),
          .block = dim3(kThreads),
          .shared_bytes = sizeof(Shared),
          .stream = stream},
         arguments);
}

}  // namespace fastserve::cuda
