// The state of a training on disk, so that an interrupted one continues to the same bytes; and its
// loss curve.
#ifndef QUANTMILL_HOST_RUN_TRAIN_TRAIN_STATE_H_
#define QUANTMILL_HOST_RUN_TRAIN_TRAIN_STATE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "core/formats/packed.h"
#include "core/tensor/backend.h"

namespace quantmill {

// How far a training has come.
struct TrainPosition {
  int64_t blocks = 0;           // finished in the phase `blocks`
  int64_t step = 0;             // finished of the phase end-to-end
  int64_t optimizer_steps = 0;  // of them, those that were not skipped
  int64_t skipped_in_row = 0;   // the last steps that were skipped
  // As WatchLoss keeps them: losses that were finite, means over the first and the last of them,
  // and the lowest mean.
  int64_t losses = 0;
  double first_loss = 0, recent_loss = 0, lowest_loss = 0;
};

class TrainState {
 public:
  explicit TrainState(std::string path) : path_(std::move(path)) {}

  bool Exists() const;
  // Writes the position and the tensors (on the backend's device) completely or not at all.
  absl::Status Save(Backend& backend, const TrainPosition& position,
                    const std::vector<NamedTensor>& tensors) const;
  absl::StatusOr<TrainPosition> Position() const;
  // Fills the tensors from the file. DATA_LOSS when it does not have one of them.
  absl::Status Load(Backend& backend, const std::vector<NamedTensor>& tensors) const;
  absl::Status Remove() const;

 private:
  std::string path_;
};

// JSON lines, one per step: phase, block, step, tokens, lr, loss, lm, kl, gradient_norm.
class LossLog {
 public:
  // Continues a file: what an interrupted run wrote behind the saved state is dropped. Lines of the
  // phase `blocks` of blocks below `blocks` are kept, and steps up to `step`.
  static absl::StatusOr<LossLog> Open(const std::string& path, const TrainPosition& position);
  absl::Status Add(const std::string& line);

 private:
  explicit LossLog(std::string path) : path_(std::move(path)) {}
  std::string path_;
};

}  // namespace quantmill

#endif  // QUANTMILL_HOST_RUN_TRAIN_TRAIN_STATE_H_
