#include "backend/cpu/cpu_backend.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "backend/cpu/gemm_blocks.h"
#include "backend/cpu/host_sampler.h"
#include "backend/cpu/kernels.h"
#include "backend/cpu/paged_attention.h"
#include "common/buffer.h"
#include "common/thread_pool.h"
#include "model/dequantize.h"

namespace fastserve {

namespace {

using cpu::cut_gemm;
using cpu::GemmBlocks;
using cpu::KernelTable;
using cpu::OperandLayout;
using cpu::PanelLayout;

// Work below this many elements is not worth waking a thread for.
constexpr int64_t kSerialElements = 16384;
// Kernels may read an operand's rows in groups of so many.
constexpr int64_t kTileRows = 16;

class PackedMatrix final : public Matrix {
 public:
  PackedMatrix(int64_t outputs, int64_t inputs, DType dtype, int64_t panel, int64_t input_step)
      : layout{dtype, outputs, inputs, panel, dtype == DType::kBFloat16 ? round_up(inputs, input_step) : inputs},
        data(layout.panels() * layout.panel_elements() * size_of(dtype)) {
    n = outputs;
    k = inputs;
  }
  int64_t bytes() const override { return static_cast<int64_t>(data.bytes()); }
  char* panel(int64_t index) const { return data.as<char>() + index * layout.panel_elements() * size_of(layout.dtype); }

  PanelLayout layout;
  Buffer data;
};

class QuantizedMatrix final : public Matrix {
 public:
  QuantizedMatrix(int64_t outputs, int64_t inputs, WeightFormat format, int64_t panel)
      : layout{format, outputs, inputs, panel}, data(layout.panels() * layout.panel_bytes()) {
    n = outputs;
    k = inputs;
  }
  int64_t bytes() const override { return static_cast<int64_t>(data.bytes()); }

  uint8_t* panel(int64_t index) const { return data.as<uint8_t>() + index * layout.panel_bytes(); }

  cpu::QuantizedLayout layout;
  Buffer data;
};

class CpuBackend final : public Backend {
 public:
  explicit CpuBackend(int threads)
      : kernels_(cpu::select_kernels()), pool_(threads), scratch_(pool_.size()), attention_(kernels_, pool_) {}

  const char* name() const override { return kernels_.name; }
  int threads() const override { return pool_.size(); }
  DType activations() const override { return DType::kFloat32; }
  bool on_host() const override { return true; }
  int64_t depth() const override { return 1; }

  void enter_thread() noexcept override {}

  Buffer allocate(int64_t bytes) override { return Buffer(bytes); }
  Buffer allocate_host(int64_t bytes) override { return Buffer(bytes); }
  void upload(const void* from, void* to, int64_t bytes) override { copy(from, to, bytes); }
  void download(const void* from, void* to, int64_t bytes) override { copy(from, to, bytes); }

  std::unique_ptr<Matrix> make_matrix(int64_t n, int64_t k, WeightFormat format) override {
    FS_CHECK(format != WeightFormat::kFloat16, "the CPU holds no weights in float16: use bfloat16 or float32");
    if (is_quantized(format)) {
      cpu::check_quantized(format, k);
      return std::make_unique<QuantizedMatrix>(n, k, format, kernels_.panel);
    }
    const DType dtype = format == WeightFormat::kFloat32 ? DType::kFloat32 : DType::kBFloat16;
    return std::make_unique<PackedMatrix>(n, k, dtype, kernels_.panel, kernels_.input_step);
  }

  void load_rows(Matrix& target, int64_t first_row, int64_t rows, SourceType type, const void* source) override {
    const int64_t row_bytes = source_bytes(type, target.k), panel = kernels_.panel;
    const auto* bytes = static_cast<const char*>(source);
    const int64_t first_panel = first_row / panel, last_panel = ceil_div(first_row + rows, panel);
    auto* quantized = dynamic_cast<QuantizedMatrix*>(&target);
    if (quantized != nullptr) cpu::check_quantized_source(quantized->layout.format, type);
    pool_.run(last_panel - first_panel, [&](int64_t task, int thread) {
      const int64_t index = first_panel + task;
      const int64_t from = std::max(first_row, index * panel),
                    count = std::min(first_row + rows, (index + 1) * panel) - from;
      const void* given = bytes + (from - first_row) * row_bytes;
      if (quantized == nullptr || quantized->layout.format == WeightFormat::kInt8) {
        float* unpacked = scratch(thread, count * target.k);
        dequantize(type, given, count * target.k, unpacked);
        given = unpacked;
      }
      if (quantized != nullptr) {
        cpu::pack_quantized(quantized->layout, type, given, count, from - index * panel, quantized->panel(index));
      } else {
        auto& matrix = static_cast<PackedMatrix&>(target);
        kernels_.pack_panel(matrix.layout, static_cast<const float*>(given), count, from - index * panel,
                            matrix.panel(index));
      }
    });
  }

  int64_t block_bytes(const KvShape& shape) const override { return cpu::layout_of(shape).block_bytes(); }
  void set_kv_pool(const KvShape& shape, void* base) override { attention_.set_pool(cpu::layout_of(shape), base); }

  int64_t free_bytes() const override { return -1; }
  void reserve(int64_t, int64_t) override {}

  void move_blocks(bool, std::span<const BlockMove> moves) override {
    for (const BlockMove& move : moves) std::memcpy(move.to, move.from, move.bytes);
  }

  BatchSize begin(const Batch& batch) override {
    rows_.assign(batch.rows.begin(), batch.rows.end());
    token_ids_.assign(batch.token_ids.begin(), batch.token_ids.end());
    positions_.assign(batch.positions.begin(), batch.positions.end());
    logit_tokens_.assign(batch.logit_tokens.begin(), batch.logit_tokens.end());
    token_rows_.clear();
    for (const Row& row : rows_) token_rows_.insert(token_rows_.end(), row.tokens, &row);
    return {static_cast<int64_t>(token_ids_.size()), static_cast<int64_t>(logit_tokens_.size())};
  }
  int64_t filled_up(int64_t tokens) const override { return tokens; }
  void run(const std::function<void()>& body) override { body(); }
  void forget() override {}
  void end() override {}
  void wait() override {}
  bool done() const override { return true; }
  void when_done(std::function<void()> over) override { over(); }
  std::unique_ptr<DeviceCommunicator> connect(Communicator&, int, int, int64_t) override { return nullptr; }
  void drain() noexcept override {}

  void embed(const EmbedArgs& args) override {
    const Matrix& table = *args.table;
    const std::vector<int32_t>& ids = args.by == EmbeddedBy::kToken ? token_ids_ : positions_;
    const auto* quantized = dynamic_cast<const QuantizedMatrix*>(&table);
    split_rows(static_cast<int64_t>(ids.size()), table.k, [&](int64_t t) {
      float* output = args.output + t * args.ld;
      const int64_t row = ids[t] - args.first;
      if (row < 0 || row >= table.n) {
        if (!args.accumulate) std::fill_n(output, table.k, 0.0f);
      } else if (quantized != nullptr) {
        cpu::unpack_quantized(quantized->layout, quantized->panel(0), row, output, args.accumulate);
      } else {
        const auto& matrix = static_cast<const PackedMatrix&>(table);
        kernels_.unpack_row(matrix.layout, matrix.data.as<char>(), row, output, args.accumulate);
      }
    });
  }

  // In float32 throughout, as the reference implementations compute angles.
  void rotation_table(const float* inv_freq, int64_t half, float scale, float* output) override {
    for (const int32_t position : positions_) {
      for (int64_t i = 0; i < half; ++i) {
        const float angle = static_cast<float>(position) * inv_freq[i];
        output[i] = std::cos(angle) * scale;
        output[half + i] = std::sin(angle) * scale;
      }
      output += 2 * half;
    }
  }

  void gemm(const GemmArgs& args) override {
    if (args.m == 0) return;
    if (const auto* quantized = dynamic_cast<const QuantizedMatrix*>(args.weight)) {
      gemm_quantized(args, *quantized);
    } else {
      gemm_panels(args, static_cast<const PackedMatrix&>(*args.weight));
    }
    if (args.activation != nullptr) activate(*args.activation, output_of(args), args.m, args.ld_output);
  }

  void norm(const NormArgs& args) override {
    split_rows(args.rows, args.width, [&](int64_t row) {
      const float* x = args.input + (args.of_logits ? logit_tokens_[row] : row) * args.ld;
      float* y = static_cast<float*>(args.output) + row * args.ld;
      if (args.bias == nullptr) {
        kernels_.rms_norm(x, args.weight, y, args.width, args.eps);
      } else {
        kernels_.layer_norm(x, args.weight, args.bias, y, args.width, args.eps);
      }
    });
  }

  void rope_and_store(const RopeAndStoreArgs& args) override {
    const cpu::KvLayout& kv = attention_.layout();
    // One job's chunk may hold all tokens, or every job one.
    split_rows(static_cast<int64_t>(token_rows_.size()), (args.num_heads + 2 * kv.num_kv_heads) * kv.head_dim,
               [&](int64_t token) {
                 const Row& row = *token_rows_[token];
                 rotate_token(args, token);
                 attention_.store(args, row, token - row.first);
               });
  }

  void attention(const AttentionArgs& args) override { attention_.run(args, rows_); }

  void add(const float* input, float* output, int64_t count) override {
    split_rows(ceil_div(count, kPad), kPad, [&](int64_t piece) {
      const int64_t end = std::min(count, (piece + 1) * kPad);
      for (int64_t i = piece * kPad; i < end; ++i) output[i] += input[i];
    });
  }

  std::unique_ptr<TokenSampler> make_sampler(int64_t vocab_size) override {
    return make_host_sampler(pool_, vocab_size);
  }

 private:
  // Of no bytes from nowhere, too.
  static void copy(const void* from, void* to, int64_t bytes) {
    std::copy_n(static_cast<const std::byte*>(from), bytes, static_cast<std::byte*>(to));
  }

  static const float* input_of(const GemmArgs& args) { return static_cast<const float*>(args.input); }
  static float* output_of(const GemmArgs& args) { return static_cast<float*>(args.output); }

  void activate(const ActivationArgs& args, float* x, int64_t rows, int64_t ld) {
    split_rows(rows, args.width, [&](int64_t i) {
      float* row = x + i * ld;
      kernels_.activate(args.kind, row, args.gated ? row + round_up(args.width, kPad) : nullptr, args.width);
    });
  }

  void gemm_panels(const GemmArgs& args, const PackedMatrix& matrix) {
    const PanelLayout& layout = matrix.layout;
    const OperandLayout& form = layout.dtype == DType::kFloat32 ? kernels_.operand_f32 : kernels_.operand_bf16;
    const int64_t row_bytes = layout.k_padded * form.element_bytes;
    // Few rows leave too few chains of multiply-adds to hide their latency: 8 as 4 and 4, not as 6 and 2.
    const int64_t group_rows = form.level ? ceil_div(args.m, ceil_div(args.m, form.rows)) : std::min(form.rows, args.m);
    char* operand = reserve(operand_, round_up(args.m, group_rows) * row_bytes);
    split_rows(ceil_div(args.m, group_rows), layout.k * group_rows, [&](int64_t group) {
      const int64_t row = group * group_rows;
      kernels_.place_rows(layout, input_of(args) + row * args.ld_input, args.ld_input,
                          std::min(group_rows, args.m - row), group_rows, operand + row * row_bytes);
    });
    const GemmBlocks blocks = cut_gemm(layout, args.m, form.element_bytes, kernels_, threads());
    const int64_t panels = layout.panels(), partial_columns = ceil_div(panels, blocks.pieces) * layout.panel;
    pool_.run(blocks.row_blocks * blocks.pieces, [&](int64_t task, int thread) {
      // Neighbouring tasks share weights.
      const int64_t row = task % blocks.row_blocks * blocks.rows, share = task / blocks.row_blocks;
      const int64_t next_share = (task + threads()) / blocks.row_blocks;  // which this thread probably has next
      cpu::PanelGemm piece{.layout = &layout,
                           .weight = matrix.data.as<char>(),
                           .operand = operand + row * row_bytes,
                           .group_rows = group_rows,
                           .bias = args.bias,
                           .output = output_of(args) + row * args.ld_output,
                           .ld_output = args.ld_output,
                           .m = std::min(blocks.rows, args.m - row),
                           .first_panel = share * panels / blocks.pieces,
                           .last_panel = (share + 1) * panels / blocks.pieces,
                           .next_panel = next_share == share ? panels : next_share * panels / blocks.pieces,
                           .accumulate = args.accumulate,
                           .first_input = 0,
                           .last_input = 0,
                           .partial = nullptr,
                           .ld_partial = partial_columns + 16};
      if (blocks.inputs < layout.k_padded) {
        piece.partial = scratch(thread, round_up(blocks.rows, 32) * piece.ld_partial);
      }
      for (; piece.last_input < layout.k_padded; piece.first_input = piece.last_input) {
        piece.last_input = std::min(piece.first_input + blocks.inputs, layout.k_padded);
        kernels_.gemm(piece);
      }
    });
  }

  void gemm_quantized(const GemmArgs& args, const QuantizedMatrix& matrix) {
    const cpu::QuantizedLayout& layout = matrix.layout;
    const int64_t row_bytes = layout.operand_bytes(kernels_.quant_bytes);
    char* operand = reserve(operand_, round_up(args.m, kTileRows) * row_bytes);
    split_rows(args.m, layout.k, [&](int64_t row) {
      kernels_.quantize_input(layout, input_of(args) + row * args.ld_input, operand + row * row_bytes);
    });
    const int64_t panel_floats = round_up(layout.k, cpu::kBlockInputs) * layout.panel / 4;
    const int64_t panels = layout.panels();
    const int64_t pieces = cpu::panel_pieces(panels, args.m > kernels_.paired_rows ? 1 : 2, 1, threads());
    pool_.run(pieces, [&](int64_t piece, int thread) {
      kernels_.gemm_quantized({.layout = &layout,
                               .weight = matrix.panel(0),
                               .operand = operand,
                               .bias = args.bias,
                               .output = output_of(args),
                               .ld_output = args.ld_output,
                               .m = args.m,
                               .first_panel = piece * panels / pieces,
                               .last_panel = (piece + 1) * panels / pieces,
                               .next_panel = std::min(piece + threads(), pieces) * panels / pieces,
                               .accumulate = args.accumulate,
                               .scratch = reinterpret_cast<uint8_t*>(scratch(thread, panel_floats))});
    });
  }

  static char* reserve(Buffer& buffer, int64_t bytes) {
    if (static_cast<int64_t>(buffer.bytes()) < bytes) buffer = Buffer(bytes);
    return buffer.as<char>();
  }
  float* scratch(int thread, int64_t floats) {
    return reinterpret_cast<float*>(reserve(scratch_[thread], floats * sizeof(float)));
  }

  // Calls body(row) for every row, on the pool when there is enough to do.
  template <class Body>
  void split_rows(int64_t rows, int64_t width, Body body) {
    const int64_t step = std::max<int64_t>(1, kSerialElements / std::max<int64_t>(1, width) / 2);
    if (rows * width < kSerialElements) {
      for (int64_t row = 0; row < rows; ++row) body(row);
      return;
    }
    pool_.run(ceil_div(rows, step), [&](int64_t task, int) {
      for (int64_t row = task * step; row < std::min(rows, (task + 1) * step); ++row) body(row);
    });
  }

  void rotate_token(const RopeAndStoreArgs& args, int64_t token) const {
    const cpu::KvLayout& kv = attention_.layout();
    const auto prepare = [&](float* head, const float* norm) {
      if (norm != nullptr) kernels_.rms_norm(head, norm, head, kv.head_dim, args.eps);
      if (args.cos_sin != nullptr) {
        kernels_.rotate(head, args.cos_sin + token * 2 * args.rotary_half, args.rotary_half);
      }
    };
    float* head = static_cast<float*>(args.qkv) + token * args.ld;
    for (int64_t h = 0; h < args.num_heads; ++h, head += kv.head_dim) prepare(head, args.q_norm);
    for (int64_t h = 0; h < kv.num_kv_heads; ++h, head += kv.head_dim) prepare(head, args.k_norm);
  }

  const KernelTable& kernels_;
  ThreadPool pool_;
  std::vector<Buffer> scratch_;  // one a thread
  Buffer operand_;
  // The batch, and the row of every token.
  std::vector<Row> rows_;
  std::vector<int32_t> token_ids_, positions_, logit_tokens_;
  std::vector<const Row*> token_rows_;
  cpu::PagedAttention attention_;
};

}  // namespace

std::unique_ptr<Backend> make_cpu_backend(int threads) { return std::make_unique<CpuBackend>(threads); }

}  // namespace fastserve
