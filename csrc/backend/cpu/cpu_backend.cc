#include "backend/cpu/cpu_backend.h"

#include <algorithm>
#include <vector>

#include "backend/cpu/gemm_blocks.h"
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

  std::unique_ptr<Matrix> make_matrix(int64_t n, int64_t k, WeightFormat format) override {
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

  void set_kv_pool(const KvLayout& layout, void* base) override { attention_.set_pool(layout, base); }

  void embed(const Matrix& table, const int32_t* token_ids, int64_t tokens, float* output, int64_t ld,
             bool accumulate) override {
    const auto zeros = [&](int64_t t) {
      if (token_ids[t] >= 0) return false;
      if (!accumulate) std::fill_n(output + t * ld, table.k, 0.0f);
      return true;
    };
    if (const auto* quantized = dynamic_cast<const QuantizedMatrix*>(&table)) {
      split_rows(tokens, table.k, [&](int64_t t) {
        if (zeros(t)) return;
        cpu::unpack_quantized(quantized->layout, quantized->panel(0), token_ids[t], output + t * ld, accumulate);
      });
      return;
    }
    const auto& matrix = static_cast<const PackedMatrix&>(table);
    split_rows(tokens, matrix.k, [&](int64_t t) {
      if (zeros(t)) return;
      kernels_.unpack_row(matrix.layout, matrix.data.as<char>(), token_ids[t], output + t * ld, accumulate);
    });
  }

  void gemm(const GemmArgs& args) override {
    if (args.m == 0) return;
    if (const auto* quantized = dynamic_cast<const QuantizedMatrix*>(args.weight))
      return gemm_quantized(args, *quantized);
    const auto& matrix = static_cast<const PackedMatrix&>(*args.weight);
    const PanelLayout& layout = matrix.layout;
    const OperandLayout& form = layout.dtype == DType::kFloat32 ? kernels_.operand_f32 : kernels_.operand_bf16;
    const int64_t row_bytes = layout.k_padded * form.element_bytes;
    // Few rows leave too few chains of multiply-adds to hide their latency: 8 as 4 and 4, not as 6 and 2.
    const int64_t group_rows = form.level ? ceil_div(args.m, ceil_div(args.m, form.rows)) : std::min(form.rows, args.m);
    char* operand = reserve(operand_, round_up(args.m, group_rows) * row_bytes);
    split_rows(ceil_div(args.m, group_rows), layout.k * group_rows, [&](int64_t group) {
      const int64_t row = group * group_rows;
      kernels_.place_rows(layout, args.input + row * args.ld_input, args.ld_input, std::min(group_rows, args.m - row),
                          group_rows, operand + row * row_bytes);
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
                           .output = args.output + row * args.ld_output,
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

  void norm(const NormArgs& args) override {
    split_rows(args.rows, args.width, [&](int64_t row) {
      const float* x = args.input + row * args.ld;
      float* y = args.output + row * args.ld;
      if (args.bias == nullptr) {
        kernels_.rms_norm(x, args.weight, y, args.width, args.eps);
      } else {
        kernels_.layer_norm(x, args.weight, args.bias, y, args.width, args.eps);
      }
    });
  }

  void rope_and_store(const RopeAndStoreArgs& args) override {
    const KvLayout& kv = attention_.layout();
    // One job's chunk may hold all tokens, or every job one.
    token_rows_.clear();
    for (int64_t r = 0; r < args.num_rows; ++r) token_rows_.insert(token_rows_.end(), args.rows[r].tokens, r);
    split_rows(static_cast<int64_t>(token_rows_.size()), (args.num_heads + 2 * kv.num_kv_heads) * kv.head_dim,
               [&](int64_t token) {
                 const Row& row = args.rows[token_rows_[token]];
                 rotate_token(args, token);
                 attention_.store(args, row, token - row.first);
               });
  }

  void attention(const AttentionArgs& args) override { attention_.run(args); }

  void activate(Activation kind, bool gated, float* x, int64_t tokens, int64_t width, int64_t ld) override {
    split_rows(tokens, width, [&](int64_t t) {
      float* row = x + t * ld;
      kernels_.activate(kind, row, gated ? row + round_up(width, kPad) : nullptr, width);
    });
  }

  void add(const float* input, float* output, int64_t count) override {
    split_rows(ceil_div(count, kPad), kPad, [&](int64_t piece) {
      const int64_t end = std::min(count, (piece + 1) * kPad);
      for (int64_t i = piece * kPad; i < end; ++i) output[i] += input[i];
    });
  }

  const LogitKernels& logit_kernels() const override { return kernels_.logits; }

  void parallel_for(int64_t count, void (*body)(void*, int64_t, int), void* context) override {
    pool_.run(count, [&](int64_t i, int thread) { body(context, i, thread); });
  }

 private:
  void gemm_quantized(const GemmArgs& args, const QuantizedMatrix& matrix) {
    const cpu::QuantizedLayout& layout = matrix.layout;
    const int64_t row_bytes = layout.operand_bytes(kernels_.quant_bytes);
    char* operand = reserve(operand_, round_up(args.m, kTileRows) * row_bytes);
    split_rows(args.m, layout.k, [&](int64_t row) {
      kernels_.quantize_input(layout, args.input + row * args.ld_input, operand + row * row_bytes);
    });
    const int64_t panel_floats = round_up(layout.k, cpu::kBlockInputs) * layout.panel / 4;
    const int64_t panels = layout.panels();
    const int64_t pieces = cpu::panel_pieces(panels, args.m > kernels_.paired_rows ? 1 : 2, 1, threads());
    pool_.run(pieces, [&](int64_t piece, int thread) {
      kernels_.gemm_quantized({.layout = &layout,
                               .weight = matrix.panel(0),
                               .operand = operand,
                               .bias = args.bias,
                               .output = args.output,
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
    const KvLayout& kv = attention_.layout();
    const auto prepare = [&](float* head, const float* norm) {
      if (norm != nullptr) kernels_.rms_norm(head, norm, head, kv.head_dim, args.eps);
      if (args.cos_sin != nullptr) {
        kernels_.rotate(head, args.cos_sin + token * 2 * args.rotary_half, args.rotary_half);
      }
    };
    float* head = args.qkv + token * args.ld;
    for (int64_t h = 0; h < args.num_heads; ++h, head += kv.head_dim) prepare(head, args.q_norm);
    for (int64_t h = 0; h < kv.num_kv_heads; ++h, head += kv.head_dim) prepare(head, args.k_norm);
  }

  const KernelTable& kernels_;
  ThreadPool pool_;
  std::vector<Buffer> scratch_;  // one a thread
  Buffer operand_;
  std::vector<int64_t> token_rows_;  // the row of every token
  cpu::PagedAttention attention_;
};

}  // namespace

std::unique_ptr<Backend> make_cpu_backend(int threads) { return std::make_unique<CpuBackend>(threads); }

}  // namespace fastserve
