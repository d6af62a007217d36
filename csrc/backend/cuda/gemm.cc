// gemm(): what it refuses, and which kernel it takes.
#include "backend/cuda/gemm_kernels.h"
#include "backend/cuda/runtime_api.h"
#include "backend/cuda/warpgroup_trial.h"

namespace fastserve::cuda {

namespace {

constexpr uintptr_t kVectorBytes = 16;  // of what is read at once

const char* name_of(DType dtype) {
  return dtype == DType::kFloat32 ? "float32" : dtype == DType::kBFloat16 ? "bfloat16" : "float16";
}
const char* name_of(WeightFormat format) {
  constexpr const char* kNames[] = {"float32", "bfloat16", "float16", "int8", "q8_0", "q4_0", "q4_1"};
  return kNames[static_cast<int>(format)];
}

void check_call(const GemmCall& call) {
  FS_CHECK(is_quantized(call.weight.format) || call.weight.format == format_of(call.dtype), "a product of ",
           name_of(call.dtype), " activations cannot have ", name_of(call.weight.format),
           " weights; theirs are quantized or of the activations' own type");
  FS_CHECK(call.weight.k_padded % kPad == 0 && call.ld_input % kPad == 0 && call.ld_output % kPad == 0,
           "rows of a product's operands are padded to a multiple of ", kPad, " elements; here they have ",
           call.weight.k_padded, ", ", call.ld_input, " and ", call.ld_output);
  FS_CHECK(call.ld_input >= call.weight.k_padded && call.ld_output >= (call.gated ? call.weight.n / 2 : call.weight.n),
           "a product of [", call.m, ", ", call.weight.k, "] and [", call.weight.n, ", ", call.weight.k,
           "] does not fit rows of ", call.ld_input, " and ", call.ld_output, " elements");
  FS_CHECK(call.wide || !call.accumulate, "a product is accumulated in float32 only");
  FS_CHECK(!call.gated || (call.weight.paired && !call.wide && call.bias == nullptr && call.dtype != DType::kFloat32),
           "a product whose outputs meet is of paired weights, in 16 bits, without a bias");
  FS_CHECK(reinterpret_cast<uintptr_t>(call.bias) % kVectorBytes == 0, "a product's bias is not at a multiple of ",
           kVectorBytes, " bytes");
}

int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

// One kind of device for the whole process: asked once.
const GemmDevice& this_device() {
  static const GemmDevice device{attribute(cudaDevAttrMultiProcessorCount),
                                 attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
  return device;
}

void run(const GemmCall& call, GemmKernel kernel, int processors, cudaStream_t stream) {
  if (geometry(kernel).way == GemmGeometry::Way::kWarpgroup) return gemm_warpgroup(call, kernel, processors, stream);
  (call.dtype == DType::kBFloat16 ? gemm_bf16 : gemm_f16)(call, kernel, stream);
}

GemmShape shape_of(const GemmCall& call) { return {call.m, call.weight.n, call.weight.k_padded, call.weight.format}; }
int64_t workspace_of(const GemmCall& call) { return call.workspace == nullptr ? 0 : kGemmWorkspace; }

}  // namespace

void gemm(const GemmCall& call, cudaStream_t stream) {
  check_call(call);
  if (call.m == 0) return;
  if (call.dtype == DType::kFloat32) return gemm_f32(call, stream);
  run(call, gemm_kernel(call, warpgroups_admitted(call.dtype)), this_device().processors, stream);
}

GemmKernel gemm_kernel(const GemmCall& call, bool warpgroups) {
  GemmDevice device = this_device();
  device.warpgroups = warpgroups && call.m >= kLeastWarpgroupRows;
  return choose_gemm(shape_of(call), device, workspace_of(call));
}

void gemm_with(GemmKernel kernel, const GemmCall& call, cudaStream_t stream, int processors) {
  check_call(call);
  if (call.m == 0) return;
  if (call.dtype == DType::kFloat32) return gemm_f32(call, stream);
  GemmDevice device = this_device();
  device.warpgroups = geometry(kernel).way == GemmGeometry::Way::kWarpgroup && has_warpgroups();
  FS_CHECK(can_run(kernel, shape_of(call), device, workspace_of(call)), "the kernel ", geometry(kernel).name,
           " cannot run a product of [", call.m, ", ", call.weight.k, "] and [", call.weight.n, ", ", call.weight.k,
           "] here");
  run(call, kernel, processors > 0 ? processors : device.processors, stream);
}

}  // namespace fastserve::cuda
