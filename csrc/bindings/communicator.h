// A communicator as Python holds it.
#pragma once

#include <pybind11/pybind11.h>
#include <unistd.h>

#include <memory>
#include <utility>

#include "comm/acknowledgement.h"
#include "comm/communicator.h"

namespace fastserve {

struct PyCommunicator {
  std::unique_ptr<Communicator> communicator;
  Acknowledgements acknowledgements;
  const pid_t process = getpid();

  explicit PyCommunicator(std::unique_ptr<Communicator> given) : communicator(std::move(given)) {}
  ~PyCommunicator() {
    if (getpid() != process) static_cast<void>(communicator.release());  // after a fork: the parent's
    pybind11::gil_scoped_release release;
    communicator.reset();
  }
};

}  // namespace fastserve
