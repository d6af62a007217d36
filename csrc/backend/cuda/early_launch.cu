// The trial of kernels that begin early: a chain of them, each of which needs all of the one before.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "backend/cuda/simt.cuh"
#include "backend/cuda/trial_failure.h"

namespace fastserve::cuda {

namespace {

constexpr int kMostDevices = 64;
constexpr int kLeastArchitecture = 90;  // from which on simt.cuh's wait_for_predecessor() is an instruction
std::atomic<bool> early[kMostDevices];

constexpr int kThreads = 128, kBlocks = 40, kLinks = 8, kReplays = 4;
constexpr unsigned kCount = kThreads * kBlocks;

// to[i] = 3 · from[i + a block's and a bit more] + i: what other blocks of the kernel before have written.
__global__ void link_kernel(const unsigned* from, unsigned* to) {
  begin_after_predecessor();
  const unsigned i = blockIdx.x * kThreads + threadIdx.x;
  to[i] = 3 * from[(i + kThreads + 7) % kCount] + i;
}

// The virtual architecture of the code that the device runs, ten times its version: what __CUDA_ARCH__ was when it was
// compiled. That is the PTX's, of which machine code tells too that was made of it, before or by the driver: it is
// below the device's own where FASTSERVE_CUDA_ARCHITECTURES asked for older ones only, and then wait_for_predecessor()
// is empty. All kernels that begin early are compiled for the same as this one (CMakeLists.txt).
int compiled_for() {
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(link_kernel)));
  return attributes.ptxVersion;
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
  const std::unique_ptr<CUgraphExec_st, cudaError_t (*)(cudaGraphExec_t)> owner(executable, cudaGraphExecDestroy);
  for (int replay = 0; replay < kReplays; ++replay) check(cudaGraphLaunch(executable, stream));
  queue_chain(buffers, stream);
  check(cudaStreamSynchronize(stream));
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
  if (const int architecture = compiled_for(); architecture < kLeastArchitecture) {
    return "not used: the kernels were compiled for " + std::to_string(architecture / 10) + "." +
           std::to_string(architecture % 10) + ", where they do not wait for each other";
  }
  early[device] = true;
  try {
    if (chain_is_right(stream)) return "used";
    early[device] = false;
    return "not used: kernels did not wait for each other";
  } catch (const std::exception& error) {
    early[device] = false;
    recover_from_trial(stream, "kernels that begin before the last one's end", error, "FASTSERVE_PDL=0");
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
  if (const auto found = verdicts.find(device); found != verdicts.end()) return found->second;
  std::string verdict = early_launch_trial(stream);
  const char* debug = std::getenv("FASTSERVE_DEBUG");
  if (debug != nullptr && *debug != '\0' && std::string(debug) != "0") {
    std::fprintf(stderr, "kernels that begin before the last one's end: %s\n", verdict.c_str());
  }
  return verdicts.emplace(device, std::move(verdict)).first->second;
}

}  // namespace fastserve::cuda
