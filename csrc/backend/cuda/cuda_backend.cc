// A CUDA device as a backend: keeps batches, streams and workspaces, and calls the kernels.
#include <algorithm>
#include <chrono>
#include <deque>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "backend/cuda/batch_clock.h"
#include "backend/cuda/cuda_sampler.h"
#include "backend/cuda/device_batch.h"
#include "backend/cuda/early_launch.h"
#include "backend/cuda/event_watch.h"
#include "backend/cuda/graphs.h"
#include "backend/cuda/kernels.h"
#include "backend/cuda/matrix.h"
#include "backend/cuda/nccl.h"
#include "backend/cuda/products.h"
#include "backend/cuda/runtime_api.h"
#include "backend/device.h"
#include "common/pause.h"

namespace fastserve::cuda {

namespace {

// Batches queued at a time: while one runs, the host puts the next together.
constexpr int64_t kDepth = 2;
// A batch that is waited for is often nearly done, and a thread that sleeps takes a while to wake up.
constexpr auto kSpinTime = std::chrono::microseconds(50);

std::string device_name(int device) {
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, device));
  FS_CHECK(properties.major >= 8, "the CUDA backend needs compute capability 8.0 or later; ", properties.name, " has ",
           properties.major, ".", properties.minor);
  return properties.name;
}

const char* name_of(DType dtype) {
  return dtype == DType::kFloat32 ? "float32" : dtype == DType::kBFloat16 ? "bfloat16" : "float16";
}

bool holds(KvFormat format, DType dtype) {
  return format == (dtype == DType::kFloat32    ? KvFormat::kFloat32
                    : dtype == DType::kBFloat16 ? KvFormat::kBFloat16
                                                : KvFormat::kFloat16);
}

using Clock = std::chrono::steady_clock;

class CudaBackend final : public Backend {
 public:
  CudaBackend(DType dtype, int device) : dtype_(dtype), device_(device), name_(device_name(device)) {
    try_early_launches(compute_);
  }
  ~CudaBackend() override {
    static_cast<void>(cudaSetDevice(device_));  // on whichever thread this is
    static_cast<void>(cudaDeviceSynchronize());
    watch_.stop();  // before its event goes
  }

  const char* name() const override { return name_.c_str(); }
  int threads() const override { return 1; }
  DType activations() const override { return dtype_; }
  bool on_host() const override { return false; }
  int64_t depth() const override { return kDepth; }

  // What is wrong with the device the first call that uses it says.
  void enter_thread() noexcept override { static_cast<void>(cudaSetDevice(device_)); }

  Buffer allocate(int64_t bytes) override {
    use_device();
    return release(Memory(Place::kDevice, bytes));
  }
  Buffer allocate_host(int64_t bytes) override {
    use_device();
    return release(Memory(Place::kPinned, bytes));
  }

  void upload(const void* from, void* to, int64_t bytes) override {
    use_device();
    if (bytes == 0) return;
    finish_queued();
    check(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice));
    // From memory that is not pinned it may still be on its way, and our streams do not wait for the default one.
    check(cudaStreamSynchronize(nullptr));
  }
  void download(const void* from, void* to, int64_t bytes) override {
    use_device();
    if (bytes == 0) return;
    finish_queued();
    check(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost));
  }

  std::unique_ptr<Matrix> make_matrix(int64_t n, int64_t k, WeightFormat format) override {
    check_format(format);
    return std::make_unique<CudaMatrix>(n, k, format, staging_);
  }
  std::unique_ptr<Matrix> make_gated_matrix(int64_t width, int64_t k, WeightFormat format, Activation kind) override {
    if (dtype_ == DType::kFloat32 || kind != Activation::kSilu) {
      return Backend::make_gated_matrix(width, k, format, kind);
    }
    check_format(format);
    return std::make_unique<CudaMatrix>(width, k, format, staging_, CudaMatrix::Rows::kPaired);
  }
  void load_rows(Matrix& matrix, int64_t first_row, int64_t rows, SourceType type, const void* source) override {
    use_device();
    static_cast<CudaMatrix&>(matrix).load_rows(first_row, rows, type, source);
  }

  int64_t block_bytes(const KvShape& shape) const override { return layout_of(shape).block_bytes(); }
  void set_kv_pool(const KvShape& shape, void* base) override {
    FS_CHECK(holds(shape.format, dtype_), "the CUDA backend holds keys and values as the model is computed, in ",
             name_of(dtype_), ": use a kv_cache_dtype of auto");
    pool_ = {{layout_of(shape)}, base};
    if (batches_ == nullptr || batches_->block_size() != shape.block_size) {  // else what is reserved stays
      batches_ = std::make_unique<BatchUploader>(shape.block_size);
    }
    graphs_.clear();
  }
  int64_t free_bytes() const override {
    use_device();
    size_t free = 0, total = 0;
    check(cudaMemGetInfo(&free, &total));
    return static_cast<int64_t>(free);
  }

  void reserve(int64_t rows, int64_t positions) override {
    const int64_t per_row = ceil_div(positions, kSegment);
    const int64_t held = rows + free_bytes() / (pool_.block_bytes() * kSegment / pool_.block_size);
    int64_t bytes = 0;
    for (int64_t decodes = 1; decodes <= filled_up(rows); ++decodes) {  // with more of them, less is left in parts
      const int64_t segments = std::min(std::min(decodes, rows) * per_row, held);
      bytes = std::max(bytes, attention_workspace(attended_heads_, pool_, decodes, segments));
    }
    reserve_attention(bytes, bytes);
    batches_->reserve(rows, positions, compute_);
    if (batches_->moved()) graphs_.clear();
  }

  // A direction has its own stream. Neither waits for the compute stream: the engine copies only blocks that no queued
  // batch writes or reads, and uses them again when the copy is known to be done.
  void move_blocks(bool to_host, std::span<const BlockMove> moves) override {
    use_device();
    const auto kind = to_host ? cudaMemcpyDeviceToHost : cudaMemcpyHostToDevice;
    const Mover& mover = movers_[to_host ? 0 : 1];
    for (const BlockMove& move : moves) check(cudaMemcpyAsync(move.to, move.from, move.bytes, kind, mover.stream));
    mover.done.record(mover.stream);
    mover.done.synchronize();
  }

  int64_t filled_up(int64_t tokens) const override { return filled_up_rows(tokens); }
  BatchSize begin(const Batch& batch) override {
    use_device();
    if (batches_ == nullptr) batches_ = std::make_unique<BatchUploader>(1);  // no rows without a pool
    batch_ = batches_->upload(batch, compute_);
    begun_ = true;
    if (batches_->moved()) graphs_.clear();
    if (attended_heads_ > 0) reserve_for_batch();
    return {batch_.num_tokens, batch_.num_logits};
  }
  void run(const std::function<void()>& body) override {
    if (std::exchange(begun_, false)) BatchClock::instance().begin(compute_);
    if (!batches_->replayable()) return body();
    graphs_.run({batch_.num_tokens, batch_.max_context}, compute_, body);
  }
  void forget() override {
    finish_queued();
    graphs_.clear();
  }

  void end() override {
    BatchClock::instance().end(compute_);
    if (idle_.empty()) idle_.push_back(std::make_unique<Event>());
    idle_.back()->record(compute_);
    queued_.push_back(std::move(idle_.back()));
    idle_.pop_back();
  }
  void wait() override {
    const Event& oldest = *queued_.front();
    if (nccl_.used()) {
      nccl_.wait_for(oldest);
    } else if (watch_.busy()) {
      watch_.join();
    } else {
      for (const auto until = Clock::now() + kSpinTime; !oldest.settled() && Clock::now() < until;) pause();
    }
    oldest.synchronize();
    idle_.push_back(std::move(queued_.front()));
    queued_.pop_front();
  }
  bool done() const override { return queued_.front()->settled(); }
  void when_done(std::function<void()> over) override { watch_.start(*queued_.front(), std::move(over)); }

  std::unique_ptr<DeviceCommunicator> connect(Communicator& ranks, int first, int count, int64_t most) override {
    use_device();
    return nccl_.connect(ranks, first, count, most);
  }
  void drain() noexcept override {
    try {
      finish_queued();
    } catch (...) {  // after which nothing waits for others
      static_cast<void>(cudaStreamSynchronize(compute_));
    }
  }

  void embed(const EmbedArgs& args) override {
    const auto& table = static_cast<const CudaMatrix&>(*args.table);
    const bool by_token = args.by == EmbeddedBy::kToken;
    cuda::embed({.table = table.view(),
                 .ids = by_token ? batch_.token_ids : batch_.positions,
                 .last_sampled = by_token && sampler_ != nullptr ? sampler_->last_sampled() : nullptr,
                 .first = static_cast<int32_t>(args.first),
                 .count = static_cast<int32_t>(table.n),
                 .tokens = batch_.num_tokens,
                 .output = args.output,
                 .ld = args.ld,
                 .accumulate = args.accumulate},
                compute_);
  }
  void rotation_table(const float* inv_freq, int64_t half, float scale, float* output) override {
    cuda::rotation_table(batch_.positions, batch_.num_tokens, inv_freq, half, scale, output, compute_);
  }
  void gemm(const GemmArgs& args) override { products_.run(args); }
  void norm(const NormArgs& args) override {
    if (args.rows == 0) return;
    cuda::norm({.dtype = dtype_,
                .input = args.input,
                .order = args.of_logits ? batch_.logit_tokens : nullptr,
                .output = args.output,
                .weight = args.weight,
                .bias = args.bias,
                .rows = args.rows,
                .width = args.width,
                .ld = args.ld,
                .eps = args.eps},
               compute_);
  }
  void rope_and_store(const RopeAndStoreArgs& args) override {
    cuda::rope_and_store({.dtype = dtype_,
                          .qkv = args.qkv,
                          .ld = args.ld,
                          .cos_sin = args.cos_sin,
                          .rotary_half = args.rotary_half,
                          .q_norm = args.q_norm,
                          .k_norm = args.k_norm,
                          .eps = args.eps,
                          .num_heads = args.num_heads,
                          .pool = pool_,
                          .layer = args.layer},
                         batch_, compute_);
  }
  void attention(const AttentionArgs& args) override {
    if (attended_heads_ < args.num_heads) {  // never while recording: a first run has been here before
      attended_heads_ = args.num_heads;
      reserve_for_batch();
    }
    cuda::attention({.dtype = dtype_,
                     .qkv = args.qkv,
                     .ld = args.ld,
                     .output = args.output,
                     .ld_output = args.ld_output,
                     .num_heads = args.num_heads,
                     .query_group = args.query_group,
                     .query_offset = args.query_offset,
                     .scale = args.scale,
                     .pool = pool_,
                     .layer = args.layer,
                     .workspace = attention_.as<void>()},
                    batch_, compute_);
  }
  void add(const float* input, float* output, int64_t count) override { cuda::add(input, output, count, compute_); }

  std::unique_ptr<TokenSampler> make_sampler(int64_t vocab_size) override {
    use_device();
    auto sampler = std::make_unique<CudaSampler>(vocab_size, compute_, [this] { graphs_.clear(); });
    sampler_ = sampler.get();
    return sampler;
  }

 private:
  // Threads see device 0 until they say otherwise.
  void use_device() const { check(cudaSetDevice(device_)); }

  void check_format(WeightFormat format) const {
    use_device();
    FS_CHECK(is_quantized(format) || format == format_of(dtype_), "weights in another type than the ", name_of(dtype_),
             " that the model is computed in");
  }

  // For the batch, whose segments no graph knows.
  void reserve_for_batch() {
    const auto needed = [&](int64_t segments) {
      return attention_workspace(attended_heads_, pool_, batch_.num_decodes, segments);
    };
    reserve_attention(needed(batch_.num_segments), needed(batch_.num_segments + batch_.num_segments / 2));
  }
  void reserve_attention(int64_t least, int64_t wanted) {
    if (static_cast<int64_t>(attention_.bytes()) >= least) return;
    finish_queued();
    attention_ = Memory();  // first, or both would have to fit
    attention_ = Memory(Place::kDevice, wanted);
    graphs_.clear();
  }

  void finish_queued() {
    if (nccl_.used()) {
      const Event queued;
      queued.record(compute_);
      nccl_.wait_for(queued);
    }
    compute_.synchronize();
  }

  static Buffer release(Memory memory) {
    const size_t bytes = memory.bytes();
    const Place place = memory.place();
    return Buffer(
        memory.release(), bytes,
        place == Place::kDevice ? [](void* data, size_t) { static_cast<void>(cudaFree(data)); }
                                : [](void* data, size_t) { static_cast<void>(cudaFreeHost(data)); });
  }

  struct Mover {
    Stream stream;
    Event done;
  };

  const DType dtype_;
  const int device_;
  const std::string name_;
  Stream compute_;
  Mover movers_[2];  // to the host, and back
  KvView pool_{};
  std::unique_ptr<BatchUploader> batches_;
  DeviceBatch batch_{};
  bool begun_ = false;  // and nothing run of it
  Graphs graphs_;
  std::vector<std::unique_ptr<Event>> idle_;
  std::deque<std::unique_ptr<Event>> queued_;  // of batches that were not waited for: each passes when all is done
  EventWatch watch_{device_};
  Nccl nccl_{device_, compute_, watch_, [this] { graphs_.clear(); }};
  Staging staging_;  // of weights on their way to the device
  Products products_{dtype_, compute_};
  Memory attention_;                      // its workspace, ...
  int64_t attended_heads_ = 0;            // ... for so many heads at most
  const CudaSampler* sampler_ = nullptr;  // the runtime's
};

}  // namespace

}  // namespace fastserve::cuda

extern "C" __attribute__((visibility("default"))) fastserve::Backend* fastserve_make_cuda_backend(
    fastserve::DType dtype, int device) {
  using namespace fastserve::cuda;
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  FS_CHECK(status == cudaSuccess && count > 0, "no CUDA device is to be had: ", cudaGetErrorString(status));
  FS_CHECK(device >= 0 && device < count, "there is no CUDA device ", device, " among ", count);
  check(cudaSetDevice(device));
  return new CudaBackend(dtype, device);
}
