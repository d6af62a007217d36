#include "backend/cuda/graphs.h"

#include <algorithm>

#include "backend/cuda/runtime_api.h"

namespace fastserve::cuda {

namespace {
constexpr size_t kMostGraphs = 96;  // some megabytes each
}

void Graphs::run(const Key& key, cudaStream_t stream, const std::function<void()>& body) {
  auto [entry, is_new] = graphs_.try_emplace(key);
  entry->second.used = ++runs_;
  if (is_new) {
    if (graphs_.size() > kMostGraphs) drop_oldest();
    try {
      return body();
    } catch (...) {  // before all was allocated, perhaps
      graphs_.erase(key);
      throw;
    }
  }
  if (entry->second.executable == nullptr) entry->second.executable = record(stream, body);
  check(cudaGraphLaunch(entry->second.executable, stream));
}

cudaGraphExec_t Graphs::record(cudaStream_t stream, const std::function<void()>& body) {
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  cudaGraph_t graph = nullptr;
  try {
    body();
  } catch (...) {
    static_cast<void>(cudaStreamEndCapture(stream, &graph));
    if (graph != nullptr) static_cast<void>(cudaGraphDestroy(graph));
    throw;
  }
  check(cudaStreamEndCapture(stream, &graph));
  cudaGraphExec_t executable = nullptr;
  const cudaError_t status = cudaGraphInstantiate(&executable, graph, 0);
  static_cast<void>(cudaGraphDestroy(graph));
  check(status);
  return executable;
}

void Graphs::drop_oldest() {
  const auto oldest = std::ranges::min_element(graphs_, {}, [](const auto& entry) { return entry.second.used; });
  if (oldest->second.executable != nullptr) static_cast<void>(cudaGraphExecDestroy(oldest->second.executable));
  graphs_.erase(oldest);
}

void Graphs::clear() {
  for (auto& [key, graph] : graphs_) {
    if (graph.executable != nullptr) static_cast<void>(cudaGraphExecDestroy(graph.executable));
  }
  graphs_.clear();
}

}  // namespace fastserve::cuda
