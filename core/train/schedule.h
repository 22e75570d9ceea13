// Learning rates over the steps of a training run.
#ifndef QUANTMILL_CORE_TRAIN_SCHEDULE_H_
#define QUANTMILL_CORE_TRAIN_SCHEDULE_H_

#include <cstdint>

namespace quantmill {

// Linear warm-up to `peak`, then half a cosine down to peak * floor (Loshchilov and Hutter 2017,
// equation 5, without restarts).
struct WarmupCosine {
  double peak = 1e-4;
  int64_t steps = 1;   // of the whole run
  int64_t warmup = 0;  // steps of them
  double floor = 0;    // last rate over the peak
  // Of step 1 .. steps; step `warmup` has the peak, step `steps` the floor.
  double Rate(int64_t step) const;
};

// Factor on gradients of this norm (the root of the sum of all squares) so that it is `limit` at
// most; 1 when limit <= 0. NaN and infinite norms give 0.
double ClipFactor(double norm, double limit);

}  // namespace quantmill

#endif  // QUANTMILL_CORE_TRAIN_SCHEDULE_H_
