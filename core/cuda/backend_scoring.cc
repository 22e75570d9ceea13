// Scoring of logits and drawing from them, of the CUDA backend.
#include "core/base/status.h"
#include "core/cuda/cuda_backend.h"
#include "core/cuda/cuda_status.h"
#include "core/cuda/draw.cuh"
#include "core/cuda/score.cuh"

namespace quantmill::cuda {

absl::Status CudaBackend::ScoreRows(const Tensor& logits, const Tensor& targets, Tensor* nll,
                                    Tensor* argmax) {
  QM_RETURN_IF_ERROR(Enter());
  const Checker checks = Checks("score");
  QM_RETURN_IF_ERROR(checks.Matrix("logits", logits));
  const int64_t rows = logits.dim(0);
  QM_RETURN_IF_ERROR(checks.HostInput("targets", targets, DType::kI32, {rows}));
  QM_RETURN_IF_ERROR(checks.Indices("targets", targets, logits.dim(1)));
  QM_RETURN_IF_ERROR(checks.HostOutput("nll", nll, DType::kF32, {rows}));
  QM_RETURN_IF_ERROR(checks.HostOutput("argmax", argmax, DType::kI32, {rows}));
  if (rows == 0) return absl::OkStatus();
  QM_ASSIGN_OR_RETURN(const Tensor target, Upload(targets));
  QM_ASSIGN_OR_RETURN(const Tensor losses, Allocate(DType::kF32, {rows}));
  QM_ASSIGN_OR_RETURN(const Tensor best, Allocate(DType::kI32, {rows}));
  QM_CUDA_RETURN(LaunchScoreRows(logits.data(), logits.dtype(), target.as<int32_t>(), rows,
                                 logits.dim(1), losses.as<float>(), best.as<int32_t>(), work()));
  QM_RETURN_IF_ERROR(staging_->ToHost(losses.data(), nll->data(), losses.bytes()));
  return staging_->ToHost(best.data(), argmax->data(), best.bytes());
}

absl::Status CudaBackend::KlRows(const Tensor& reference, const Tensor& logits, Tensor* kl) {
  QM_RETURN_IF_ERROR(Enter());
  const Checker checks = Checks("kl");
  QM_RETURN_IF_ERROR(checks.Matrix("reference", reference));
  QM_RETURN_IF_ERROR(checks.Float("logits", logits, reference.shape()));
  const int64_t rows = reference.dim(0);
  QM_RETURN_IF_ERROR(checks.HostOutput("kl", kl, DType::kF32, {rows}));
  QM_RETURN_IF_ERROR(checks.Expect(reference.dim(1) > 0, "the vocabulary is empty"));
  if (rows == 0) return absl::OkStatus();
  QM_ASSIGN_OR_RETURN(const Tensor result, Allocate(DType::kF32, {rows}));
  QM_CUDA_RETURN(LaunchKlRows(reference.data(), reference.dtype(), logits.data(), logits.dtype(),
                              rows, reference.dim(1), result.as<float>(), work()));
  return staging_->ToHost(result.data(), kl->data(), result.bytes());
}

absl::Status CudaBackend::DrawRows(const Tensor& logits, const Tensor& excluded,
                                   const Tensor& uniforms, Tensor* tokens) {
  QM_RETURN_IF_ERROR(Enter());
  const Checker checks = Checks("draw");
  QM_RETURN_IF_ERROR(checks.Matrix("logits", logits));
  const int64_t rows = logits.dim(0), count = excluded.elements();
  QM_RETURN_IF_ERROR(checks.Expect(logits.dim(1) > 0, "the vocabulary is empty"));
  QM_RETURN_IF_ERROR(checks.HostInput("excluded", excluded, DType::kI32, {count}));
  QM_RETURN_IF_ERROR(checks.HostInput("uniforms", uniforms, DType::kF64, {rows}));
  QM_RETURN_IF_ERROR(checks.HostOutput("tokens", tokens, DType::kI32, {rows}));
  if (rows == 0) return absl::OkStatus();
  QM_ASSIGN_OR_RETURN(const Tensor without, Upload(excluded));
  QM_ASSIGN_OR_RETURN(const Tensor chances, Upload(uniforms));
  QM_ASSIGN_OR_RETURN(const Tensor drawn, Allocate(DType::kI32, {rows}));
  QM_CUDA_RETURN(LaunchDrawRows(logits.data(), logits.dtype(), without.as<int32_t>(),
                                static_cast<int>(count), chances.as<double>(), rows, logits.dim(1),
                                drawn.as<int32_t>(), work()));
  QM_RETURN_IF_ERROR(staging_->ToHost(drawn.data(), tokens->data(), drawn.bytes()));
  return AllDrawn(*tokens);
}

}  // namespace quantmill::cuda
