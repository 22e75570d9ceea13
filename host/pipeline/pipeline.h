// A pipeline file as data (schema: docs/schema/pipeline.schema.json). Parsing checks everything
// that can be known from the file alone; check.h checks it against plugins and model.
#ifndef QUANTMILL_HOST_PIPELINE_PIPELINE_H_
#define QUANTMILL_HOST_PIPELINE_PIPELINE_H_

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "core/tensor/dtype.h"
#include "nlohmann/json.hpp"

namespace quantmill {

// Where something stands in the pipeline file; line and column count from 1.
struct SourceLocation {
  std::string file;
  int line = 0;
  int column = 0;
  std::string ToString() const;  // "pipeline.yaml:12:5"
};

// An option as written, before it is checked against the method's table.
struct OptionValue {
  std::string text;  // scalar text: "4", "true", "nf4"
  SourceLocation location;
};
using OptionMap = std::map<std::string, OptionValue>;

struct Override {
  std::vector<std::string> layers;
  OptionMap options;
  SourceLocation location;
};

struct OnError {
  enum class Action { kStop, kKeepDense, kUse };
  Action action = Action::kStop;
  std::string use;    // kUse: the method to fall back to
  OptionMap options;  // kUse
};

struct Stage {
  std::string name;  // unique; default: the method's id
  std::string use;   // the method's id: "gptq", "awq.scale"
  OptionMap options;
  std::vector<std::string> layers = {"*"};
  std::vector<Override> overrides;  // first match wins
  OnError on_error;
  bool optional = false;
  bool requantize = false;
  nlohmann::json train;  // training methods only
  SourceLocation location;
  SourceLocation use_location;
  std::vector<SourceLocation> layer_locations;  // one per entry of layers when written
};

struct CalibrationSection {
  std::string text;  // absolute path, or "self"
  std::string key = "text";
  int64_t samples = 128;
  int64_t sequence_length = 2048;
  std::string join = "\n\n";
  bool random_order = false;
  uint64_t seed = 0;
  SourceLocation location;
};

struct Pipeline {
  std::string file;  // as given on the command line
  std::string model_path;
  std::optional<DType> model_dtype;  // compute type; nullopt = auto
  std::vector<std::string> plugins;  // extra plugin files
  std::optional<CalibrationSection> calibration;
  std::string device = "auto";  // auto | cpu | cuda:N
  uint64_t seed = 1;
  std::string work_dir;
  bool inputs_quantized = true;  // run.inputs
  OnError on_error;
  int64_t device_memory_limit = 0;  // bytes; 0 = what there is
  int64_t host_memory_limit = 0;
  std::vector<Stage> stages;
  std::string export_format;  // "gptq", ...
  std::string export_path;
  int64_t tensor_parallel = 1;
  struct Evaluate {
    std::string text;
    int64_t context = 2048;
    int64_t windows = 0;  // 0 = all
    bool reference = true;
  };
  std::optional<Evaluate> evaluate;
  std::map<std::string, SourceLocation> locations;  // of keys, e.g. "export.format"
};

// All errors found are returned in one status, one per line: "file:line:column: what; remedy".
// `sets`: --set a.b=value, applied before checking. Relative paths become absolute against the
// file's folder.
absl::StatusOr<Pipeline> ParsePipelineFile(const std::string& path,
                                           const std::vector<std::string>& sets = {});
absl::StatusOr<Pipeline> ParsePipelineText(const std::string& text, const std::string& file,
                                           const std::vector<std::string>& sets = {});

}  // namespace quantmill

#endif  // QUANTMILL_HOST_PIPELINE_PIPELINE_H_
