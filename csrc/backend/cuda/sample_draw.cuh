// One token of a row by its weights: top-k, top-p and the draw, by one block.
#pragma once

#include "backend/cuda/sample.cuh"
#include "backend/cuda/select.cuh"

namespace fastserve::cuda {

constexpr int kListed = 8192;  // candidates that are copied to shared memory

struct DrawScratch {
  SelectScratch select;
  int32_t listed;
  int32_t tokens[kListed];
  float logits[kListed];
};

// Philox4x32-10, as model/philox.h has it: 53 bits for one (seed, output index).
__device__ __forceinline__ uint64_t random_bits(uint64_t seed, uint64_t index) {
  uint32_t c0 = static_cast<uint32_t>(index), c1 = static_cast<uint32_t>(index >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * c0, b = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return (static_cast<uint64_t>(c1) << 32 | c0) >> 11;
}

// ⌊uniform · total⌋: a running sum exceeds it exactly where it exceeds the product.
__device__ __forceinline__ uint64_t random_below(uint64_t total, const SampleRow& row) {
  const uint64_t bits = random_bits(row.seed, static_cast<uint64_t>(row.output_index));
  return static_cast<uint64_t>((static_cast<unsigned __int128>(bits) * total) >> 53);
}

__device__ __forceinline__ int bits_for(int64_t count) { return kWarp - __clz(static_cast<int>(count - 1)); }

// Candidates of a row in shared memory.
struct ListedLogits {
  const DrawScratch& scratch;

  // Calls visit(token, logit) for those of this thread that are not below `low`.
  template <class Visit>
  __device__ __forceinline__ void each(float low, Visit visit) const {
    for (int i = static_cast<int>(threadIdx.x); i < scratch.listed; i += kSelectThreads) {
      if (scratch.logits[i] >= low) visit(scratch.tokens[i], scratch.logits[i]);
    }
  }
};

// The whole row, where they are too many.
struct AllLogits {
  RowLogits logits;
  const GroupStats* stats;
  int groups;

  template <class Visit>
  __device__ __forceinline__ void each(float low, Visit visit) const {
    for (int g = static_cast<int>(threadIdx.x) / kWarp; g < groups; g += kSelectThreads / kWarp) {
      if (logit_of(stats[g].best) < low) continue;
      float x[kPerLane];
      logits.load_group(x, g);
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        if (x[i] >= low) visit(RowLogits::token(g, i), x[i]);
      }
    }
  }
};

// What the histogram says of all candidates, those not below the cut of Weights.
struct Totals {
  uint64_t mass;
  uint64_t count;
};

__device__ __forceinline__ uint64_t nucleus_target(float top_p, uint64_t total) {
  const double exact = static_cast<double>(top_p) * static_cast<double>(total);
  auto target = static_cast<uint64_t>(exact);
  if (static_cast<double>(target) < exact) ++target;
  return target < 1 ? 1 : target < total ? target : total;
}

__device__ __forceinline__ bool cuts_by_count(const SampleRow& row, const SampleCall& call, const Totals& totals) {
  return row.top_k > 0 && row.top_k < call.vocab && static_cast<uint64_t>(row.top_k) < totals.count;
}

// The token of a row that is cut by top-k, top-p or both; `source` has at least those that stay.
template <class Source>
__device__ __forceinline__ int draw_truncated(DrawScratch& scratch, const SampleCall& call, const SampleRow& row,
                                              const Weights& weights, const Totals& totals, const Source& source) {
  SelectScratch& select_scratch = scratch.select;
  const auto sum = [&](float low, auto value_of) {
    uint64_t total = 0;
    source.each(low, [&](int, float logit) { total += value_of(logit); });
    return block_reduce(total, uint64_t{0}, Sum{}, select_scratch.sums);
  };
  const int depth_bits = weights.depth_bits(), token_bits = bits_for(call.vocab);
  float cut = weights.cut();
  int last = static_cast<int>(call.vocab);  // of those equal to the cut, the last token that stays
  uint64_t mass = totals.mass;
  if (cuts_by_count(row, call, totals)) {
    const Selected kth = select(select_scratch, depth_bits, static_cast<uint64_t>(row.top_k) - 1, [&](auto visit) {
      source.each(weights.cut(), [&](int, float logit) { visit(weights.depth_of(logit), uint64_t{1}); });
    });
    cut = weights.at_depth(kth.key);
    mass = sum(cut, [&](float logit) { return weights.of(logit); });
  }
  if (row.top_p < 1.0f) {
    const uint64_t target = nucleus_target(row.top_p, mass);
    const Selected edge = select(select_scratch, depth_bits, target - 1, [&](auto visit) {
      source.each(cut, [&](int, float logit) { visit(weights.depth_of(logit), weights.of(logit)); });
    });
    cut = weights.at_depth(edge.key);
    const uint64_t weight = weights.of(cut);
    const uint64_t needed = (target - edge.below + weight - 1) / weight;
    mass = edge.below + needed * weight;
    const uint64_t equals = sum(cut, [&](float logit) { return uint64_t{logit == cut}; });
    if (needed < equals) {
      last = static_cast<int>(select(select_scratch, token_bits, needed - 1, [&](auto visit) {
                                source.each(cut, [&](int token, float logit) {
                                  if (logit == cut) visit(static_cast<uint32_t>(token), uint64_t{1});
                                });
                              }).key);
    }
  }
  const Selected drawn = select(select_scratch, token_bits, random_below(mass, row), [&](auto visit) {
    source.each(cut, [&](int token, float logit) {
      if (logit > cut || token <= last) visit(static_cast<uint32_t>(token), weights.of(logit));
    });
  });
  return static_cast<int>(drawn.key);
}

// The token of a row of which everything stays that its cut leaves.
__device__ __forceinline__ int draw_plain(SelectScratch& scratch, const SampleRow& row, const Weights& weights,
                                          const RowLogits& logits, const uint64_t* masses, int groups, int vocab) {
  const int thread = static_cast<int>(threadIdx.x);
  uint64_t mass = 0;
  for (int g = thread; g < groups; g += kSelectThreads) mass += masses[g];
  mass = block_reduce(mass, uint64_t{0}, Sum{}, scratch.sums);
  const uint64_t target = random_below(mass, row);
  const Selected group = select(scratch, bits_for(groups), target, [&](auto visit) {
    for (int g = thread; g < groups; g += kSelectThreads) visit(static_cast<uint32_t>(g), masses[g]);
  });
  static_assert(kTokenGroup == kSelectThreads);
  const int first = static_cast<int>(group.key) * kTokenGroup;
  const float logit = first + thread < vocab ? logits.at(first + thread) : -INFINITY;
  const uint64_t weight = logit >= weights.cut() ? weights.of(logit) : 0;
  return first +
         static_cast<int>(find_exceeding<kTokenGroup>(scratch, target - group.below, [&](int) { return weight; }).key);
}

// The token of a row by its weights.
__device__ __forceinline__ int draw(DrawScratch& scratch, const SampleArguments& arguments, const SampleRow& row,
                                    int64_t index, float maximum) {
  const SampleCall& call = arguments.call;
  const int groups = arguments.work.groups, thread = static_cast<int>(threadIdx.x);
  const Weights weights(row, maximum);
  const RowLogits logits(call, row, true);
  if (!truncates(row, call.vocab)) {
    return draw_plain(scratch.select, row, weights, logits, arguments.work.masses + index * groups, groups,
                      static_cast<int>(call.vocab));
  }

  const uint32_t* counts = arguments.work.bin_count + index * kBins;
  const unsigned long long* masses = arguments.work.bin_mass + index * kBins;
  Totals totals{0, 0};
  for (int b = thread; b < kBins; b += kSelectThreads) {
    totals.mass += masses[b];
    totals.count += counts[b];
  }
  totals.mass = block_reduce(totals.mass, uint64_t{0}, Sum{}, scratch.select.sums);
  totals.count = block_reduce(totals.count, uint64_t{0}, Sum{}, scratch.select.sums);

  // The last bin of which something stays. By top-k first, whose total top-p takes its share of.
  const auto count_of = [&](int b) { return uint64_t{counts[b]}; };
  uint32_t last_bin = kBins - 1;
  if (cuts_by_count(row, call, totals)) {
    last_bin = find_exceeding<kBins>(scratch.select, static_cast<uint64_t>(row.top_k) - 1, count_of).key;
  } else if (row.top_p < 1.0f) {
    last_bin = find_exceeding<kBins>(scratch.select, nucleus_target(row.top_p, totals.mass) - 1, [&](int b) {
                 return uint64_t{masses[b]};
               }).key;
  }
  uint64_t candidates = 0;
  for (int b = thread; b <= static_cast<int>(last_bin); b += kSelectThreads) candidates += count_of(b);
  candidates = block_reduce(candidates, uint64_t{0}, Sum{}, scratch.select.sums);
  const AllLogits all{logits, arguments.work.stats + index * groups, groups};
  if (candidates > kListed) return draw_truncated(scratch, call, row, weights, totals, all);

  if (thread == 0) scratch.listed = 0;
  __syncthreads();
  all.each(weights.cut(), [&](int token, float logit) {
    if (weights.bin_of(logit) > static_cast<int>(last_bin)) return;
    const int place = atomicAdd(&scratch.listed, 1);
    scratch.tokens[place] = token;
    scratch.logits[place] = logit;
  });
  __syncthreads();
  return draw_truncated(scratch, call, row, weights, totals, ListedLogits{scratch});
}

}  // namespace fastserve::cuda
