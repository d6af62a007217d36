// What nccl_library.h says of NCCL, beside the library's own header; linked with the library, which must have it all.
#include <nccl.h>

#include <cstddef>

#include "backend/cuda/nccl_library.h"
#include "libraries/calls.h"

namespace fastserve::cuda::nccl {

static_assert(kSuccess == ncclSuccess && kInProgress == ncclInProgress && kFloat32 == ncclFloat32);
static_assert(sizeof(UniqueId) == sizeof(ncclUniqueId));
// Theirs may have grown; `size` tells which of it is set.
static_assert(sizeof(Config) <= sizeof(ncclConfig_t) && offsetof(Config, size) == offsetof(ncclConfig_t, size) &&
              offsetof(Config, magic) == offsetof(ncclConfig_t, magic) &&
              offsetof(Config, version) == offsetof(ncclConfig_t, version) &&
              offsetof(Config, blocking) == offsetof(ncclConfig_t, blocking));
constexpr ncclConfig_t kTheirs = NCCL_CONFIG_INITIALIZER;
static_assert(Config{}.magic == kTheirs.magic && Config{}.version <= kTheirs.version);

Library linked() {
  return {.version = called_as<decltype(Library::version)>(&ncclGetVersion),
          .text = called_as<decltype(Library::text)>(&ncclGetErrorString),
          .make_id = called_as<decltype(Library::make_id)>(&ncclGetUniqueId),
          .join = called_as<decltype(Library::join)>(&ncclCommInitRankConfig),
          .state = called_as<decltype(Library::state)>(&ncclCommGetAsyncError),
          .finalize = called_as<decltype(Library::finalize)>(&ncclCommFinalize),
          .destroy = called_as<decltype(Library::destroy)>(&ncclCommDestroy),
          .abort = called_as<decltype(Library::abort)>(&ncclCommAbort),
          .all_gather = called_as<decltype(Library::all_gather)>(&ncclAllGather),
          .send = called_as<decltype(Library::send)>(&ncclSend),
          .receive = called_as<decltype(Library::receive)>(&ncclRecv)};
}

}  // namespace fastserve::cuda::nccl
