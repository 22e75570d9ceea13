// How a config.json says which linears are packed and how, for the checkpoint formats ("targets")
// quantmill reads and writes. Key names and defaults of other programs' files:
// transformers src/transformers/utils/quantization_config.py, gptqmodel/quantization/config.py,
// compressed-tensors src/compressed_tensors/quantization/quant_config.py.
#ifndef QUANTMILL_CORE_CHECKPOINT_QUANTIZATION_CONFIG_H_
#define QUANTMILL_CORE_CHECKPOINT_QUANTIZATION_CONFIG_H_

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"

namespace quantmill {

// Targets every packed format can be written as, without a format plugin: the native format and
// dequantized weights.
inline constexpr std::string_view kNativeTarget = "quantmill";
inline constexpr std::string_view kDenseTarget = "dense";

// Targets ExportCheckpoint writes and OpenModel reads ("dense" is written only: what it writes is
// an original checkpoint).
const std::vector<std::string>& CheckpointTargets();

// How one slot is stored.
struct SlotStorage {
  std::string target;       // "gptq", "gptq_v2", "compressed-tensors" or "quantmill"
  std::string config_json;  // the target's per-layer parameters (native: the format's), keys
                            // sorted, no spaces
  std::string format_id;    // native target only
  // Tensor names without the layer prefix. The native format takes every tensor of the layer.
  std::vector<std::string> required;
  std::vector<std::string> optional;
  // Of targets whose readers tell modules that were left out by their tensors: a layer with a
  // `weight` and without this one is dense, whatever the config says. "" = the config decides.
  std::string marker;
  // False: the target rounds what it stores, so that other programs compute with slightly other
  // values than were made.
  bool exact = true;
};

// A parsed `quantization_config`.
class QuantizationConfig {
 public:
  virtual ~QuantizationConfig() = default;
  // "gptq", "gptq_v2", "compressed-tensors" or "quantmill".
  virtual std::string target() const = 0;
  // How the slot ("model.layers.3.mlp.down_proj", "lm_head") is stored; nullopt = dense.
  virtual absl::StatusOr<std::optional<SlotStorage>> Find(std::string_view slot) const = 0;
};

// `json`: the object itself. INVALID_ARGUMENT names the key that is missing or wrong;
// UNIMPLEMENTED lists the supported methods.
absl::StatusOr<std::shared_ptr<const QuantizationConfig>> ParseQuantizationConfig(
    const nlohmann::ordered_json& json);

// The `quantization_config` of config.json (of a GGUF file, what the types of its tensors say),
// else quantize_config.json or quant_config.json (older GPTQ and AWQ files); null for an original
// checkpoint.
absl::StatusOr<std::shared_ptr<const QuantizationConfig>> ReadQuantizationConfig(
    const std::string& directory);

// What became of one linear, for composing a config.
struct SlotEntry {
  std::string name;
  bool packed = false;
  std::string config_json;  // as SlotStorage; of packed slots
  std::string format_id;    // native target
};

// The `quantization_config` of an export. `slots`: every linear of the model in order, dense ones
// included, and lm_head. At least one must be packed.
absl::StatusOr<nlohmann::ordered_json> ComposeQuantizationConfig(
    std::string_view target, const std::vector<SlotEntry>& slots);

}  // namespace quantmill

#endif  // QUANTMILL_CORE_CHECKPOINT_QUANTIZATION_CONFIG_H_
