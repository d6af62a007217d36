#include <chrono>

#include "fake_cudart/graph.h"
#include "machine/machine.h"

using fake_cudart::Clock;
using fake_cudart::Device;
using fake_cudart::enter;
using fake_cudart::enter_quietly;
using fake_cudart::error;
using fake_cudart::Operation;
using fake_cudart::Task;

namespace fake_cudart {

std::shared_ptr<Operation> Device::submit(CUstream_st* stream, Task task) {
  if (stream->capture) {
    add_node(stream, std::move(task));
    return nullptr;
  }
  Clock clock = host;
  std::vector<std::shared_ptr<Operation>> after{stream->last};
  if (stream->blocking) {  // the default stream and those that are not "non-blocking" wait for each other
    for (CUstream_st* other : streams) {
      CUstream_st* const first = default_streams[stream->device];
      if (other->blocking && other->device == stream->device && (stream == first || other == first)) {
        after.push_back(other->last);
      }
    }
  }
  for (const auto& before : after) {
    if (before) clock.join(before->clock);
  }
  stream->last = enqueue(std::move(task), stream->actor, clock, after);
  return stream->last;
}

namespace {

void check_not_captured(const CUstream_st* stream, const char* function) {
  if (stream->capture) error(simt::join(function, ": stream ", stream->actor, " is captured"));
}

// Whether something is over, asked without waiting. Where nothing makes work happen by itself, asking does: at the
// first or some later time, or a loop of the caller's would not end.
cudaError_t ask(Device& self, const std::shared_ptr<Operation>& operation, Device::Lock& lock) {
  if (operation == nullptr) return cudaSuccess;
  if (operation->state != Operation::State::kDone && self.random.below(3) == 0) {
    self.finish(operation, lock, false);
  }
  if (operation->state != Operation::State::kDone) return cudaErrorNotReady;
  if (std::chrono::steady_clock::now() < operation->not_over_before) return cudaErrorNotReady;
  self.host.join(operation->clock);
  return cudaSuccess;
}

}  // namespace
}  // namespace fake_cudart

extern "C" {

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return enter("cudaStreamCreateWithFlags", [&](Device& self, Device::Lock&) {
    if ((flags & ~unsigned{cudaStreamNonBlocking}) != 0) return cudaErrorInvalidValue;
    *stream = self.make_stream((flags & cudaStreamNonBlocking) == 0, fake_cudart::current_device());
    return cudaSuccess;
  });
}

cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithFlags(stream, cudaStreamDefault); }

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int) {
  return cudaStreamCreateWithFlags(stream, flags);
}

cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  return enter_quietly("cudaStreamDestroy", [&](Device& self, Device::Lock&) {
    CUstream_st* stream = self.stream(handle);
    if (stream == self.default_streams[stream->device]) return cudaErrorInvalidResourceHandle;
    fake_cudart::check_not_captured(stream, "cudaStreamDestroy");
    self.destroy_stream(stream);
    return cudaSuccess;
  });
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  return enter("cudaStreamSynchronize", [&](Device& self, Device::Lock& lock) {
    CUstream_st* stream = self.stream(handle);
    fake_cudart::check_not_captured(stream, "cudaStreamSynchronize");
    self.synchronize(stream->last, lock);
    return cudaSuccess;
  });
}

cudaError_t cudaStreamQuery(cudaStream_t handle) {
  return enter("cudaStreamQuery", [&](Device& self, Device::Lock& lock) {
    CUstream_st* stream = self.stream(handle);
    fake_cudart::check_not_captured(stream, "cudaStreamQuery");
    return fake_cudart::ask(self, stream->last, lock);
  });
}

cudaError_t cudaDeviceSynchronize() {
  return enter("cudaDeviceSynchronize", [](Device& self, Device::Lock& lock) {
    fake_cudart::check_allowed_in_captures(self, "cudaDeviceSynchronize");
    self.finish_all(lock);
    self.check_guards("cudaDeviceSynchronize");
    return cudaSuccess;
  });
}

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event_handle, unsigned) {
  return enter("cudaStreamWaitEvent", [&](Device& self, Device::Lock&) {
    CUstream_st* stream = self.stream(handle);
    const CUevent_st* event = self.event(event_handle);
    if (event->capture) {
      if (self.captures.count(event->capture.get()) == 0) error("cudaStreamWaitEvent: its capture is over");
      fake_cudart::follow(stream, event);
      return cudaSuccess;
    }
    if (!event->recorded) error("cudaStreamWaitEvent: the event has never been recorded");
    if (stream->capture) {
      error("cudaStreamWaitEvent: a stream that is captured waits for what happens outside of the capture");
    }
    Clock clock = self.host;
    clock.join(event->recorded->clock);
    if (stream->last) clock.join(stream->last->clock);
    Task task;
    task.name = "cudaStreamWaitEvent";
    stream->last = self.enqueue(task, stream->actor, clock, {stream->last, event->recorded});
    return cudaSuccess;
  });
}

cudaError_t cudaLaunchHostFunc(cudaStream_t handle, cudaHostFn_t function, void* argument) {
  return enter("cudaLaunchHostFunc", [&](Device& self, Device::Lock&) {
    Task task;
    task.name = "a host function";
    task.action = [function, argument] { function(argument); };
    task.is_host_function = true;
    self.submit(self.stream(handle), std::move(task));
    return cudaSuccess;
  });
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  return enter("cudaEventCreateWithFlags", [&](Device& self, Device::Lock&) {
    if ((flags & ~unsigned{cudaEventBlockingSync | cudaEventDisableTiming}) != 0) return cudaErrorInvalidValue;
    *event = new CUevent_st{fake_cudart::current_device(), (flags & cudaEventDisableTiming) == 0, nullptr, nullptr, {}};
    self.events.insert(*event);
    return cudaSuccess;
  });
}

cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, cudaEventDefault); }

cudaError_t cudaEventDestroy(cudaEvent_t handle) {
  return enter_quietly("cudaEventDestroy", [&](Device& self, Device::Lock&) {
    CUevent_st* event = self.event(handle);
    self.events.erase(event);
    delete event;
    return cudaSuccess;
  });
}

cudaError_t cudaEventRecord(cudaEvent_t event_handle, cudaStream_t handle) {
  return enter("cudaEventRecord", [&](Device& self, Device::Lock&) {
    CUstream_st* stream = self.stream(handle);
    CUevent_st* event = self.event(event_handle);
    if (event->device != stream->device) return cudaErrorInvalidResourceHandle;
    if (stream->capture) {
      event->capture = stream->capture;
      event->behind = stream->behind;
      event->recorded = nullptr;
      return cudaSuccess;
    }
    Task task;
    task.name = "cudaEventRecord";
    event->capture = nullptr;
    event->recorded = self.submit(stream, std::move(task));
    return cudaSuccess;
  });
}

cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  return enter("cudaEventSynchronize", [&](Device& self, Device::Lock& lock) {
    const CUevent_st* event = self.event(handle);
    if (event->capture) error("cudaEventSynchronize: the event was recorded in a capture");
    if (!event->recorded) error("cudaEventSynchronize: the event has never been recorded");
    self.synchronize(std::shared_ptr<Operation>(event->recorded), lock);
    return cudaSuccess;
  });
}

cudaError_t cudaEventQuery(cudaEvent_t handle) {
  return enter("cudaEventQuery", [&](Device& self, Device::Lock& lock) {
    const CUevent_st* event = self.event(handle);
    if (event->capture) error("cudaEventQuery: the event was recorded in a capture");
    if (!event->recorded) error("cudaEventQuery: the event has never been recorded");
    return fake_cudart::ask(self, std::shared_ptr<Operation>(event->recorded), lock);
  });
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to) {
  return enter("cudaEventElapsedTime", [&](Device& self, Device::Lock&) {
    const CUevent_st* ends[] = {self.event(from), self.event(to)};
    for (const CUevent_st* event : ends) {
      if (!event->timed || !event->recorded) return cudaErrorInvalidResourceHandle;
      if (event->recorded->state != Operation::State::kDone) return cudaErrorNotReady;
    }
    *milliseconds = static_cast<float>(1000 * (ends[1]->recorded->done_at - ends[0]->recorded->done_at));
    return cudaSuccess;
  });
}
}
