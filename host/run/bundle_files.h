// Parts of the files that a failed call leaves: fields of call.json, and tensors.
#ifndef QUANTMILL_HOST_RUN_BUNDLE_FILES_H_
#define QUANTMILL_HOST_RUN_BUNDLE_FILES_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "core/formats/packed.h"
#include "core/tensor/backend.h"
#include "host/worker/call.h"
#include "nlohmann/json.hpp"

namespace quantmill {

// Names of files in the folder of a failed call.
inline constexpr char kCallFile[] = "/call.json";
inline constexpr char kStatisticsFile[] = "/statistics.safetensors";

// System errors as SafetensorsWriter's.
absl::Status WriteBundleTensors(const std::string& path, const std::vector<NamedTensor>& tensors,
                                Backend& backend);

// Reads fields of call.json; the first that is missing or of another type is kept as an error.
class FieldReader {
 public:
  FieldReader(const nlohmann::json& json, std::string path) : json_(json), path_(std::move(path)) {}

  std::string Text(const char* key);
  int64_t Integer(const char* key);
  uint64_t Unsigned(const char* key);
  DType Type(const char* key);
  ResolvedOptions Options(const char* key);
  std::vector<std::string> Texts(const char* key);
  // Lists of as many whole numbers each as `width` says.
  std::vector<std::vector<int64_t>> Table(const char* key, size_t width);
  std::vector<DType> Types(const char* key);
  const absl::Status& status() const { return status_; }

 private:
  void Fail(const char* key);

  const nlohmann::json& json_;
  std::string path_;
  absl::Status status_;
};

}  // namespace quantmill

#endif  // QUANTMILL_HOST_RUN_BUNDLE_FILES_H_
