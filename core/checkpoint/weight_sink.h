// Where an export puts its tensors.
#ifndef QUANTMILL_CORE_CHECKPOINT_WEIGHT_SINK_H_
#define QUANTMILL_CORE_CHECKPOINT_WEIGHT_SINK_H_

#include <string_view>

#include "absl/status/status.h"
#include "core/tensor/tensor.h"

namespace quantmill {

class WeightSink {
 public:
  virtual ~WeightSink() = default;
  // A whole tensor of the declared ones, in any order, from host memory.
  virtual absl::Status Write(std::string_view name, const Tensor& tensor) = 0;
  // Makes the files appear under their names.
  virtual absl::Status Finish() = 0;
};

}  // namespace quantmill

#endif  // QUANTMILL_CORE_CHECKPOINT_WEIGHT_SINK_H_
