#include "core/train/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace quantmill {

double WarmupCosine::Rate(int64_t step) const {
  if (step <= warmup) return peak * static_cast<double>(step) / static_cast<double>(warmup);
  if (steps <= warmup) return peak;
  const double progress =
      std::min(1.0, static_cast<double>(step - warmup) / static_cast<double>(steps - warmup));
  return peak * (floor + (1 - floor) * 0.5 * (1 + std::cos(std::numbers::pi * progress)));
}

double ClipFactor(double norm, double limit) {
  if (!std::isfinite(norm)) return 0;
  return limit > 0 && norm > limit ? limit / norm : 1;
}

}  // namespace quantmill
