// Drawing from a discrete distribution.
#ifndef QUANTMILL_CORE_BASE_DRAW_H_
#define QUANTMILL_CORE_BASE_DRAW_H_

#include <cstddef>
#include <cstdint>

#include "absl/types/span.h"

namespace quantmill {

// The first index at which the sum of the weights up to it exceeds `wanted`; the last one with a
// weight where rounding leaves none, 0 where there is no weight.
inline int32_t IndexAt(absl::Span<const double> weights, double wanted) {
  size_t last = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    if (weights[i] == 0) continue;
    last = i;
    wanted -= weights[i];
    if (wanted < 0) break;
  }
  return static_cast<int32_t>(last);
}

}  // namespace quantmill

#endif  // QUANTMILL_CORE_BASE_DRAW_H_
