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
  ++position->losses;
  const double seen = static_cast<double>(std::min(position->losses, span));
  position->recent_loss += (loss - position->recent_loss) / seen;
  const double lowest = position->losses == 1
                            ? position->recent_loss
                            : std::min(position->lowest_loss, position->recent_loss);
  position->lowest_loss = lowest;
  if (position->losses <= span) {
    position->first_loss = position->recent_loss;
    return absl::OkStatus();
  }
  if (position->recent_loss <= kDivergedFactor * lowest ||
      position->recent_loss <= lowest + kDivergedNats) {
    return absl::OkStatus();
  }
  return absl::FailedPreconditionError(
      ErrorText(absl::StrCat("the training diverged at step ", position->step),
                absl::StrCat("the loss grew from ", lowest, " to ", position->recent_loss),
                "use a smaller train.lr, or more warmup"));
}

}  // namespace quantmill
