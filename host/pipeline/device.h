// How a device is written: auto, cpu, cuda, cuda:N.
#ifndef QUANTMILL_HOST_PIPELINE_DEVICE_H_
#define QUANTMILL_HOST_PIPELINE_DEVICE_H_

#include <string>

#include "absl/status/statusor.h"

namespace quantmill {

struct DeviceChoice {
  enum class Kind { kAuto, kCpu, kCuda };
  Kind kind = Kind::kAuto;
  int index = 0;  // kCuda
};

// "cuda" is cuda:0. INVALID_ARGUMENT lists what is allowed. Says nothing of what is installed.
absl::StatusOr<DeviceChoice> ParseDevice(const std::string& text);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_PIPELINE_DEVICE_H_
