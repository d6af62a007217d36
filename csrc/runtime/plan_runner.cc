#include "runtime/plan_runner.h"

#include <algorithm>

#include "backend/cpu/host_sampler.h"

namespace fastserve {

PlanRunner::PlanRunner(const ModelSpec& spec, const Shard& shard, Communicator* stage, Backend& backend,
                       Transformer& transformer)
    : spec_(spec), backend_(backend), transformer_(transformer) {
  if (!shard.last_stage) return;
  if (stage == nullptr) {
    sampler_ = backend.make_sampler(spec.vocab_size);
    return;
  }
  shared_sampling_.emplace(*stage, shard, spec.vocab_size);
  sampler_threads_ = std::make_unique<ThreadPool>(backend.threads());
  sampler_ = make_host_sampler(*sampler_threads_, spec.vocab_size);
}

void PlanRunner::reserve(int64_t rows) {
  if (sampler_) sampler_->reserve(rows);
}

LaunchedPlan PlanRunner::launch(BatchPlan plan, const PlanLimits& limits) {
  LaunchedPlan launched;
  launched.begin = std::chrono::steady_clock::now();
  launched.plan = std::move(plan);
  try {
    validate(launched.plan, slots_, limits);
    apply_deltas(launched.plan);
    if (launched.plan.rows.empty()) return launched;
    float* logits = transformer_.forward(batch_of(launched.plan));
    for (const PlanRow& row : launched.plan.rows) slots_.at(row.slot).computed = int64_t{row.start} + row.tokens;
    if (logits != nullptr) sample_rows(launched, logits);
    backend_.end();
  } catch (...) {
    launched.result.error = std::current_exception();
    if (launched.sampling) sampler_->drop_latest();
    give_up_samples(launched);
  }
  return launched;
}

StepResult PlanRunner::finish(LaunchedPlan launched, CopyEngine& copies) {
  StepResult& result = launched.result;
  result.plan_id = launched.plan.plan_id;
  if (result.error) return std::move(result);
  try {
    if (!launched.plan.rows.empty()) wait_for(launched);
    if (launched.sampling) result.sampled = take_samples(launched);
    result.copies = copies.take(launched.plan.rows.empty());
  } catch (...) {
    result.error = std::current_exception();
  }
  const auto end = std::chrono::steady_clock::now();
  result.seconds = std::chrono::duration<double>(end - std::max(launched.begin, last_end_)).count();
  last_end_ = end;
  return std::move(result);
}

void PlanRunner::wait_for(LaunchedPlan& oldest) {
  try {
    backend_.wait();
  } catch (...) {
    if (oldest.sampling) sampler_->drop_oldest();
    give_up_samples(oldest);
    throw;
  }
}

Batch PlanRunner::batch_of(const BatchPlan& plan) {
  rows_.clear();
  token_ids_.clear();
  positions_.clear();
  logit_tokens_.clear();
  for (const PlanRow& row : plan.rows) {
    const Slot& slot = slots_.at(row.slot);
    const auto first = static_cast<int64_t>(token_ids_.size());
    rows_.push_back({first, row.tokens, row.start, slot.table.data()});
    for (int32_t i = 0; i < row.tokens; ++i) {
      const int32_t token = plan.tokens[first + i];
      const bool to_come = token == -1 && slot.sampling > 0;
      token_ids_.push_back(to_come ? sampler_->last_of(row.slot) : token == -1 ? slot.last_sampled : token);
      positions_.push_back(row.start + i + static_cast<int32_t>(spec_.position_offset));
      if (i >= row.tokens - row.logits) logit_tokens_.push_back(static_cast<int32_t>(first + i));
    }
  }
  return {rows_, token_ids_, positions_, logit_tokens_};
}

void PlanRunner::apply_deltas(const BatchPlan& plan) {
  for (const int32_t slot : plan.closed) {
    slots_.erase(slot);
    if (sampler_) sampler_->close(slot);
  }
  for (const OpenedSlot& opened : plan.opened) {
    Slot& slot = slots_[opened.slot];
    slot.job = ++jobs_;
    slot.prompt_length = opened.prompt_length;
    if (!sampler_) continue;
    const std::span<const int32_t> history = opened.history;
    const size_t prompt = std::min<size_t>(history.size(), opened.prompt_length);
    sampler_->open(opened.slot, opened.params, history.first(prompt), history.subspan(prompt));
  }
  for (const TableEntry& entry : plan.table) {
    auto& table = slots_.at(entry.slot).table;
    if (entry.index == static_cast<int64_t>(table.size())) {
      table.push_back(entry.block);
    } else {
      table[entry.index] = entry.block;
    }
  }
}

std::vector<float> PlanRunner::all_logits(const float* logits, int64_t count) {
  if (shared_sampling_) return shared_sampling_->gather_logits(logits, transformer_.ld_logits(), count);
  std::vector<float> all(count * spec_.vocab_size);
  for (int64_t i = 0; i < count; ++i) {
    backend_.download(logits + i * transformer_.ld_logits(), all.data() + i * spec_.vocab_size,
                      spec_.vocab_size * static_cast<int64_t>(sizeof(float)));
  }
  return all;
}

void PlanRunner::sample_rows(LaunchedPlan& launched, float* logits) {
  const auto count = static_cast<int64_t>(logit_tokens_.size());
  if (shared_sampling_ && !backend_.on_host()) {  // ranks exchange them on the host
    const int64_t bytes = count * transformer_.ld_logits() * static_cast<int64_t>(sizeof(float));
    if (static_cast<int64_t>(host_logits_.bytes()) < bytes) host_logits_ = backend_.allocate_host(bytes);
    backend_.download(logits, host_logits_.as<float>(), bytes);
    logits = host_logits_.as<float>();
  }
  if (launched.plan.return_logits) launched.result.logits = all_logits(logits, count);

  std::vector<SampleRequest> requests;
  std::vector<int64_t> sampled_rows;
  int64_t last_logits = -1;
  for (const PlanRow& row : launched.plan.rows) {
    if (row.logits == 0) continue;
    last_logits += row.logits;
    Slot& slot = slots_.at(row.slot);
    ++slot.sampling;
    launched.sampled.emplace_back(row.slot, slot.job);
    const auto sample = static_cast<int64_t>(sampled_rows.size());
    sampled_rows.push_back(last_logits);
    const int64_t output_index = int64_t{row.start} + row.tokens - slot.prompt_length;
    if (!shared_sampling_) {
      requests.push_back({last_logits, row.slot, output_index});
    } else if (shared_sampling_->mine(sample)) {
      requests.push_back({static_cast<int64_t>(requests.size()), row.slot, output_index});
    }
  }
  if (shared_sampling_) {
    logits = shared_sampling_->exchange(logits, transformer_.ld_logits(), sampled_rows);
    sampler_->sample(logits, shared_sampling_->ld_rows(), requests);
  } else {
    sampler_->sample(logits, transformer_.ld_logits(), requests);
  }
  launched.sampling = true;
}

// Slots whose samples will not come have no token to come either.
void PlanRunner::give_up_samples(LaunchedPlan& launched) {
  launched.sampling = false;
  for (const auto& [slot, job] : launched.sampled) {
    const auto found = slots_.find(slot);
    if (found != slots_.end() && found->second.job == job) --found->second.sampling;
  }
}

std::vector<Sampled> PlanRunner::take_samples(const LaunchedPlan& launched) {
  std::vector<Sampled> own = sampler_->take(), all;
  if (shared_sampling_) {
    all.resize(launched.sampled.size());
    for (size_t i = 0, next = 0; i < all.size(); ++i) {
      if (shared_sampling_->mine(static_cast<int64_t>(i))) all[i] = std::move(own[next++]);
    }
    shared_sampling_->gather(all);
  } else {
    all = std::move(own);
  }
  for (size_t i = 0; i < all.size(); ++i) {
    const auto& [slot, job] = launched.sampled[i];
    const auto found = slots_.find(slot);
    if (found == slots_.end() || found->second.job != job) continue;  // a plan launched meanwhile has closed it
    // A plan queued behind this one may already refer to a token that could not be sampled. Any will do then, since
    // the job ends here.
    found->second.last_sampled = std::max(0, all[i].token);
    --found->second.sampling;
    if (shared_sampling_ && !shared_sampling_->mine(static_cast<int64_t>(i))) sampler_->note(slot, all[i].token);
  }
  return all;
}

}  // namespace fastserve
