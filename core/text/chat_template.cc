#include "core/text/chat_template.h"

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/io/files.h"
#include "core/io/json.h"

namespace quantmill {
namespace {

// A token in tokenizer_config.json is a text, or an object with the text in `content`.
std::string TokenText(const nlohmann::json& json, const char* key) {
  if (!json.is_object() || !json.contains(key)) return "";
  const nlohmann::json& token = json[key];
  if (token.is_string()) return token.get<std::string>();
  if (token.is_object() && token.contains("content") && token["content"].is_string()) {
    return token["content"].get<std::string>();
  }
  return "";
}

// `chat_template` is a text, or a list of named ones of which "default" counts.
std::string TemplateText(const nlohmann::json& json) {
  if (!json.is_object() || !json.contains("chat_template")) return "";
  const nlohmann::json& value = json["chat_template"];
  if (value.is_string()) return value.get<std::string>();
  if (!value.is_array()) return "";
  for (const nlohmann::json& entry : value) {
    if (TokenText(entry, "name") == "default") return TokenText(entry, "template");
  }
  return "";
}

}  // namespace

ChatTemplate RecognizeChatTemplate(std::string_view jinja, std::string_view eos) {
  const auto has = [&](const char* marker) { return absl::StrContains(AbslView(jinja), marker); };
  if (has("<|start_header_id|>") && has("<|eot_id|>")) {
    return {"llama3", "<|start_header_id|>user<|end_header_id|>\n\n",
            "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>",
            "<|eot_id|>"};
  }
  if (has("<|im_start|>") && has("<|im_end|>")) {
    return {"chatml", "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n",
            "<|im_end|>"};
  }
  const std::string end(eos);
  if (has("[INST]") && has("[/INST]")) return {"inst", "[INST] ", " [/INST]", end, end};
  if (has("<|user|>") && has("<|assistant|>")) {
    return {"zephyr", "<|user|>\n", absl::StrCat(end, "\n<|assistant|>\n"), absl::StrCat(end, "\n"),
            end};
  }
  return {};
}

absl::StatusOr<ChatTemplate> ReadChatTemplate(const std::string& directory) {
  const std::string config_file = directory + "/tokenizer_config.json";
  const std::string jinja_file = directory + "/chat_template.jinja";
  nlohmann::json config;
  if (FileExists(config_file)) {
    QM_ASSIGN_OR_RETURN(config, ReadJson(config_file));
  }
  std::string text = TemplateText(config);
  if (FileExists(jinja_file)) {
    QM_ASSIGN_OR_RETURN(text, ReadFile(jinja_file));
  }
  return RecognizeChatTemplate(text, TokenText(config, "eos_token"));
}

}  // namespace quantmill
