// What cublaslt_library.h says of cuBLASLt, beside the library's own header; linked with the library, which must have
// it.
#include <cublasLt.h>

#include <cstddef>

#include "backend/cuda/cublaslt_library.h"
#include "libraries/calls.h"

namespace fastserve::cuda::cublaslt {

static_assert(kSuccess == CUBLAS_STATUS_SUCCESS && kInvalidValue == CUBLAS_STATUS_INVALID_VALUE &&
              kNotSupported == CUBLAS_STATUS_NOT_SUPPORTED);
static_assert(kCompute32F == CUBLAS_COMPUTE_32F && kTransposed == CUBLAS_OP_T &&
              kNoReduction == CUBLASLT_REDUCTION_SCHEME_NONE);
static_assert(kTransposeA == CUBLASLT_MATMUL_DESC_TRANSA);
static_assert(kMaxWorkspace == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES &&
              kReductions == CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK);
static_assert(kFirstAlignment == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES &&
              kFirstAlignment + 1 == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES &&
              kFirstAlignment + 2 == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES &&
              kFirstAlignment + 3 == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES);
static_assert(kAlgorithmId == CUBLASLT_ALGO_CONFIG_ID && kTileId == CUBLASLT_ALGO_CONFIG_TILE_ID &&
              kStagesId == CUBLASLT_ALGO_CONFIG_STAGES_ID);

static_assert(sizeof(Algorithm) == sizeof(cublasLtMatmulAlgo_t));
static_assert(sizeof(Proposal) == sizeof(cublasLtMatmulHeuristicResult_t) &&
              offsetof(Proposal, algorithm) == offsetof(cublasLtMatmulHeuristicResult_t, algo) &&
              offsetof(Proposal, workspace) == offsetof(cublasLtMatmulHeuristicResult_t, workspaceSize) &&
              offsetof(Proposal, state) == offsetof(cublasLtMatmulHeuristicResult_t, state));

Functions linked() {
  return {.create = called_as<decltype(Functions::create)>(&cublasLtCreate),
          .destroy = called_as<decltype(Functions::destroy)>(&cublasLtDestroy),
          .version = called_as<decltype(Functions::version)>(&cublasLtGetVersion),
          .make_description = called_as<decltype(Functions::make_description)>(&cublasLtMatmulDescCreate),
          .drop_description = called_as<decltype(Functions::drop_description)>(&cublasLtMatmulDescDestroy),
          .set_description = called_as<decltype(Functions::set_description)>(&cublasLtMatmulDescSetAttribute),
          .make_layout = called_as<decltype(Functions::make_layout)>(&cublasLtMatrixLayoutCreate),
          .drop_layout = called_as<decltype(Functions::drop_layout)>(&cublasLtMatrixLayoutDestroy),
          .make_preference = called_as<decltype(Functions::make_preference)>(&cublasLtMatmulPreferenceCreate),
          .drop_preference = called_as<decltype(Functions::drop_preference)>(&cublasLtMatmulPreferenceDestroy),
          .set_preference = called_as<decltype(Functions::set_preference)>(&cublasLtMatmulPreferenceSetAttribute),
          .propose = called_as<decltype(Functions::propose)>(&cublasLtMatmulAlgoGetHeuristic),
          .look_at = called_as<decltype(Functions::look_at)>(&cublasLtMatmulAlgoConfigGetAttribute),
          .multiply = called_as<decltype(Functions::multiply)>(&cublasLtMatmul)};
}

}  // namespace fastserve::cuda::cublaslt
