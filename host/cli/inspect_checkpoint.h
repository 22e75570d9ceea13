// What a checkpoint directory, a safetensors or a GGUF file holds.
#ifndef QUANTMILL_HOST_CLI_INSPECT_CHECKPOINT_H_
#define QUANTMILL_HOST_CLI_INSPECT_CHECKPOINT_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"

namespace quantmill {

struct TensorGroup {
  std::string name;  // numbers of layers and experts replaced by '*'
  std::string dtype;
  std::string shape;
  int64_t count = 0;
  int64_t bytes = 0;
};

struct CheckpointSummary {
  std::string path;
  std::string model_type;    // empty for a lone file
  std::string quantization;  // scalars of quantization_config, "bits=4 quant_method=gptq ..."
  std::string quant_method;
  int64_t files = 0;
  int64_t tensors = 0;
  int64_t bytes = 0;
  int64_t packed_linears = 0;
  int64_t dense_linears = 0;
  double bits_per_weight = 0;       // of the packed linears, scales and all; 0 if there are none
  std::vector<TensorGroup> groups;  // in file order of their first tensor's name
};

// Reads headers only. A linear of the model counts as packed when its weight is absent or of an
// integer or 8-bit type: the rule needs no knowledge of the format. Of a GGUF file the tensors are
// listed as they are stored, whether or not their types can be computed with.
absl::StatusOr<CheckpointSummary> SummarizeCheckpoint(const std::string& directory);
absl::StatusOr<CheckpointSummary> SummarizeFile(const std::string& path);

std::string FormatSummary(const CheckpointSummary& summary);
nlohmann::ordered_json SummaryToJson(const CheckpointSummary& summary);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_CLI_INSPECT_CHECKPOINT_H_
