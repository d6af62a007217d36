#include "backend/cuda/nccl_library.h"

#include <dlfcn.h>

#include <cstdlib>
#include <vector>

namespace fastserve::cuda::nccl {

namespace {

constexpr char kName[] = "libnccl.so.2";
constexpr char kInWheel[] = "/nvidia/nccl/lib/libnccl.so.2";

// Where the loader looks, beside this package, among those that it was built with, and in the toolkit.
std::vector<std::string> places() {
  std::vector<std::string> found{kName};
  Dl_info here = {};
  if (dladdr(reinterpret_cast<const void*>(&load), &here) != 0) {
    const std::string module = here.dli_fname;
    found.push_back(module.substr(0, module.rfind('/') + 1) + ".." + kInWheel);
  }
#ifdef FS_PYTHON_PACKAGES
  found.push_back(std::string(FS_PYTHON_PACKAGES) + kInWheel);
#endif
  found.push_back(std::string("/usr/local/cuda/lib64/") + kName);
  return found;
}

template <class Function>
bool find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  return function != nullptr;
}

bool find_all(void* library, Library& found) {
  return find(library, "ncclGetVersion", found.version) && find(library, "ncclGetErrorString", found.text) &&
         find(library, "ncclGetUniqueId", found.make_id) && find(library, "ncclCommInitRankConfig", found.join) &&
         find(library, "ncclCommGetAsyncError", found.state) && find(library, "ncclCommFinalize", found.finalize) &&
         find(library, "ncclCommDestroy", found.destroy) && find(library, "ncclCommAbort", found.abort) &&
         find(library, "ncclAllGather", found.all_gather) && find(library, "ncclSend", found.send) &&
         find(library, "ncclRecv", found.receive);
}

}  // namespace

std::optional<Library> load(std::string& why_not) {
  const char* set = std::getenv("FASTSERVE_NCCL");
  const std::string named = set == nullptr ? "" : set;
  if (named == "0") {
    why_not = "FASTSERVE_NCCL=0";
    return std::nullopt;
  }
  why_not = std::string("there is no ") + (named.empty() ? kName : named);
  for (const std::string& place : named.empty() ? places() : std::vector{named}) {
    void* library = dlopen(place.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (library == nullptr) continue;
    Library found;
    if (find_all(library, found)) return found;
    why_not = place + " is older than NCCL 2.14";
  }
  return std::nullopt;
}

}  // namespace fastserve::cuda::nccl
