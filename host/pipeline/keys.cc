#include "host/pipeline/keys.h"

#include <map>

namespace quantmill {
namespace {

const std::map<std::string, std::vector<std::string>>& AllKeys() {
  static const auto* keys = new std::map<std::string, std::vector<std::string>>{
      {"", {"version", "model", "plugins", "calibration", "run", "stages", "export", "evaluate"}},
      {"model", {"path", "dtype"}},
      {"calibration", {"text", "key", "samples", "sequence_length", "join", "order", "seed"}},
      {"run", {"device", "seed", "work_dir", "inputs", "on_error", "memory"}},
      {"run.memory", {"device", "host"}},
      {"stages[]",
       {"name", "use", "options", "layers", "overrides", "on_error", "optional", "requantize",
        "train"}},
      {"overrides[]", {"layers", "options"}},
      {"on_error", {"use", "options"}},
      {"train",
       {"data", "steps", "tokens", "batch", "sequence_length", "lr", "lr_scale", "loss", "warmup",
        "checkpointing"}},
      {"export", {"format", "path", "tensor_parallel"}},
      {"evaluate", {"text", "context", "windows", "reference"}},
  };
  return *keys;
}

}  // namespace

const std::vector<std::string>& PipelineKeys(const std::string& section) {
  return AllKeys().at(section);
}

std::vector<std::string> PipelineSections() {
  std::vector<std::string> sections;
  for (const auto& [section, keys] : AllKeys()) sections.push_back(section);
  return sections;
}

}  // namespace quantmill
