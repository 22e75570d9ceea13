#include "host/run/train/train_monitor.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"

namespace quantmill {

absl::Status WatchLoss(double loss, bool skipped, int64_t steps, TrainPosition* position) {
  if (skipped || !std::isfinite(loss)) {
    if (++position->skipped_in_row < kMostSkipped) return absl::OkStatus();
    return absl::FailedPreconditionError(ErrorText(
        absl::StrCat("the training failed at step ", position->step),
        absl::StrCat("the loss or its gradients were not finite ", kMostSkipped, " steps in a row"),
        "use a smaller train.lr, or more warmup"));
  }
  position->skipped_in_row = 0;
  const int64_t span = std::clamp<int64_t>(steps / 4, 1, kMonitorSteps);
  const double seen = static_cast<double>(std::min(position->step, span));
  position->recent_loss += (loss - position->recent_loss) / seen;
  if (position->step <= span) {
    position->first_loss = position->recent_loss;
    return absl::OkStatus();
  }
  if (position->recent_loss <= kDivergedFactor * position->first_loss ||
      position->recent_loss <= position->first_loss + kDivergedNats) {
    return absl::OkStatus();
  }
  return absl::FailedPreconditionError(ErrorText(
      absl::StrCat("the training diverged at step ", position->step),
      absl::StrCat("the loss grew from ", position->first_loss, " to ", position->recent_loss),
      "use a smaller train.lr, or more warmup"));
}

}  // namespace quantmill
