// Adapters in the files of PEFT (huggingface/peft: src/peft/utils/save_and_load.py):
// adapter_config.json and adapter_model.safetensors, whose tensors are named
// "base_model.model.<module>.<parameter>.weight".
#ifndef QUANTMILL_CORE_CHECKPOINT_PEFT_ADAPTER_H_
#define QUANTMILL_CORE_CHECKPOINT_PEFT_ADAPTER_H_

#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "core/formats/packed.h"
#include "core/model/config.h"
#include "nlohmann/json.hpp"

namespace quantmill {

// The name of the export format.
inline constexpr char kPeftTarget[] = "peft";

struct PeftAdapter {
  nlohmann::json config;
  // By module ("model.layers.0.mlp.up_proj"); names of parameters: "lora_A", "oft_R".
  std::map<std::string, std::vector<NamedTensor>> modules;
};

// Names for the config's target_modules: the last parts of the modules' names where they match
// these linears of the model and no other, else their whole names.
std::vector<std::string> PeftTargets(const ModelConfig& config,
                                     const std::vector<std::string>& modules);

// Writes the two files into an existing directory. Tensors on the host; config with all keys.
absl::Status WritePeftAdapter(const std::string& directory, const PeftAdapter& adapter);

// Tensors are views of the mapped file. NOT_FOUND without the files; INVALID_ARGUMENT for a tensor
// that is no parameter of a module.
absl::StatusOr<PeftAdapter> ReadPeftAdapter(const std::string& directory);

}  // namespace quantmill

#endif  // QUANTMILL_CORE_CHECKPOINT_PEFT_ADAPTER_H_
