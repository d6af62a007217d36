// What tests set of the fake runtime. The environment sets it too: FASTSERVE_SIMT_EAGERNESS, _SEED and _MEMORY,
// by _DEVICE which machine's devices they are, and by _CAPABILITY of which compute capability: 7.5,
// 8.0, 8.6, 8.9 or 9.0.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace fake_cudart {

// From here on. Work that is queued on a stream is carried out
//   lazy:   when something waits for it, and not before;
//   random: at some call of the API before that;
//   eager:  at once.
// The seed also orders the threads of kernels.
void configure(const std::string& eagerness, uint64_t seed);

// Bytes of memory each device has.
void set_device_memory(size_t bytes);

// Throws what a call that cannot throw has found (those that destructors make) and what guards around allocations show.
void check_errors();

// From here on, what is queued is over only so long afterwards, for whoever asks or waits.
void set_latency(double seconds);

// The call of this function of CUDA's that comes after so many others of it fails, and does nothing; null: none does.
void fail_call(const char* function, int after);
// The same, as when a kernel has trapped: from there on every call fails, until revive(). What is freed is freed.
void lose_device(const char* function, int after);
void revive();

// The virtual architecture that all kernels say they were compiled for, ten times its version; 90 at first.
void set_compiled_for(int architecture);

// How often a kernel was allowed more shared memory.
size_t attributes_set();
// How often a kernel was told to prefer shared memory to cache.
size_t carveouts_set();
// Kernels launched in clusters of several blocks so far.
size_t cluster_launches();

// How many allocations, streams, events and graphs there are that nobody has freed.
size_t live_objects();

}  // namespace fake_cudart
