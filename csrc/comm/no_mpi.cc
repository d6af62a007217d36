// Linked where the build found no MPI.
#include "comm/mpi.h"
#include "common/check.h"

namespace fastserve {

std::unique_ptr<Communicator> connect_mpi(const std::string&, const Patience&, int) {
  FS_CHECK(false,
           "this process was started as one of several by an MPI launcher, but FastServe was built without MPI: "
           "install the mpich or openmpi package (or a system MPI) and build again");
}

std::string mpi_library() { return {}; }

}  // namespace fastserve
