// The part of NCCL's C interface that is used, as its documentation has it: the same since version 2.14.
#pragma once

#include <cuda_runtime_api.h>

#include <climits>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

namespace fastserve::cuda::nccl {

using Comm = struct ncclComm*;
using Result = int;
inline constexpr Result kSuccess = 0, kInProgress = 7;
inline constexpr int kFloat32 = 7;  // a type of elements

struct UniqueId {
  char bytes[128];
};
// The head of it, which is all that version 2.14 had and all that is set: a communicator whose calls do not block.
struct Config {
  size_t size = sizeof(Config);
  unsigned magic = 0xcafebeef;
  unsigned version = 21400;
  int blocking = 0;
};

struct Library {
  Result (*version)(int* version);
  const char* (*text)(Result result);
  Result (*make_id)(UniqueId* id);
  Result (*join)(Comm* comm, int size, UniqueId id, int rank, Config* config);
  Result (*state)(Comm comm, Result* state);
  Result (*finalize)(Comm comm);
  Result (*destroy)(Comm comm);
  Result (*abort)(Comm comm);
  Result (*all_gather)(const void* mine, void* all, size_t count, int type, Comm comm, cudaStream_t stream);
  Result (*send)(const void* data, size_t count, int type, int to, Comm comm, cudaStream_t stream);
  Result (*receive)(void* data, size_t count, int type, int from, Comm comm, cudaStream_t stream);
};

// libnccl.so.2: what FASTSERVE_NCCL names, or of the system, the toolkit or PyPI's wheel (nvidia-nccl-cu13, -cu12).
// Nothing, and why, where it is not to be used.
std::optional<Library> load(std::string& why_not);

}  // namespace fastserve::cuda::nccl
