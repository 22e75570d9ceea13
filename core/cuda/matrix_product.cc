#include "core/cuda/matrix_product.h"

#include <algorithm>
#include <utility>

#include "core/base/status.h"
#include "core/cuda/cuda_status.h"

namespace quantmill::cuda {
namespace {

// Rows vary without end where tokens are routed to experts; past this many the cache starts anew.
constexpr size_t kMaxPlans = 4096;

cudaDataType_t DataType(DType dtype) {
  if (dtype == DType::kF16) return CUDA_R_16F;
  if (dtype == DType::kBF16) return CUDA_R_16BF;
  return CUDA_R_32F;
}

// The largest power of two up to 256 that divides the address.
uint32_t AlignmentOf(const void* pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  return static_cast<uint32_t>(std::min<uintptr_t>(256, address & (~address + 1)));
}

}  // namespace

MatrixProducts::Plan::~Plan() {
  if (operation != nullptr) cublasLtMatmulDescDestroy(operation);
  for (cublasLtMatrixLayout_t layout : {weight, x, out}) {
    if (layout != nullptr) cublasLtMatrixLayoutDestroy(layout);
  }
}

MatrixProducts::MatrixProducts(cudaStream_t stream, std::shared_ptr<void> workspace)
    : stream_(stream), workspace_(std::move(workspace)) {}

absl::StatusOr<std::unique_ptr<MatrixProducts>> MatrixProducts::Create(
    cudaStream_t stream, std::shared_ptr<void> workspace) {
  std::unique_ptr<MatrixProducts> products(new MatrixProducts(stream, std::move(workspace)));
  QM_RETURN_IF_ERROR(products->Open());
  return products;
}

absl::Status MatrixProducts::Open() {
  QM_CUBLAS_RETURN(cublasCreate(&cublas_));
  QM_CUBLAS_RETURN(cublasSetStream(cublas_, stream_));
  // After cublasSetStream, which resets it.
  QM_CUBLAS_RETURN(cublasSetWorkspace(cublas_, workspace_.get(), kWorkspaceBytes));
  QM_CUBLAS_RETURN(cublasSetMathMode(
      cublas_, static_cast<cublasMath_t>(CUBLAS_DEFAULT_MATH |
                                         CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION)));
  QM_CUBLAS_RETURN(cublasLtCreate(&lt_));
  return absl::OkStatus();
}

MatrixProducts::~MatrixProducts() {
  plans_.clear();
  if (lt_ != nullptr) cublasLtDestroy(lt_);
  if (cublas_ != nullptr) cublasDestroy(cublas_);
}

absl::Status MatrixProducts::MakePlan(const LinearProduct& p, const Key& key, Plan* plan) {
  // cuBLAS is column-major: a row-major [r, c] is its [c, r]. So out^T [n, rows] = weight^T^T x^T.
  const cudaDataType_t type = DataType(p.dtype);
  const cudaDataType_t out_type = DataType(p.out_dtype);
  const cublasOperation_t transpose = CUBLAS_OP_T;
  QM_CUBLAS_RETURN(cublasLtMatmulDescCreate(&plan->operation, CUBLAS_COMPUTE_32F, CUDA_R_32F));
  QM_CUBLAS_RETURN(cublasLtMatmulDescSetAttribute(plan->operation, CUBLASLT_MATMUL_DESC_TRANSA,
                                                  &transpose, sizeof(transpose)));
  QM_CUBLAS_RETURN(cublasLtMatrixLayoutCreate(&plan->weight, type, static_cast<uint64_t>(p.k),
                                              static_cast<uint64_t>(p.n), p.k));
  QM_CUBLAS_RETURN(cublasLtMatrixLayoutCreate(&plan->x, type, static_cast<uint64_t>(p.k),
                                              static_cast<uint64_t>(p.rows), p.k));
  QM_CUBLAS_RETURN(cublasLtMatrixLayoutCreate(&plan->out, out_type, static_cast<uint64_t>(p.n),
                                              static_cast<uint64_t>(p.rows), p.out_stride));

  cublasLtMatmulPreference_t raw = nullptr;
  QM_CUBLAS_RETURN(cublasLtMatmulPreferenceCreate(&raw));
  const std::unique_ptr<std::remove_pointer_t<cublasLtMatmulPreference_t>,
                        decltype(&cublasLtMatmulPreferenceDestroy)>
      preference(raw, &cublasLtMatmulPreferenceDestroy);
  const auto set = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
    return cublasLtMatmulPreferenceSetAttribute(raw, attribute, &value, sizeof(value));
  };
  QM_CUBLAS_RETURN(
      set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<uint64_t>(kWorkspaceBytes)));
  // Partial sums of a split product are added in f32, never in the output's type.
  QM_CUBLAS_RETURN(set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                       static_cast<uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE)));
  QM_CUBLAS_RETURN(set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, static_cast<uint32_t>(key[6])));
  QM_CUBLAS_RETURN(set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, static_cast<uint32_t>(key[7])));
  QM_CUBLAS_RETURN(set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, static_cast<uint32_t>(key[8])));
  QM_CUBLAS_RETURN(set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, static_cast<uint32_t>(key[8])));

  cublasLtMatmulHeuristicResult_t result = {};
  int found = 0;
  const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
      lt_, plan->operation, plan->weight, plan->x, plan->out, plan->out, raw, 1, &result, &found);
  plan->usable = status == CUBLAS_STATUS_SUCCESS && found > 0;
  plan->algorithm = result.algo;
  return absl::OkStatus();
}

absl::StatusOr<const MatrixProducts::Plan*> MatrixProducts::FindPlan(const LinearProduct& p) {
  const Key key = {p.rows,
                   p.n,
                   p.k,
                   p.out_stride,
                   static_cast<int64_t>(p.dtype),
                   static_cast<int64_t>(p.out_dtype),
                   AlignmentOf(p.weight),
                   AlignmentOf(p.x),
                   AlignmentOf(p.out)};
  const auto known = plans_.find(key);
  if (known != plans_.end()) return known->second.get();
  if (plans_.size() >= kMaxPlans) plans_.clear();
  auto plan = std::make_unique<Plan>();
  QM_RETURN_IF_ERROR(MakePlan(p, key, plan.get()));
  return plans_.emplace(key, std::move(plan)).first->second.get();
}

absl::Status MatrixProducts::Linear(const LinearProduct& p) {
  if (p.rows == 0 || p.n == 0) return absl::OkStatus();
  QM_ASSIGN_OR_RETURN(const Plan* plan, FindPlan(p));
  if (!plan->usable) {  // shapes or alignments cuBLASLt has nothing for
    return Gemm({false, true, p.rows, p.n, p.k, 1.0f, 0.0f, p.x, p.k, p.weight, p.k, p.out,
                 p.out_stride, p.dtype, p.out_dtype});
  }
  const float one = 1.0f;
  const float zero = 0.0f;
  QM_CUBLAS_RETURN(cublasLtMatmul(lt_, plan->operation, &one, p.weight, plan->weight, p.x, plan->x,
                                  &zero, p.out, plan->out, p.out, plan->out, &plan->algorithm,
                                  workspace_.get(), kWorkspaceBytes, stream_));
  return absl::OkStatus();
}

absl::Status MatrixProducts::Gemm(const GemmProduct& p) {
  if (p.m == 0 || p.n == 0) return absl::OkStatus();
  // Column-major: c^T = op(b)^T op(a)^T.
  const auto operation = [](bool transposed) { return transposed ? CUBLAS_OP_T : CUBLAS_OP_N; };
  QM_CUBLAS_RETURN(cublasGemmEx_64(cublas_, operation(p.trans_b), operation(p.trans_a), p.n, p.m,
                                   p.k, &p.alpha, p.b, DataType(p.dtype), p.b_stride, p.a,
                                   DataType(p.dtype), p.a_stride, &p.beta, p.c, DataType(p.c_dtype),
                                   p.c_stride, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
  return absl::OkStatus();
}

}  // namespace quantmill::cuda
