#include "core/text/post_processor.h"

#include <string>

#include "core/base/status.h"
#include "core/text/components.h"

namespace quantmill {
namespace {

constexpr char kPostProcessorName[] = "post_processor";

// The ids of the special token that a template names.
absl::StatusOr<std::vector<int32_t>> SpecialIds(const nlohmann::json& json,
                                                const std::string& name) {
  const nlohmann::json* ids = nullptr;
  if (json.contains("special_tokens") && json["special_tokens"].is_object()) {
    const auto& tokens = json["special_tokens"];
    const auto found = tokens.find(name);
    if (found != tokens.end() && found->is_object() && found->contains("ids")) {
      ids = &(*found)["ids"];
    }
  }
  if (ids == nullptr || !ids->is_array()) {
    return BadComponent(kPostProcessorName, absl::StrCat("has no ids for special token ", name));
  }
  std::vector<int32_t> result;
  for (const nlohmann::json& id : *ids) {
    if (!id.is_number_unsigned() || id.get<uint64_t>() > INT32_MAX) {
      return BadComponent(kPostProcessorName,
                          absl::StrCat("has a wrong id for special token ", name));
    }
    result.push_back(id.get<int32_t>());
  }
  return result;
}

absl::Status AddTemplate(const nlohmann::json& json, PostProcessor* result) {
  QM_ASSIGN_OR_RETURN(const auto* pieces, ListField(json, "single", kPostProcessorName));
  PostProcessor own;
  bool seen_text = false;
  for (const nlohmann::json& piece : *pieces) {
    if (!piece.is_object())
      return BadComponent(kPostProcessorName, "has a template piece of unknown form");
    if (piece.contains("Sequence")) {
      if (seen_text) return BadComponent(kPostProcessorName, "has a template with two texts");
      seen_text = true;
    } else if (piece.contains("SpecialToken") && piece["SpecialToken"].is_object()) {
      QM_ASSIGN_OR_RETURN(const std::string name,
                          StringField(piece["SpecialToken"], "id", kPostProcessorName));
      QM_ASSIGN_OR_RETURN(const std::vector<int32_t> ids, SpecialIds(json, name));
      std::vector<int32_t>& side = seen_text ? own.after : own.before;
      side.insert(side.end(), ids.begin(), ids.end());
    } else {
      return BadComponent(kPostProcessorName, "has a template piece of unknown form");
    }
  }
  if (!seen_text) return BadComponent(kPostProcessorName, "has a template without the text");
  // A later template of a sequence goes around an earlier one.
  result->before.insert(result->before.begin(), own.before.begin(), own.before.end());
  result->after.insert(result->after.end(), own.after.begin(), own.after.end());
  return absl::OkStatus();
}

absl::Status Add(const nlohmann::json& json, PostProcessor* result) {
  QM_ASSIGN_OR_RETURN(const std::string type, ComponentType(json, kPostProcessorName));
  if (type == "ByteLevel") return absl::OkStatus();
  if (type == "TemplateProcessing") return AddTemplate(json, result);
  if (type != "Sequence") return UnknownComponent(kPostProcessorName, type);
  QM_ASSIGN_OR_RETURN(const auto* list, ListField(json, "processors", kPostProcessorName));
  for (const nlohmann::json& item : *list) QM_RETURN_IF_ERROR(Add(item, result));
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<PostProcessor> PostProcessor::FromJson(const nlohmann::json& json) {
  PostProcessor result;
  if (!json.is_null()) QM_RETURN_IF_ERROR(Add(json, &result));
  return result;
}

}  // namespace quantmill
