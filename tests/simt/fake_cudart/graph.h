// Graphs, and the captures they come from.
#pragma once

#include <cuda_runtime_api.h>

#include <thread>
#include <vector>

#include "fake_cudart/device.h"

namespace fake_cudart {

struct Node {
  Task task;
  size_t branch;  // nodes of a branch come one after the other
  std::vector<size_t> after;
};

struct Graph {
  std::vector<Node> nodes;
  size_t branches = 0;
};

struct Capture {
  cudaStreamCaptureMode mode;
  std::thread::id thread;
  CUstream_st* origin;
  std::vector<CUstream_st*> streams;  // the origin and those that joined, by branch
  Graph graph;
};

// Adds a node to the graph that the stream is captured to.
void add_node(CUstream_st* stream, Task task);
// The stream goes on after a point of the capture, which it joins if it is not in it.
void follow(CUstream_st* stream, const CUevent_st* event);
// Throws when some capture forbids this thread to call the function now.
void check_allowed_in_captures(const Device& device, const char* function);

}  // namespace fake_cudart
