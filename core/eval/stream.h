// Token windows through a whole model, one block of weights in memory at a time.
#ifndef QUANTMILL_CORE_EVAL_STREAM_H_
#define QUANTMILL_CORE_EVAL_STREAM_H_

#include <cstdint>
#include <functional>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "core/model/weights.h"
#include "core/model/window_states.h"
#include "core/tensor/backend.h"

namespace quantmill {

struct StreamOptions {
  // Windows are run together up to this many rows; at least one window.
  int64_t batch_rows = 2048;
  // Hidden states live on the device (else in host memory).
  bool hidden_on_device = true;
};

// Called when `done` of `total` steps are done; a status other than OK stops the work.
using StepProgress = std::function<absl::Status(int64_t done, int64_t total)>;

// Hidden states behind the last block (before the final norm). windows: I32 [windows, length] on
// the host. All windows go through a block before the next one is loaded: peak memory is a block
// and the states. One progress step per block.
absl::StatusOr<WindowStates> RunWindows(Backend& backend, WeightSource& model,
                                        const Tensor& windows, const StreamOptions& options,
                                        const StepProgress& progress = nullptr);

// The model's output layer, kept on the device.
class OutputHead {
 public:
  static absl::StatusOr<OutputHead> Load(Backend& backend, WeightSource& model);
  // Logits, F32 [rows, vocab] on the device, of hidden states behind the last block.
  absl::StatusOr<Tensor> Logits(Backend& backend, const Tensor& hidden) const;
  // Rows per call that keep one tile of logits at a moderate size.
  int64_t TileRows() const;
  static int64_t TileRows(int64_t vocab);

 private:
  const ModelConfig* config_ = nullptr;
  Tensor final_norm_;
  LinearWeight head_;
};

}  // namespace quantmill

#endif  // QUANTMILL_CORE_EVAL_STREAM_H_
