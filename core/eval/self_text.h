// Text drawn from the model itself: for calibration without data, and as further text to train on.
#ifndef QUANTMILL_CORE_EVAL_SELF_TEXT_H_
#define QUANTMILL_CORE_EVAL_SELF_TEXT_H_

#include <cstdint>

#include "absl/status/statusor.h"
#include "core/eval/resident_model.h"
#include "core/model/config.h"
#include "core/tensor/backend.h"
#include "core/tensor/tensor.h"

namespace quantmill {

// Token windows I32 [samples, length] on the host. Every window begins with the beginning-of-text
// token, or, when the model has none, with a token drawn uniformly, and is continued by sampling at
// temperature 1. Special tokens (beginning and end of text) are never sampled: a calibration text
// has none either. Window i depends on seed and i alone up to rounding. One progress step per
// position of a batch.
absl::StatusOr<Tensor> SampleSelfText(const ResidentModel& model, int64_t samples, int64_t length,
                                      uint64_t seed, const StepProgress& progress = nullptr);

// The same with windows that begin with `beginnings`, I32 [samples, 1 .. length] on the host.
absl::StatusOr<Tensor> ContinueText(const ResidentModel& model, const Tensor& beginnings,
                                    int64_t length, uint64_t seed,
                                    const StepProgress& progress = nullptr);

// What drawing is done on, as far as its batches depend on it.
struct DrawingDevice {
  DType activation = DType::kF32;
  bool on_gpu = false;

  static DrawingDevice Of(const Backend& backend) {
    return {backend.activation_dtype(), backend.device().is_cuda()};
  }
};
// Windows that are sampled together: as many as keep their keys and values under 1 GiB and their
// logits under 64 MiB, but 32 at least. On a GPU, which a few hundred rows leave idle, both limits
// are four times as high.
int64_t WindowsAtOnce(const ModelConfig& config, int64_t length, DrawingDevice device);
// Bytes that drawing `windows` windows takes beside the model: keys, values and logits.
int64_t DrawingBytes(const ModelConfig& config, int64_t windows, int64_t length,
                     DrawingDevice device);

}  // namespace quantmill

#endif  // QUANTMILL_CORE_EVAL_SELF_TEXT_H_
