#include "bench/layout.h"

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <utility>

#include "comm/shared_memory.h"
#include "common/check.h"

namespace fastserve::bench {

namespace {

constexpr int64_t kInnerGroup = 64;  // of inner outputs that stay together

// Layers of each stage: the next one always to the stage that is soonest done with it, by the weights it reads. The
// last stage has the head as well.
std::vector<int64_t> layers_of_stages(const Candidate& model, int stages) {
  const double layer = model.cost.layer_parameters / static_cast<double>(model.spec.num_layers);
  std::vector<int64_t> layers(stages, 1);
  const auto with_one_more = [&](int stage) {
    return static_cast<double>(layers[stage] + 1) * layer + (stage == stages - 1 ? model.cost.head_parameters : 0);
  };
  for (int64_t rest = model.spec.num_layers - stages; rest > 0; --rest) {
    int soonest = stages - 1;
    for (int stage = stages - 2; stage >= 0; --stage) {
      if (with_one_more(stage) < with_one_more(soonest)) soonest = stage;
    }
    ++layers[soonest];
  }
  return layers;
}

}  // namespace

Part part_of(const Candidate& model, const Layout& layout, int rank) {
  const ModelSpec& whole = model.spec;
  const int64_t part = rank % layout.tensor, stage = rank / layout.tensor;
  if (layout.tensor > whole.num_heads || layout.pipeline > whole.num_layers) {
    throw UsageError("--ranks: " + model.preset + " has " + std::to_string(whole.num_heads) + " heads and " +
                     std::to_string(whole.num_layers) + " layers, and each rank needs one");
  }
  const auto share = [&](int64_t count, int64_t unit) {
    const int64_t groups = ceil_div(count, unit);
    return std::pair{part * groups / layout.tensor * unit, std::min(count, (part + 1) * groups / layout.tensor * unit)};
  };
  const int64_t group = whole.num_heads / whole.num_kv_heads;
  const auto [head, last_head] = share(whole.num_heads, 1);
  const auto [inner, last_inner] = share(whole.intermediate_size, kInnerGroup);
  const auto [token, last_token] = share(whole.vocab_size, 1);
  ModelSpec spec = whole;
  spec.num_layers = layers_of_stages(model, layout.pipeline)[stage];
  spec.num_heads = last_head - head;
  spec.num_kv_heads = (last_head - 1) / group + 1 - head / group;
  spec.intermediate_size = last_inner - inner;
  return {spec,
          {.query_group = group,
           .query_offset = head % group,
           .first_token = token,
           .num_tokens = last_token - token,
           .first_stage = stage == 0,
           .last_stage = stage == layout.pipeline - 1,
           .adds_biases = part == 0}};
}

Links::Links(Communicator& world, const Layout& layout)
    : world_(world),
      stage_(world.rank() / layout.tensor),
      stages_(layout.pipeline),
      sampler_((layout.pipeline - 1) * layout.tensor) {
  const int part = world.rank() % layout.tensor;
  answers_ = world.split(0, world.rank());
  if (layout.tensor > 1) tensor_ = world.split(stage_, part);
  if (stages_ == 1) return;
  for (auto& way : ways_) way = world.split(part, stage_);
}

Neighbours Links::neighbours() const {
  return {.tensor = tensor_.get(),
          .receives = stage_ > 0 ? ways_[(stage_ - 1) % 2].get() : nullptr,
          .sends = stage_ < stages_ - 1 ? ways_[stage_ % 2].get() : nullptr};
}

void Links::close() {
  for (Communicator* each : {ways_[0].get(), ways_[1].get(), tensor_.get(), answers_.get()}) {
    if (each != nullptr) each->close();
  }
}

Processes::Processes(const Candidate& model, const Layout& layout, const RuntimeSize& size)
    : model_(model), layout_(layout), size_(size), memory_(make_shared_memory(layout.ranks())) {
  for (int rank = 1; rank < layout.ranks(); ++rank) {
    const pid_t child = fork();
    if (child < 0) throw std::runtime_error("the system refuses a process");
    if (child == 0) follow(rank);
    others_.push_back(child);
  }
}

Processes::~Processes() {
  for (const pid_t other : others_) {
    if (world_ == nullptr) kill(other, SIGKILL);  // it waits for a rank 0 that never came
  }
  leader_.reset();
  runtime_.reset();
  links_.reset();
  world_.reset();
  wait_for_others();
}

std::unique_ptr<Communicator> Processes::join(int rank) const {
  return join_shared_memory(memory_->path(), rank, layout_.ranks(), this_member(rank, ""), {});
}

// In a process of its own, which ends here.
void Processes::follow(int rank) {
  int status = 0;
  try {
    world_ = join(rank);
    links_.emplace(*world_, layout_);
    const Part part = part_of(model_, layout_, rank);
    runtime_ = random_model(model_, size_, part.spec, part.shard, links_->neighbours());
    fastserve::follow(*runtime_, links_->group());
    links_->close();
    world_->close();
  } catch (const std::exception& error) {
    if (world_ != nullptr) world_->abort(error.what());  // rank 0 says it
    status = 1;
  }
  _exit(status);
}

void Processes::connect() {
  world_ = join(0);
  links_.emplace(*world_, layout_);
}

void Processes::load() {
  const Part part = part_of(model_, layout_, 0);
  runtime_ = random_model(model_, size_, part.spec, part.shard, links_->neighbours());
  leader_.emplace(*runtime_, links_->group());
}

void Processes::close() {
  leader_->close();
  links_->close();
  world_->close();
  FS_CHECK(wait_for_others(), "a rank did not end well");
}

bool Processes::wait_for_others() {
  bool well = true;
  for (const pid_t other : std::exchange(others_, {})) {
    int status = 0;
    waitpid(other, &status, 0);
    well = well && status == 0;
  }
  return well;
}

}  // namespace fastserve::bench
