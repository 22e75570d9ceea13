// Which linears of a GGUF file are given as blocks: the types of its tensors stand for a
// quantization_config.
#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/checkpoint/config_kinds.h"
#include "core/checkpoint/gguf_export.h"
#include "core/io/gguf_tensors.h"

namespace quantmill {
namespace {

class GgufQuantization : public QuantizationConfig {
 public:
  absl::flat_hash_map<std::string, std::string> types;  // by slot

  std::string target() const override { return std::string(kGgufTarget); }

  absl::StatusOr<std::optional<SlotStorage>> Find(std::string_view slot) const override {
    const auto found = types.find(std::string(slot));
    if (found == types.end()) return std::optional<SlotStorage>();
    SlotStorage storage;
    storage.target = target();
    storage.config_json = absl::StrCat("{\"type\":\"", found->second, "\"}");
    storage.required = {"weight"};
    storage.exact = found->second != "Q4_1";  // whose minimum is rounded to F16
    return std::optional<SlotStorage>(std::move(storage));
  }
};

}  // namespace

ConfigPointer ReadGgufQuantization(const std::string& path) {
  QM_ASSIGN_OR_RETURN(const auto linears, GgufBlockLinears(path));
  if (linears.empty()) return std::shared_ptr<const QuantizationConfig>();
  auto config = std::make_shared<GgufQuantization>();
  for (const auto& [slot, type] : linears) config->types.emplace(slot, type);
  return std::shared_ptr<const QuantizationConfig>(std::move(config));
}

}  // namespace quantmill
