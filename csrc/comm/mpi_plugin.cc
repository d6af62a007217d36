// Linked where the build found MPI: loads the plugin that was built with it.
#include <dlfcn.h>

#include "comm/mpi.h"
#include "common/check.h"

namespace fastserve {

std::unique_ptr<Communicator> connect_mpi(const std::string& host, const Patience& patience, int alarm) {
  static const auto connect = [] {
    Dl_info here = {};
    FS_CHECK(dladdr(reinterpret_cast<const void*>(&mpi_library), &here) != 0, "cannot tell where FastServe is");
    const std::string module = here.dli_fname;
    const std::string plugin = module.substr(0, module.rfind('/') + 1) + "_mpi.so";
    // Never unloaded: MPI does not survive it.
    void* library = dlopen(plugin.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (library == nullptr) {
      const std::string reason = dlerror();
      FS_CHECK(false, "MPI cannot be used: ", reason, ". FastServe was built with ", mpi_library(),
               ": install that, or build again with the MPI that is here");
    }
    return reinterpret_cast<ConnectMpi>(dlsym(library, kConnectMpiSymbol));
  }();
  return std::unique_ptr<Communicator>(connect(host, patience, alarm));
}

std::string mpi_library() { return FS_MPI_LIBRARY; }

}  // namespace fastserve
