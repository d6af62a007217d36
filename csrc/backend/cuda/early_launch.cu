// The trial of kernels that begin early: a chain of them, each of which needs all of the one before.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <vector>

#include "backend/cuda/simt.cuh"

namespace fastserve::cuda {

namespace {

constexpr int kMostDevices = 64;
std::atomic<bool> early[kMostDevices];

constexpr int kThreads = 128, kBlocks = 40, kLinks = 8, kReplays = 4;
constexpr unsigned kCount = kThreads * kBlocks;

// to[i] = 3 · from[i + a block's and a bit more] + i: what other blocks of the kernel before have written.
__global__ void link_kernel(const unsigned* from, unsigned* to) {
  begin_after_predecessor();
  const unsigned i = blockIdx.x * kThreads + threadIdx.x;
  to[i] = 3 * from[(i + kThreads + 7) % kCount] + i;
}

void queue_chain(const Memory (&buffers)[2], cudaStream_t stream) {
  for (int link = 0; link < kLinks; ++link) {
    launch(link_kernel, {dim3(kBlocks), dim3(kThreads), 0, stream, 1, true}, buffers[link % 2].as<unsigned>(),
           buffers[(link + 1) % 2].as<unsigned>());
  }
}

// Whether the chain, replayed from a graph, gives what it should.
bool chain_is_right(cudaStream_t stream) {
  const Memory buffers[2] = {Memory(Place::kDevice, kCount * sizeof(unsigned)),
                             Memory(Place::kDevice, kCount * sizeof(unsigned))};
  cudaGraph_t graph = nullptr;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  try {
    queue_chain(buffers, stream);
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
  for (int replay = 0; replay < kReplays; ++replay) check(cudaGraphLaunch(executable, stream));
  queue_chain(buffers, stream);
  check(cudaStreamSynchronize(stream));
  static_cast<void>(cudaGraphExecDestroy(executable));
  std::vector<unsigned> expected(kCount, 0), next(kCount), found(kCount);
  for (int link = 0; link < kLinks * (kReplays + 1); ++link) {
    for (unsigned i = 0; i < kCount; ++i) next[i] = 3 * expected[(i + kThreads + 7) % kCount] + i;
    expected.swap(next);
  }
  static_assert(kLinks % 2 == 0);  // so that every chain ends where the next begins
  check(cudaMemcpy(found.data(), buffers[0].as<void>(), kCount * sizeof(unsigned), cudaMemcpyDeviceToHost));
  return found == expected;
}

}  // namespace

std::string early_launch_trial(cudaStream_t stream) {
  int device = 0;
  check(cudaGetDevice(&device));
  if (device < kMostDevices) early[device] = false;
  const char* wanted = std::getenv("FASTSERVE_PDL");
  if (wanted != nullptr && std::string(wanted) == "0") return "not used: FASTSERVE_PDL is 0";
  int major = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  if (major < 9 || device >= kMostDevices) return "not used: the device's compute capability is below 9.0";
  early[device] = true;
  try {
    if (chain_is_right(stream)) return "used";
    early[device] = false;
    return "not used: kernels did not wait for each other";
  } catch (const std::exception& error) {  // one that lasts comes up again with the next call
    early[device] = false;
    static_cast<void>(cudaGetLastError());
    return std::string("not used: ") + error.what();
  }
}

bool kernels_begin_early() {
  int device = 0;
  check(cudaGetDevice(&device));
  return device < kMostDevices && early[device];
}

const std::string& try_early_launches(cudaStream_t stream) {
  static std::mutex mutex;
  static std::map<int, std::string> verdicts;
  int device = 0;
  check(cudaGetDevice(&device));
  const std::lock_guard lock(mutex);
  const auto [found, is_new] = verdicts.try_emplace(device);
  if (is_new) {
    found->second = early_launch_trial(stream);
    const char* debug = std::getenv("FASTSERVE_DEBUG");
    if (debug != nullptr && *debug != '\0' && std::string(debug) != "0") {
      std::fprintf(stderr, "kernels that begin before the last one's end: %s\n", found->second.c_str());
    }
  }
  return found->second;
}

}  // namespace fastserve::cuda
