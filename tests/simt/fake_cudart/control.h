// What tests set of the fake runtime.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fake_cudart {

// When work that is queued on a stream is carried out.
enum class Eagerness {
  kLazy,    // when something waits for it, and not before
  kRandom,  // at some call of the API before that
  kEager,   // at once
};

// For everything from here on. The seed also orders the threads of kernels.
void configure(Eagerness eagerness, uint64_t seed);

// Bytes of memory the device has.
void set_device_memory(size_t bytes);

// Throws what a call that cannot throw has found (those that destructors make) and what guards around allocations show.
void check_errors();

// How many allocations, streams, events and graphs there are that nobody has freed.
size_t live_objects();

}  // namespace fake_cudart
