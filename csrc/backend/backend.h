// What a device must offer to run a decoder. model/transformer.cc is written once over this interface.
//
// Operations are queued in order, on memory of the device (Backend::allocate) and for the batch of the last begin().
// There are two kinds of matrices. Activations are of the device's choice, Backend::activations(); the residual,
// partial sums and logits are float32. Both are [tokens, ld] with a row stride `ld` that is a multiple of kPad, so that
// kernels may handle whole vectors; columns beyond the logical width are theirs alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>

#include "backend/device_communicator.h"
#include "common/buffer.h"
#include "common/dtype.h"

namespace fastserve {

constexpr int64_t kPad = 64;
// Attention cuts every context at absolute multiples of this many positions, whatever the batch or the block size, and
// merges the pieces in ascending order. This is what makes preemption invisible (DESIGN §3).
constexpr int64_t kSegment = 256;

enum class Activation { kSilu, kGelu, kGeluTanh, kRelu };

// Element types a model file may hold. Quantized rows are made of blocks of 32 elements as GGUF stores them.
enum class SourceType { kF32, kF16, kBF16, kQ8_0, kQ8_1, kQ4_0, kQ4_1 };

// A weight matrix [n outputs, k inputs] in the backend's own layout.
class Matrix {
 public:
  virtual ~Matrix() = default;
  int64_t n = 0;
  int64_t k = 0;
  virtual int64_t bytes() const = 0;
  // Columns that a product writes, with the activation that the matrix was made for.
  virtual int64_t outputs() const { return n; }
};

// What a product's outputs x become: act(x[i]) for i < width; gated: act(x[i]) · x[round_up(width, kPad) + i].
struct ActivationArgs {
  Activation kind;
  bool gated;
  int64_t width;
};

struct GemmArgs {
  const void* input;  // activations [m, k], stride ld_input
  int64_t ld_input;
  const Matrix* weight;  // [n, k]
  const float* bias;     // [n] padded to kPad, or null
  void* output;  // [m, outputs], stride ld_output >= those rounded up to kPad: float32 if `wide`, or activations
  int64_t ld_output;
  int64_t m;
  bool wide;
  bool accumulate;  // output += input · weightᵀ + bias; only if wide
  // Null: nothing. Else the output's first `width` columns are what it makes, those up to a multiple of kPad stay zero
  // if they were, and those beyond are anything; only if not wide.
  const ActivationArgs* activation = nullptr;
};

struct NormArgs {
  const float* input;   // [rows, width], stride ld
  void* output;         // activations [rows, width], stride ld
  const float* weight;  // [width]
  const float* bias;    // [width] or null: then RMS norm, else layer norm
  int64_t rows;
  bool of_logits;  // row i of the output is of the input's row for the batch's i-th logit token, not of row i
  int64_t width;
  int64_t ld;
  float eps;
};

// What a block of the KV pool holds: K and V of block_size positions, all local layers of them, so that moving it is
// one copy. How they lie in it is the device's business.
struct KvShape {
  KvFormat format;
  int64_t num_layers;
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t block_size;
};

// One job's tokens in this iteration.
struct Row {
  int64_t first;  // index of its first token in the batch
  int64_t tokens;
  int64_t start;         // absolute position of its first token
  const int32_t* table;  // its blocks, by position / block_size
};

// The tokens of one iteration: the rows', back to back.
struct Batch {
  std::span<const Row> rows;
  std::span<const int32_t> token_ids;     // [tokens]; what TokenSampler::last_of() returned stands for a token to come
  std::span<const int32_t> positions;     // [tokens], for embeddings and rotation
  std::span<const int32_t> logit_tokens;  // batch indices of the tokens whose logits are wanted, ascending
};

// With what the device adds to fill a batch up: operations work on so many.
struct BatchSize {
  int64_t tokens, logits;
};

enum class EmbeddedBy { kToken, kPosition };

struct EmbedArgs {
  const Matrix* table;
  EmbeddedBy by;
  int64_t first;  // token or position of the table's first row; those outside the table give rows of zeros
  float* output;  // [tokens, table.k], stride ld
  int64_t ld;
  bool accumulate;
};

// Rotates q and k, normalizes them per head first where the model does, and writes k and v to the pool.
struct RopeAndStoreArgs {
  void* qkv;  // activations [tokens, (heads + 2 * kv_heads) * head_dim], stride ld; q is rotated in place
  int64_t ld;
  const float* cos_sin;  // [tokens, 2, rotary_half], scaled; null: no rotation
  int64_t rotary_half;   // pairs (i, i + rotary_half) of each head are rotated
  const float* q_norm;   // [head_dim] or null: RMS norm over each head before rotation
  const float* k_norm;
  float eps;
  int64_t num_heads;
  int64_t layer;
};

// Causal attention of every token over its job's pool blocks, its own chunk included (which is in the pool by now).
struct AttentionArgs {
  const void* qkv;  // activations [tokens, …]: rotated q comes first, stride ld
  int64_t ld;
  void* output;  // activations [tokens, heads * head_dim], stride ld_output
  int64_t ld_output;
  int64_t num_heads;
  int64_t query_group;   // query head h reads KV head (h + query_offset) / query_group
  int64_t query_offset;  // below query_group
  float scale;           // applied to q · k
  int64_t layer;
};

// Bytes that go from one place of the KV pools to another.
struct BlockMove {
  std::byte* to;
  const std::byte* from;
  int64_t bytes;
};

class Communicator;
class TokenSampler;

class Backend {
 public:
  virtual ~Backend() = default;

  virtual const char* name() const = 0;  // the instruction set or device
  virtual int threads() const = 0;       // of the host that work for it
  virtual DType activations() const = 0;
  virtual bool on_host() const = 0;  // its memory is the host's, and operations are done when they return
  // How many batches may be queued before the tokens of the first are taken.
  virtual int64_t depth() const = 0;

  // Before anything else on a thread that calls operations, or a sampler, by itself.
  virtual void enter_thread() noexcept = 0;

  // Memory, zero-filled: of the device, and of the host for what goes to the device and back.
  virtual Buffer allocate(int64_t bytes) = 0;
  virtual Buffer allocate_host(int64_t bytes) = 0;
  // Copies between the two, after all that is queued; done when they return.
  virtual void upload(const void* from, void* to, int64_t bytes) = 0;
  virtual void download(const void* from, void* to, int64_t bytes) = 0;

  virtual std::unique_ptr<Matrix> make_matrix(int64_t n, int64_t k, WeightFormat format) = 0;
  // The inner weights of a gated feed-forward block, for products with that activation and no bias: gate is rows [0,
  // width), up begins at row round_up(width, kPad); nothing is loaded between them.
  virtual std::unique_ptr<Matrix> make_gated_matrix(int64_t width, int64_t k, WeightFormat format, Activation) {
    return make_matrix(round_up(width, kPad) + width, k, format);
  }
  // Converts source rows [rows, k] to the matrix's format and places them at rows [first_row, first_row + rows). Throws
  // for a matrix of GGUF's groups and rows of another type.
  virtual void load_rows(Matrix& matrix, int64_t first_row, int64_t rows, SourceType type, const void* source) = 0;

  // Throws for a format that the device does not hold K and V in.
  virtual int64_t block_bytes(const KvShape& shape) const = 0;
  virtual void set_kv_pool(const KvShape& shape, void* base) = 0;
  // Bytes of the device's memory that nobody has; -1 where its memory is the host's.
  virtual int64_t free_bytes() const = 0;
  // Takes what memory batches of up to `rows` rows of one token need beside what a batch before has needed, and no more
  // from then on: with contexts of up to so many positions, as far as a KV pool in the memory that is left can hold
  // them.
  virtual void reserve(int64_t rows, int64_t positions) = 0;
  // Copies blocks from the device to the host's pool or back; done when it returns. Called on one thread for each
  // direction, beside everything else.
  virtual void move_blocks(bool to_host, std::span<const BlockMove> moves) = 0;

  // The most tokens that begin() makes of a batch of so many or fewer.
  virtual int64_t filled_up(int64_t tokens) const = 0;
  // What follows is for this batch, whose memory may change afterwards.
  virtual BatchSize begin(const Batch& batch) = 0;
  // Queues the operations that `body` calls for, or the same ones again that an earlier batch of the same size called
  // for: they depend on nothing but the batch.
  virtual void run(const std::function<void()>& body) = 0;
  // Memory that earlier calls worked on is about to go: waits for them, and repeats none.
  virtual void forget() = 0;
  // All of the batch is queued; waits, spinning briefly, until all is done of the oldest batch that was not yet waited
  // for.
  virtual void end() = 0;
  virtual void wait() = 0;
  // Whether wait() would return, or throw, at once. Only while there is such a batch.
  virtual bool done() const = 0;
  // Calls `over` when that is so, on any thread. Once for such a batch, and the next call for it is wait().
  virtual void when_done(std::function<void()> over) = 0;
  // Ranks [first, first + count) of `ranks` join; all of them call it. `most` floats are the most of a sum. Null where
  // their devices, or what it takes, do not allow it: on all of them, which exchange through the host's memory then.
  // `ranks` must outlive it, and is asked for news of the others in waits on this thread.
  virtual std::unique_ptr<DeviceCommunicator> connect(Communicator& ranks, int first, int count, int64_t most) = 0;
  // Waits until nothing is queued, so that memory can go. Throws nothing: what has failed has been told.
  virtual void drain() noexcept = 0;

  virtual void embed(const EmbedArgs& args) = 0;
  // cos and sin of every token's angles position · inv_freq, times scale: output [tokens, 2, half].
  virtual void rotation_table(const float* inv_freq, int64_t half, float scale, float* output) = 0;
  virtual void gemm(const GemmArgs& args) = 0;
  virtual void norm(const NormArgs& args) = 0;
  virtual void rope_and_store(const RopeAndStoreArgs& args) = 0;
  virtual void attention(const AttentionArgs& args) = 0;
  // output[i] += input[i].
  virtual void add(const float* input, float* output, int64_t count) = 0;

  // Chooses tokens by rows of logits that lie on the device.
  virtual std::unique_ptr<TokenSampler> make_sampler(int64_t vocab_size) = 0;
};

}  // namespace fastserve
