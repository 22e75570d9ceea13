// The hidden states of many token windows of equal length, taken through a model block by block.
#ifndef QUANTMILL_CORE_MODEL_WINDOW_STATES_H_
#define QUANTMILL_CORE_MODEL_WINDOW_STATES_H_

#include <cstdint>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "core/model/decoder.h"
#include "core/tensor/backend.h"

namespace quantmill {

struct WindowRange {
  int64_t begin = 0, end = 0;
  int64_t count() const { return end - begin; }
};

// Windows are handled in batches of at most `batch_rows` rows, at least one window.
class WindowStates {
 public:
  WindowStates() = default;
  // The embeddings of `windows` (I32 [windows, length] on the host, ids in [0, vocab)). The states
  // live on the device or in host memory. INVALID_ARGUMENT names an id that is out of range.
  static absl::StatusOr<WindowStates> Embed(Backend& backend, const Tensor& windows,
                                            const Tensor& embedding, int64_t batch_rows,
                                            bool on_device);
  // Other memory with the same content.
  absl::StatusOr<WindowStates> Clone(Backend& backend) const;

  int64_t windows() const { return windows_; }
  int64_t length() const { return length_; }
  int64_t batches() const;
  WindowRange Batch(int64_t index) const;

  // A copy on the device: [range.count() * length, hidden].
  absl::StatusOr<Tensor> Load(Backend& backend, WindowRange range) const;
  absl::Status Store(Backend& backend, WindowRange range, const Tensor& hidden);

  // Load, RunBlock, Store for one batch.
  absl::Status Advance(Backend& backend, const ModelConfig& config, const BlockWeights& weights,
                       int64_t block, const RopeTables& rope, int64_t batch);

 private:
  Tensor states_;  // [windows * length, hidden]
  int64_t windows_ = 0;
  int64_t length_ = 0;
  int64_t batch_windows_ = 1;
  bool on_device_ = true;
};

}  // namespace quantmill

#endif  // QUANTMILL_CORE_MODEL_WINDOW_STATES_H_
