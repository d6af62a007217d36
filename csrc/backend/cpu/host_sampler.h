// Samples on the host's threads, one row each.
#pragma once

#include <memory>

#include "common/thread_pool.h"
#include "model/token_sampler.h"

namespace fastserve {

// `threads` must outlive it.
std::unique_ptr<TokenSampler> make_host_sampler(ThreadPool& threads, int64_t vocab_size);

}  // namespace fastserve
