#include "host/pipeline/keys.h"

#include <map>

namespace quantmill {
namespace {

using KeyMap = std::map<std::string, std::vector<std::string>>;

const KeyMap& AllBenchKeys() {
  static const auto* keys = new KeyMap{
      {"", {"version", "models", "plugins", "calibration", "evaluate", "run", "rows", "speed"}},
      {"models[]", {"name", "path", "dtype"}},
      {"run", {"device", "seed", "inputs", "on_error", "memory"}},
      {"rows[]", {"name", "stages", "export"}},
      {"rows[].export", {"format", "tensor_parallel"}},
      {"speed", {"prompt", "new_tokens", "batch"}},
  };
  return *keys;
}

const KeyMap& AllKeys() {
  static const auto* keys = new KeyMap{
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
      {"train", {"data",         "key",         "steps",           "tokens",       "sampled_tokens",
                 "batch",        "micro_batch", "sequence_length", "lr",           "lr_scale",
                 "lr_floor",     "loss",        "warmup",          "weight_decay", "clip_norm",
                 "beta1",        "average",     "norms",           "embeddings",   "checkpointing",
                 "block_tokens", "block_batch", "block_lr",        "save_seconds"}},
      {"export", {"format", "path", "tensor_parallel"}},
      {"evaluate", {"text", "context", "windows", "reference"}},
  };
  return *keys;
}

std::vector<std::string> Sections(const KeyMap& map) {
  std::vector<std::string> sections;
  for (const auto& [section, keys] : map) sections.push_back(section);
  return sections;
}

}  // namespace

const std::vector<std::string>& PipelineKeys(const std::string& section) {
  return AllKeys().at(section);
}

std::vector<std::string> PipelineSections() { return Sections(AllKeys()); }

const std::vector<std::string>& BenchKeys(const std::string& section) {
  return AllBenchKeys().at(section);
}

std::vector<std::string> BenchSections() { return Sections(AllBenchKeys()); }

}  // namespace quantmill
