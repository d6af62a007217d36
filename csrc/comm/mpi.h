// MPI, which carries what goes between hosts.
//
// The extension is not linked to an MPI library, because it has to work where there is none. mpi.cc is a plugin of its
// own, _mpi, that mpi_plugin.cc loads from beside the extension when it is asked for; a build without MPI has no_mpi.cc
// instead, which says so.
#pragma once

#include <memory>
#include <string>

#include "comm/communicator.h"

namespace fastserve {

// All processes that mpiexec has started, each as rank of MPI_COMM_WORLD, with messages between any two. `host` names
// this host; empty: the system's name. `alarm`: see RoomWatch; negative: none. Nothing of the group has a name in
// /dev/shm any more when this returns. Throws when there is no MPI, and names what is missing.
std::unique_ptr<Communicator> connect_mpi(const std::string& host, const Patience& patience, int alarm);

// The MPI library this was built with, such as "MPICH 5.0.2"; empty: none.
std::string mpi_library();

// What the plugin offers.
extern "C" {
using ConnectMpi = Communicator* (*)(const std::string& host, const Patience& patience, int alarm);
inline constexpr const char* kConnectMpiSymbol = "fastserve_connect_mpi";
}

}  // namespace fastserve
