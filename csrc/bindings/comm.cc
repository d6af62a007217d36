#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <utility>

#include "bindings/arrays.h"
#include "bindings/communicator.h"
#include "bindings/plan.h"
#include "bindings/register.h"
#include "comm/across_hosts.h"
#include "comm/mpi.h"
#include "comm/mpi_memory.h"
#include "comm/plan_wire.h"
#include "comm/shared_memory.h"

namespace py = pybind11;

namespace fastserve {

namespace {

// Ends a wait when a signal's handler in Python raises.
void ask_python() {
  py::gil_scoped_acquire hold;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

Patience patience_of(double timeout) {
  FS_CHECK(timeout > 0, "timeout must be a positive number of seconds, got ", timeout);
  return {timeout, ask_python};
}

std::span<std::byte> memory_of(const py::buffer& buffer, bool writable) {
  const py::buffer_info info = buffer.request(writable);
  py::ssize_t expected = info.itemsize;
  for (auto i = info.ndim; i-- > 0; expected *= info.shape[i]) {
    FS_CHECK(info.shape[i] <= 1 || info.strides[i] == expected, "what ranks exchange has to be contiguous memory");
  }
  return {static_cast<std::byte*>(info.ptr), static_cast<size_t>(info.size * info.itemsize)};
}

template <class Make>
std::unique_ptr<PyCommunicator> made(Make&& make) {
  std::unique_ptr<Communicator> communicator;
  {
    py::gil_scoped_release release;
    communicator = make();
  }
  return communicator ? std::make_unique<PyCommunicator>(std::move(communicator)) : nullptr;
}

// A message of which Python holds both ends: its communicator and its memory.
struct PyRequest {
  py::object communicator;
  py::object memory;
  const Request request;

  PyRequest(py::object communicator, py::object memory, Request request)
      : communicator(std::move(communicator)), memory(std::move(memory)), request(std::move(request)) {}
  PyRequest(const PyRequest&) = delete;
  PyRequest& operator=(const PyRequest&) = delete;
  ~PyRequest() {
    if (request && !request->done) static_cast<void>(memory.release());  // somebody may still write there
  }
  Communicator& owner() const { return *communicator.cast<PyCommunicator&>().communicator; }
  bool test() const {
    Communicator& its = owner();
    py::gil_scoped_release release;
    return its.test(*request);
  }
  void wait() const {
    Communicator& its = owner();
    py::gil_scoped_release release;
    its.wait(*request);
  }
};

py::array_t<uint8_t> all_gather(PyCommunicator& self, const py::buffer& mine, std::vector<int64_t> sizes) {
  const auto bytes = memory_of(mine, false);
  if (sizes.empty()) sizes.assign(self.communicator->size(), static_cast<int64_t>(bytes.size()));
  int64_t total = 0;
  for (const int64_t size : sizes) total += std::max<int64_t>(size, 0);
  std::vector<uint8_t> all(total);
  {
    py::gil_scoped_release release;
    self.communicator->all_gather(bytes, std::as_writable_bytes(std::span(all)), sizes);
  }
  return to_array(std::move(all), {static_cast<py::ssize_t>(total)});
}

py::tuple gather_acknowledgements(PyCommunicator& self, int64_t plan_id, double seconds,
                                  const std::vector<std::pair<int32_t, double>>& copies) {
  Acknowledgement own{plan_id, seconds, {}};
  for (const auto& [copy, time] : copies) own.copies.push_back({copy, time});
  {
    py::gil_scoped_release release;
    if (self.communicator->rank() == 0) {
      own = *self.acknowledgements.gather(*self.communicator, own);
    } else {
      send_acknowledgement(*self.communicator, own);
    }
  }
  std::vector<std::pair<int32_t, double>> finished;
  for (const FinishedCopy& copy : own.copies) finished.emplace_back(copy.copy, copy.seconds);
  return py::make_tuple(own.plan_id, own.seconds, finished);
}

}  // namespace

void register_comm(py::module_& module) {
  py::class_<PyRequest>(module, "Request", "A message on its way.")
      .def("test", &PyRequest::test, "Whether it is done.")
      .def("wait", &PyRequest::wait);

  py::class_<PyCommunicator>(module, "Communicator", "Ranks that work on one model (csrc/comm/communicator.h).")
      .def_property_readonly("rank", [](const PyCommunicator& self) { return self.communicator->rank(); })
      .def_property_readonly("size", [](const PyCommunicator& self) { return self.communicator->size(); })
      .def_property_readonly("kind", [](const PyCommunicator& self) { return self.communicator->kind(); })
      .def_property_readonly(
          "members",
          [](const PyCommunicator& self) {
            std::vector<std::tuple<int, int, std::string>> members;
            for (const Member& each : self.communicator->members()) {
              members.emplace_back(each.world_rank, each.process, each.host);
            }
            return members;
          },
          "(rank in the world, process, host) by rank.")
      .def_property_readonly(
          "timeout", [](const PyCommunicator& self) { return self.communicator->patience().seconds; },
          "Seconds that one wait may take.")
      .def(
          "set_timeout",
          [](PyCommunicator& self, double seconds) { self.communicator->set_timeout(patience_of(seconds).seconds); },
          py::arg("seconds"))
      .def(
          "all_reduce_sum",
          [](PyCommunicator& self, Array<float> values) {
            std::span<float> floats(values.mutable_data(), values.size());
            py::gil_scoped_release release;
            self.communicator->all_reduce_sum(floats);
          },
          py::arg("values").noconvert(), "In place: float32, added in rank order.")
      .def("all_gather", &all_gather, py::arg("mine"), py::arg("sizes") = std::vector<int64_t>(),
           "The bytes of all ranks one after another; `sizes` where they differ in length.")
      .def(
          "broadcast",
          [](PyCommunicator& self, const py::buffer& data, int root) {
            const auto bytes = memory_of(data, true);
            py::gil_scoped_release release;
            self.communicator->broadcast(bytes, root);
          },
          py::arg("data"), py::arg("root") = 0, "In place.")
      .def("barrier",
           [](PyCommunicator& self) {
             py::gil_scoped_release release;
             self.communicator->barrier();
           })
      .def(
          "send",
          [](const py::object& self, const py::buffer& data, int to) {
            const auto bytes = memory_of(data, false);
            Communicator& communicator = *self.cast<PyCommunicator&>().communicator;
            return std::make_unique<PyRequest>(self, data, communicator.send(bytes, to));
          },
          py::arg("data"), py::arg("to"))
      .def(
          "receive",
          [](const py::object& self, const py::buffer& data, int from) {
            const auto bytes = memory_of(data, true);
            Communicator& communicator = *self.cast<PyCommunicator&>().communicator;
            return std::make_unique<PyRequest>(self, data, communicator.receive(bytes, from));
          },
          py::arg("data"), py::arg("source"), "Into memory of the message's own length.")
      .def(
          "split",
          [](PyCommunicator& self, int color, int key) {
            return made([&] { return self.communicator->split(color, key); });
          },
          py::arg("color"), py::arg("key") = 0,
          "A communicator of the ranks with the same color, by key and rank; None for a negative color.")
      .def(
          "broadcast_plan",
          [](PyCommunicator& self, const py::object& plan, int root) {
            if (self.communicator->rank() == root) {
              BatchPlan native = read_plan(plan, false);
              py::gil_scoped_release release;
              broadcast_plan(*self.communicator, native, root);
              return py::object(plan);
            }
            BatchPlan native;
            {
              py::gil_scoped_release release;
              broadcast_plan(*self.communicator, native, root);
            }
            return write_plan(native);
          },
          py::arg("plan") = py::none(), py::arg("root") = 0, "The root's plan, on every rank.")
      .def("gather_acknowledgements", &gather_acknowledgements, py::arg("plan_id"), py::arg("seconds") = 0.0,
           py::arg("copies") = std::vector<std::pair<int32_t, double>>(),
           "On rank 0: the plan, the longest time, and the copies that all ranks have finished; elsewhere what was "
           "given.")
      .def(
          "abort",
          [](PyCommunicator& self, const std::string& reason) {
            py::gil_scoped_release release;
            self.communicator->abort(reason);
          },
          py::arg("reason"), "Ends every wait of every rank with a GroupError that says this.")
      .def("close", [](PyCommunicator& self) {
        py::gil_scoped_release release;
        self.communicator->close();
      });

  py::class_<SegmentFile>(module, "SharedMemory", "What ranks of one host share; keep it until they have joined.")
      .def(py::init([](int size) { return make_shared_memory(size); }), py::arg("size"))
      .def_property_readonly("path", &SegmentFile::path);

  constexpr double kForever = std::numeric_limits<double>::infinity();
  module.def(
      "local_communicator",
      [](const std::string& host) { return made([&] { return local_communicator(host, patience_of(kForever)); }); },
      py::arg("host") = "", "One rank by itself.");
  module.def(
      "join_shared_memory",
      [](const std::string& path, int rank, int size, const std::string& host, double timeout) {
        return made(
            [&] { return join_shared_memory(path, rank, size, this_member(rank, host), patience_of(timeout)); });
      },
      py::arg("path"), py::arg("rank"), py::arg("size"), py::arg("host") = "", py::arg("timeout") = kForever,
      "One rank of SharedMemory(size); returns when all have come.");
  module.def("abort_shared_memory", &abort_shared_memory, py::arg("path"), py::arg("size"), py::arg("reason"),
             "Ends the joining and every wait of the ranks of SharedMemory(size) with an Error that says this.");
  module.def(
      "connect_mpi",
      [](const std::string& host, double timeout, int alarm) {
        return made([&] { return across_hosts(connect_mpi(host, patience_of(timeout), alarm)); });
      },
      py::arg("host") = "", py::arg("timeout") = kForever, py::arg("alarm") = -1,
      "All processes that an MPI launcher has started. Ranks on hosts of one name share memory. A thread that "
      "finds no room in /dev/shm stands still, and a byte is written to the descriptor `alarm`.");
  module.def("unlink_mpi_memory", &unlink_mpi_memory, "Takes the names off what this process's MPI has in /dev/shm.");
  module.def(
      "as_if_across_hosts",
      [](PyCommunicator& flat, const std::vector<uint64_t>& machines) {
        return made([&] { return across_hosts(std::move(flat.communicator), machines); });
      },
      py::arg("communicator"), py::arg("machines"),
      "For tests: takes the communicator over, as if rank r were on machine machines[r].");
  module.def("mpi_library", &mpi_library, "The MPI library this was built with; empty: none.");
  module.def(
      "encode_plan",
      [](const py::handle& plan) {
        const auto bytes = encode_plan(read_plan(plan, false));
        return py::bytes(reinterpret_cast<const char*>(bytes.data()), bytes.size());
      },
      py::arg("plan"), "A plan as ranks tell it each other.");
  module.def(
      "decode_plan", [](const py::buffer& bytes) { return write_plan(decode_plan(memory_of(bytes, false))); },
      py::arg("data"), "Raises Error unless it is exactly one plan.");
}

}  // namespace fastserve
