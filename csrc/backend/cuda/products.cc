#include "backend/cuda/products.h"

#include <optional>
#include <utility>

#include "backend/cuda/gemm_kernels.h"
#include "backend/cuda/warpgroup_trial.h"

namespace fastserve::cuda {

namespace {

void check_activation(const GemmArgs& args, const CudaMatrix& weight) {
  const ActivationArgs* const activation = args.activation;
  FS_CHECK(activation == nullptr || !args.wide, "what is activated is not float32");
  FS_CHECK(!weight.paired() || (activation != nullptr && activation->gated && activation->kind == Activation::kSilu &&
                                activation->width == weight.outputs() && args.bias == nullptr),
           "a gated matrix is for products with the activation that it was made for, without a bias");
}

}  // namespace

void Products::run(const GemmArgs& args) {
  if (args.m == 0) return;
  const auto& weight = static_cast<const CudaMatrix&>(*args.weight);
  check_activation(args, weight);
  const GemmCall call{.dtype = dtype_,
                      .input = args.input,
                      .ld_input = args.ld_input,
                      .weight = weight.view(),
                      .bias = args.bias,
                      .output = args.output,
                      .ld_output = args.ld_output,
                      .m = args.m,
                      .wide = args.wide,
                      .accumulate = args.accumulate,
                      .gated = weight.paired(),
                      .workspace = workspace_.as<void>()};
  const bool tried = dtype_ != DType::kFloat32 && !is_quantized(call.weight.format);
  if (tried && call.m >= kLeastWarpgroupRows) try_warpgroups_once();
  std::optional<const CublasShape*>& theirs = weight.theirs[call.wide ? 1 : 0];
  if (!theirs) theirs = tried ? find_theirs(call) : nullptr;
  if (*theirs == nullptr || !cublas_->gemm(**theirs, call, stream_)) gemm(call, stream_);
  if (args.activation == nullptr || call.gated) return;
  const auto& [kind, gated, width] = *args.activation;
  activate(dtype_, kind, gated, args.output, args.m, width, args.ld_output, stream_);
}

void Products::try_warpgroups_once() {
  if (!std::exchange(tried_warpgroups_, true)) try_warpgroups(dtype_, workspace_.as<void>(), stream_);
}

const CublasShape* Products::find_theirs(const GemmCall& call) {
  if (!std::exchange(sought_cublas_, true)) cublas_ = CublasLt::open();
  if (cublas_ == nullptr) return nullptr;
  try_warpgroups_once();                                     // first, since theirs must be faster than ours
  const bool finished = call.bias != nullptr || call.gated;  // a matrix either always has that or never
  return cublas_->choose({dtype_, call.weight.n, call.weight.k_padded, call.wide, finished}, call.m, call.workspace,
                         stream_);
}

}  // namespace fastserve::cuda
