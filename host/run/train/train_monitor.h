// Watches losses: not finite, or growing.
#ifndef QUANTMILL_HOST_RUN_TRAIN_TRAIN_MONITOR_H_
#define QUANTMILL_HOST_RUN_TRAIN_TRAIN_MONITOR_H_

#include <cstdint>

#include "absl/status/status.h"
#include "host/run/train/train_state.h"

namespace quantmill {

// Steps whose gradient or loss is not finite are skipped by the optimizer; so many in a row end the
// training.
inline constexpr int64_t kMostSkipped = 10;
// Losses are averaged over about this many steps, or a quarter of a short training.
inline constexpr int64_t kMonitorSteps = 20;
// Diverged: the average is this many times the lowest so far, and above it by this much. Not that
// of the first steps, which may have exploded already.
inline constexpr double kDivergedFactor = 4;
inline constexpr double kDivergedNats = 1;

// Takes the loss of step position->step (counted from 1) of `steps` into the position.
// FAILED_PRECONDITION when the training has failed, saying what to change.
absl::Status WatchLoss(double loss, bool skipped, int64_t steps, TrainPosition* position);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_RUN_TRAIN_TRAIN_MONITOR_H_
