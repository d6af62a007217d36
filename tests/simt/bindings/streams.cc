// CUDA's runtime as Python objects, for tests of the fake one: thin, so that a test can do what is wrong.
#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "backend/cuda/runtime_api.h"
#include "examples/examples.h"
#include "fake_cudart/launch.h"
#include "register_all.h"

namespace fastserve::cuda {

namespace py = pybind11;

namespace {

// A graph that was captured.
class Graph {
 public:
  explicit Graph(cudaGraph_t graph) {
    const cudaError_t status = cudaGraphInstantiate(&executable_, graph, 0);
    static_cast<void>(cudaGraphDestroy(graph));
    check(status);
  }
  ~Graph() { static_cast<void>(cudaGraphExecDestroy(executable_)); }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  void launch(const Stream& stream) const { check(cudaGraphLaunch(executable_, stream)); }

 private:
  cudaGraphExec_t executable_ = nullptr;
};

char* at(const Memory& memory, size_t offset) { return memory.as<char>() + offset; }

void copy(const Memory& to, size_t to_offset, const Memory& from, size_t from_offset, size_t bytes,
          const Stream& stream) {
  check(cudaMemcpyAsync(at(to, to_offset), at(from, from_offset), bytes, cudaMemcpyDefault, stream));
}

// c = a + b of float32, whose ranges are told to the fake runtime.
void add(const Memory& a, const Memory& b, const Memory& c, const Stream& stream) {
  for (const Memory* read : {&a, &b}) fake_cudart::next_launch_reads(read->as<void>(), read->bytes());
  fake_cudart::next_launch_writes(c.as<void>(), c.bytes());
  example_add(DType::kFloat32, a.as<void>(), b.as<void>(), c.as<void>(), static_cast<int64_t>(c.bytes() / 4), stream);
}

// The host's function runs with the interpreter's lock; the object that holds it is freed by it.
void host_function(const Stream& stream, std::function<void()> function) {
  auto* held = new std::function<void()>(std::move(function));
  const cudaHostFn_t call = [](void* argument) {
    const py::gil_scoped_acquire locked;
    const std::unique_ptr<std::function<void()>> owned(static_cast<std::function<void()>*>(argument));
    (*owned)();
  };
  check(cudaLaunchHostFunc(stream, call, held));
}

// Host threads that each copy back and forth on their own streams; whether every one got back what it sent.
bool hammer(int threads, int rounds) {
  std::vector<std::thread> workers;
  std::vector<char> right(static_cast<size_t>(threads), 0);
  for (int t = 0; t < threads; ++t) {
    workers.emplace_back([t, rounds, &right] {
      const Stream up, down;
      const Event uploaded, downloaded;
      const Memory from(Place::kPinned, 64), device(Place::kDevice, 64), to(Place::kPinned, 64);
      bool all = true;
      for (int round = 0; round < rounds; ++round) {
        from.as<int>()[0] = t * 1000 + round;
        if (round > 0) check(cudaStreamWaitEvent(up, downloaded));
        copy(device, 0, from, 0, 64, up);
        uploaded.record(up);
        check(cudaStreamWaitEvent(down, uploaded));
        copy(to, 0, device, 0, 64, down);
        downloaded.record(down);
        downloaded.synchronize();
        all = all && to.as<int>()[0] == t * 1000 + round;
      }
      right[static_cast<size_t>(t)] = all;
    });
  }
  for (std::thread& worker : workers) worker.join();
  return std::find(right.begin(), right.end(), 0) == right.end();
}

void write(const Memory& memory, const py::array_t<float>& values) {
  check(cudaMemcpy(memory.as<void>(), values.data(), static_cast<size_t>(values.nbytes()), cudaMemcpyDefault));
}

}  // namespace

void register_streams(py::module_& module) {
  using namespace pybind11::literals;
  using unlocked = py::call_guard<py::gil_scoped_release>;
  py::class_<Memory>(module, "Memory")
      .def(py::init([](bool pinned, size_t bytes) {
             return std::make_unique<Memory>(pinned ? Place::kPinned : Place::kDevice, bytes);
           }),
           "pinned"_a, "bytes"_a)
      // Reads and writes of pinned memory are the host's own; those of the device's wait for everything before them on
      // the default stream, and for nothing else.
      .def("write",
           [](const Memory& memory, const py::array_t<float>& values) {
             write(memory, values);
             check(cudaStreamSynchronize(nullptr));
           })
      // Which other streams may not see yet.
      .def("begin_write", write)
      .def("read",
           [](const Memory& memory) {
             py::array_t<float> values(static_cast<py::ssize_t>(memory.bytes() / 4));
             check(cudaMemcpy(values.mutable_data(), memory.as<void>(), memory.bytes(), cudaMemcpyDefault));
             return values;
           })
      .def("free", [](Memory& memory) { memory = Memory(); });
  py::class_<Stream>(module, "Stream")
      .def(py::init<>())
      .def("synchronize", &Stream::synchronize, unlocked())
      .def("query", [](const Stream& stream) { return cudaStreamQuery(stream) == cudaSuccess; })
      .def("wait", [](const Stream& stream, const Event& event) { check(cudaStreamWaitEvent(stream, event)); })
      .def("begin_capture",
           [](const Stream& stream) { check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal)); })
      .def("end_capture", [](const Stream& stream) {
        cudaGraph_t graph = nullptr;
        check(cudaStreamEndCapture(stream, &graph));
        return std::make_unique<Graph>(graph);
      });
  py::class_<Event>(module, "Event")
      .def(py::init<>())
      .def("record", [](const Event& event, const Stream& stream) { event.record(stream); })
      .def("synchronize", &Event::synchronize, unlocked())
      .def("query", [](const Event& event) { return cudaEventQuery(event) == cudaSuccess; });
  py::class_<Graph>(module, "Graph").def("launch", &Graph::launch);
  module.def("copy", copy, "to"_a, "to_offset"_a, "source"_a, "source_offset"_a, "bytes"_a, "stream"_a);
  module.def("copy_unpinned", [](const Memory& to, const py::array_t<float>& values, const Stream& stream) {
    check(cudaMemcpyAsync(to.as<void>(), values.data(), static_cast<size_t>(values.nbytes()), cudaMemcpyHostToDevice,
                          stream));
  });
  module.def("clear", [](const Memory& memory, const Stream& stream) {
    check(cudaMemsetAsync(memory.as<void>(), 0, memory.bytes(), stream));
  });
  module.def("add", add, "a"_a, "b"_a, "c"_a, "stream"_a);
  module.def("host_function", host_function, "stream"_a, "function"_a);
  module.def("set_device", [](int device) { check(cudaSetDevice(device)); }, "device"_a);
  module.def("synchronize", [] { check(cudaDeviceSynchronize()); }, unlocked());
  module.def("memory_info", [] {
    size_t free = 0, total = 0;
    check(cudaMemGetInfo(&free, &total));
    return py::make_tuple(free, total);
  });
  module.def("hammer", hammer, "threads"_a, "rounds"_a, unlocked());
}

}  // namespace fastserve::cuda
