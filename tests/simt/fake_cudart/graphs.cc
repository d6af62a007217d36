#include <algorithm>

#include "fake_cudart/graph.h"
#include "machine/machine.h"

using fake_cudart::Capture;
using fake_cudart::Clock;
using fake_cudart::Device;
using fake_cudart::enter;
using fake_cudart::enter_quietly;
using fake_cudart::error;
using fake_cudart::Graph;
using fake_cudart::Operation;
using fake_cudart::Task;

struct CUgraph_st : Graph {};

struct CUgraphExec_st {
  Graph graph;
  std::vector<size_t> actors;       // of branches other than the first, which is the stream it is launched on
  std::shared_ptr<Operation> last;  // the end of the latest launch: the next one starts after it
};

namespace fake_cudart {

void add_node(CUstream_st* stream, Task task) {
  Graph& graph = stream->capture->graph;
  graph.nodes.push_back({std::move(task), stream->branch, stream->behind});
  stream->behind = {graph.nodes.size() - 1};
}

void follow(CUstream_st* stream, const CUevent_st* event) {
  if (stream->capture == nullptr) {
    stream->capture = event->capture;
    stream->branch = event->capture->streams.size();
    stream->behind.clear();
    event->capture->streams.push_back(stream);
  } else if (stream->capture != event->capture) {
    error("cudaStreamWaitEvent: a stream that is captured waits for an event of another capture");
  }
  stream->behind.insert(stream->behind.end(), event->behind.begin(), event->behind.end());
}

void check_allowed_in_captures(const Device& device, const char* function) {
  for (const Capture* capture : device.captures) {
    const bool applies =
        capture->mode == cudaStreamCaptureModeGlobal ||
        (capture->mode == cudaStreamCaptureModeThreadLocal && capture->thread == std::this_thread::get_id());
    if (applies) error(simt::join(function, " is not allowed while stream ", capture->origin->actor, " is captured"));
  }
}

namespace {

bool is_before_end(const Graph& graph, const std::vector<size_t>& ends, size_t node) {
  std::vector<size_t> open = ends;
  std::set<size_t> seen;
  while (!open.empty()) {
    const size_t at = open.back();
    open.pop_back();
    if (at == node) return true;
    if (!seen.insert(at).second) continue;
    open.insert(open.end(), graph.nodes[at].after.begin(), graph.nodes[at].after.end());
  }
  return false;
}

void launch_graph(Device& self, CUgraphExec_st* executable, CUstream_st* stream) {
  const Graph& graph = executable->graph;
  Clock start = self.host;
  if (stream->last) start.join(stream->last->clock);
  if (executable->last) start.join(executable->last->clock);
  std::vector<std::shared_ptr<Operation>> operations;
  Clock end = start;
  for (const fake_cudart::Node& node : graph.nodes) {
    for (const fake_cudart::Mention& mention : node.task.mentioned) {
      const fake_cudart::Allocation* allocation = self.find(mention.pointer);
      if (allocation == nullptr || allocation->number != mention.allocation) {
        error(simt::join("cudaGraphLaunch: ", node.task.name, " uses memory that was freed"));
      }
    }
    Clock clock = start;
    std::vector<std::shared_ptr<Operation>> after{stream->last, executable->last};
    for (const size_t before : node.after) {
      clock.join(operations[before]->clock);
      after.push_back(operations[before]);
    }
    const size_t actor = node.branch == 0 ? stream->actor : executable->actors[node.branch - 1];
    operations.push_back(self.enqueue(node.task, actor, clock, after));
    end.join(operations.back()->clock);
  }
  operations.push_back(stream->last);
  operations.push_back(executable->last);
  Task task;
  task.name = "the end of a graph";
  stream->last = executable->last = self.enqueue(task, stream->actor, end, operations);
}

}  // namespace
}  // namespace fake_cudart

extern "C" {

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  return enter("cudaStreamBeginCapture", [&](Device& self, Device::Lock&) {
    CUstream_st* stream = self.stream(handle);
    if (stream == self.default_streams[stream->device]) return cudaErrorStreamCaptureUnsupported;
    if (stream->capture) return cudaErrorIllegalState;
    stream->capture = std::make_shared<Capture>(Capture{mode, std::this_thread::get_id(), stream, {stream}, {}});
    stream->branch = 0;
    stream->behind.clear();
    self.captures.insert(stream->capture.get());
    return cudaSuccess;
  });
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  return enter("cudaStreamEndCapture", [&](Device& self, Device::Lock&) {
    CUstream_st* stream = self.stream(handle);
    if (!stream->capture) return cudaErrorIllegalState;
    const std::shared_ptr<Capture> capture = stream->capture;
    if (capture->origin != stream) error("cudaStreamEndCapture: the capture began on another stream");
    if (capture->mode != cudaStreamCaptureModeRelaxed && capture->thread != std::this_thread::get_id()) {
      error("cudaStreamEndCapture: the capture was begun by another host thread");
    }
    const std::vector<size_t> ends = stream->behind;
    self.captures.erase(capture.get());
    std::string left;
    for (CUstream_st* joined : capture->streams) {
      for (const size_t node : joined->behind) {
        if (!fake_cudart::is_before_end(capture->graph, ends, node)) left = simt::join("stream ", joined->actor);
      }
      joined->capture = nullptr;
      joined->behind.clear();
    }
    if (!left.empty()) error("cudaStreamEndCapture: " + left + " was captured too and has not been joined again");
    auto made = std::make_unique<CUgraph_st>();
    static_cast<Graph&>(*made) = std::move(capture->graph);
    made->branches = capture->streams.size();
    *graph = made.release();
    self.graphs.insert(*graph);
    return cudaSuccess;
  });
}

cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  return enter("cudaStreamIsCapturing", [&](Device& self, Device::Lock&) {
    *status = self.stream(handle)->capture ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
  });
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  return enter("cudaGraphInstantiate", [&](Device& self, Device::Lock&) {
    if (self.graphs.count(graph) == 0) return cudaErrorInvalidValue;
    auto made = std::make_unique<CUgraphExec_st>();
    made->graph = *graph;
    for (size_t i = 1; i < graph->branches; ++i) made->actors.push_back(self.make_actor());
    *executable = made.release();
    self.executables.insert(*executable);
    return cudaSuccess;
  });
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  return enter("cudaGraphGetNodes", [&](Device& self, Device::Lock&) {
    if (self.graphs.count(graph) == 0 || nodes != nullptr) return cudaErrorInvalidValue;
    *count = graph->nodes.size();
    return cudaSuccess;
  });
}

cudaError_t cudaGraphUpload(cudaGraphExec_t executable, cudaStream_t handle) {
  return enter("cudaGraphUpload", [&](Device& self, Device::Lock&) {
    self.stream(handle);
    return self.executables.count(executable) == 0 ? cudaErrorInvalidValue : cudaSuccess;
  });
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t handle) {
  return enter("cudaGraphLaunch", [&](Device& self, Device::Lock&) {
    CUstream_st* stream = self.stream(handle);
    if (self.executables.count(executable) == 0) return cudaErrorInvalidValue;
    if (stream->capture) return cudaErrorStreamCaptureUnsupported;
    fake_cudart::launch_graph(self, executable, stream);
    return cudaSuccess;
  });
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  return enter_quietly("cudaGraphDestroy", [&](Device& self, Device::Lock&) {
    if (self.graphs.erase(graph) == 0) return cudaErrorInvalidValue;
    delete graph;
    return cudaSuccess;
  });
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  return enter_quietly("cudaGraphExecDestroy", [&](Device& self, Device::Lock&) {
    if (self.executables.erase(executable) == 0) return cudaErrorInvalidValue;
    delete executable;
    return cudaSuccess;
  });
}
}
