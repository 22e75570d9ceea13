#include "host/pipeline/device.h"

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "core/base/nearest.h"
#include "core/base/status.h"

namespace quantmill {

absl::StatusOr<DeviceChoice> ParseDevice(const std::string& text) {
  if (text == "auto") return DeviceChoice{DeviceChoice::Kind::kAuto, 0};
  if (text == "cpu") return DeviceChoice{DeviceChoice::Kind::kCpu, 0};
  if (text == "cuda") return DeviceChoice{DeviceChoice::Kind::kCuda, 0};
  constexpr int kMostDevices = 1024;
  const bool digits = text.size() > 5 && text[5] >= '0' && text[5] <= '9';
  int index = 0;
  if (text.rfind("cuda:", 0) == 0 && digits && absl::SimpleAtoi(text.substr(5), &index) &&
      index < kMostDevices) {
    return DeviceChoice{DeviceChoice::Kind::kCuda, index};
  }
  const std::string nearest = NearestName(text, {"auto", "cpu", "cuda:0"});
  return absl::InvalidArgumentError(
      ErrorText(absl::StrCat("unknown device '", text, "'"), "write auto, cpu or cuda:N",
                nearest.empty() ? "" : absl::StrCat("did you mean '", nearest, "'?")));
}

}  // namespace quantmill
