// In the place of cublaslt.cc where cuBLASLt was not found.
#include "backend/cuda/cublaslt.h"

namespace fastserve::cuda {

struct CublasLt::State {
  CublasReport report;
};

CublasLt::CublasLt() : state_(std::make_unique<State>()) {}
CublasLt::~CublasLt() = default;

bool CublasLt::available() { return false; }

std::string CublasReport::text() const { return "products are our own: this build has no cuBLASLt"; }

const CublasReport& CublasLt::tune(DType dtype, int64_t n, int64_t k_padded, bool wide, void*, cudaStream_t) {
  state_->report = {dtype, n, k_padded, wide, {}, {}, {-1, 0, {}}};
  return state_->report;
}

bool CublasLt::gemm(const GemmCall&, cudaStream_t) { return false; }

}  // namespace fastserve::cuda
