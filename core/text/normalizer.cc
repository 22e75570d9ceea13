#include "core/text/normalizer.h"

#include <utf8proc.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <utility>

#include "core/base/status.h"
#include "core/text/components.h"

namespace quantmill {
namespace {

constexpr char kNormalizerName[] = "normalizer";

absl::StatusOr<std::string> UnicodeForm(std::string text, int options) {
  const bool ascii = std::all_of(text.begin(), text.end(),
                                 [](char c) { return static_cast<unsigned char>(c) < 0x80; });
  if (ascii) return text;
  utf8proc_uint8_t* mapped = nullptr;
  const utf8proc_ssize_t size =
      utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()),
                   static_cast<utf8proc_ssize_t>(text.size()), &mapped,
                   static_cast<utf8proc_option_t>(options | UTF8PROC_STABLE));
  const std::unique_ptr<utf8proc_uint8_t, void (*)(void*)> owner(mapped, std::free);
  if (size < 0) {
    return absl::InternalError(ErrorText("cannot normalize text", utf8proc_errmsg(size)));
  }
  return std::string(reinterpret_cast<const char*>(mapped), static_cast<size_t>(size));
}

// Options of utf8proc for a normalization form; -1 for another type.
int FormOptions(const std::string& type) {
  if (type == "NFC") return UTF8PROC_COMPOSE;
  if (type == "NFD") return UTF8PROC_DECOMPOSE;
  if (type == "NFKC") return UTF8PROC_COMPOSE | UTF8PROC_COMPAT;
  if (type == "NFKD") return UTF8PROC_DECOMPOSE | UTF8PROC_COMPAT;
  return -1;
}

}  // namespace

absl::StatusOr<Normalizer> Normalizer::FromJson(const nlohmann::json& json) {
  Normalizer normalizer;
  if (!json.is_null()) QM_RETURN_IF_ERROR(normalizer.Add(json));
  return normalizer;
}

absl::Status Normalizer::Add(const nlohmann::json& json) {
  QM_ASSIGN_OR_RETURN(const std::string type, ComponentType(json, kNormalizerName));
  if (const int options = FormOptions(type); options >= 0) {
    steps_.push_back([options](std::string text) { return UnicodeForm(std::move(text), options); });
  } else if (type == "Prepend") {
    QM_ASSIGN_OR_RETURN(const std::string prefix, StringField(json, "prepend", kNormalizerName));
    steps_.push_back([prefix](const std::string& text) -> absl::StatusOr<std::string> {
      return text.empty() ? text : prefix + text;
    });
  } else if (type == "Replace") {
    QM_ASSIGN_OR_RETURN(const auto pattern, PatternField(json, kNormalizerName));
    QM_ASSIGN_OR_RETURN(const std::string content, StringField(json, "content", kNormalizerName));
    steps_.push_back([pattern, content](const std::string& text) {
      return ReplaceMatches(*pattern, text, content);
    });
  } else if (type == "Sequence") {
    QM_ASSIGN_OR_RETURN(const auto* list, ListField(json, "normalizers", kNormalizerName));
    for (const nlohmann::json& item : *list) QM_RETURN_IF_ERROR(Add(item));
  } else {
    return UnknownComponent(kNormalizerName, type);
  }
  return absl::OkStatus();
}

absl::StatusOr<std::string> Normalizer::Apply(std::string text) const {
  for (const Step& step : steps_) {
    QM_ASSIGN_OR_RETURN(text, step(std::move(text)));
  }
  return text;
}

}  // namespace quantmill
