#include <algorithm>
#include <optional>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/text/gguf_tokenizer.h"

namespace quantmill {
namespace {

using Json = nlohmann::json;

constexpr char kSpaceMark[] = "\xE2\x96\x81";

absl::Status Inexpressible(absl::string_view what) {
  return absl::FailedPreconditionError(
      ErrorText(absl::StrCat("tokenizer.json cannot be written into a GGUF file: ", what),
                "llama.cpp would cut text otherwise", "export as quantmill or dense"));
}

const Json& At(const Json& json, const char* key) {
  static const Json* const kNull = new Json(nullptr);
  const auto found = json.is_object() ? json.find(key) : json.end();
  return !json.is_object() || found == json.end() ? *kNull : *found;
}

bool FlagOf(const Json& json, const char* key, bool fallback) {
  const Json& value = At(json, key);
  return value.is_boolean() ? value.get<bool>() : fallback;
}

std::string TextOf(const Json& json, const char* key) {
  const Json& value = At(json, key);
  return value.is_string() ? value.get<std::string>() : "";
}

// A pre_tokenizer without what makes no difference: a Sequence of one step is that step, defaults
// are left out, and so are Split steps' regexes' wrappers.
Json Normal(const Json& json) {
  const std::string type = TextOf(json, "type");
  if (type == "Sequence") {
    Json steps = Json::array();
    for (const Json& step : At(json, "pretokenizers")) steps.push_back(Normal(step));
    return steps.size() == 1 ? steps[0] : steps;
  }
  if (type == "Split") {
    return {"Split", At(At(json, "pattern"), "Regex"), TextOf(json, "behavior"),
            FlagOf(json, "invert", false)};
  }
  if (type == "ByteLevel") {
    return {"ByteLevel", FlagOf(json, "add_prefix_space", true), FlagOf(json, "use_regex", true)};
  }
  if (type == "Digits") return {"Digits", FlagOf(json, "individual_digits", false)};
  return json;
}

absl::StatusOr<const GgufPreTokenizer*> MatchPreTokenizer(const Json& tokenizer) {
  const bool ignore_merges = FlagOf(At(tokenizer, "model"), "ignore_merges", false);
  const Json& normalizer = At(tokenizer, "normalizer");
  const bool nfc = TextOf(normalizer, "type") == "NFC";
  if (!nfc && !normalizer.is_null()) return Inexpressible("it has a normalizer");
  const Json wanted = Normal(At(tokenizer, "pre_tokenizer"));
  for (const GgufPreTokenizer& pre : GgufPreTokenizers()) {
    if (Normal(pre.json) == wanted && pre.ignore_merges == ignore_merges && pre.nfc == nfc) {
      return &pre;
    }
  }
  return Inexpressible("its pre_tokenizer is none that tokenizer.ggml.pre has a name for");
}

// One entry per id.
struct TokenTable {
  std::vector<std::string> texts;
  std::vector<double> types;
  absl::flat_hash_map<std::string, int64_t> ids;
};

bool LooksSpecial(const std::string& text) {
  return absl::StartsWith(text, "<|") && absl::EndsWith(text, "|>");
}

bool IsByte(const std::string& text) {
  return text.size() == 6 && absl::StartsWith(text, "<0x") && text.back() == '>';
}

absl::StatusOr<TokenTable> ReadTokens(const Json& tokenizer, int64_t vocab_size, bool bytes) {
  const auto number = [](GgufTokenType type) { return static_cast<double>(type); };
  TokenTable tokens;
  tokens.texts.resize(static_cast<size_t>(vocab_size));
  tokens.types.assign(static_cast<size_t>(vocab_size), number(GgufTokenType::kUnused));
  const auto put = [&](const std::string& text, const Json& id,
                       GgufTokenType type) -> absl::Status {
    if (!id.is_number_integer() || id < 0 || id >= vocab_size) {
      return Inexpressible(absl::StrCat("the id of token \"", text, "\" is not below the model's ",
                                        vocab_size, " rows"));
    }
    const auto index = id.get<size_t>();
    tokens.texts[index] = text;
    tokens.types[index] = number(type);
    tokens.ids[text] = id.get<int64_t>();
    return absl::OkStatus();
  };
  const Json& model = At(tokenizer, "model");
  const std::string unknown = TextOf(model, "unk_token");
  for (const auto& [text, id] : At(model, "vocab").items()) {
    const GgufTokenType type =
        bytes && IsByte(text) ? GgufTokenType::kByte : GgufTokenType::kNormal;
    QM_RETURN_IF_ERROR(put(text, id, type));
  }
  for (const Json& added : At(tokenizer, "added_tokens")) {
    const std::string text = TextOf(added, "content");
    const bool control = FlagOf(added, "special", false) || LooksSpecial(text);
    QM_RETURN_IF_ERROR(put(text, At(added, "id"),
                           control ? GgufTokenType::kControl : GgufTokenType::kUserDefined));
  }
  if (!unknown.empty() && tokens.ids.contains(unknown)) {
    tokens.types[static_cast<size_t>(tokens.ids[unknown])] = number(GgufTokenType::kUnknown);
  }
  for (size_t id = 0; id < tokens.texts.size(); ++id) {
    if (tokens.texts[id].empty()) tokens.texts[id] = absl::StrCat("[PAD", id, "]");
  }
  return tokens;
}

absl::StatusOr<std::vector<std::pair<std::string, std::string>>> ReadMerges(const Json& model) {
  std::vector<std::pair<std::string, std::string>> merges;
  for (const Json& merge : At(model, "merges")) {
    if (merge.is_string()) {
      const auto& text = merge.get_ref<const std::string&>();
      const size_t space = text.find(' ');
      if (space == std::string::npos) return Inexpressible("a merge has no space");
      merges.emplace_back(text.substr(0, space), text.substr(space + 1));
    } else if (merge.is_array() && merge.size() == 2 && merge[0].is_string() &&
               merge[1].is_string()) {
      merges.emplace_back(merge[0].get<std::string>(), merge[1].get<std::string>());
    } else {
      return Inexpressible("its merges are not pairs of strings");
    }
  }
  return merges;
}

// Id of the one token that the template puts before (after) a text; nullopt for none.
absl::StatusOr<std::optional<int64_t>> TokenAround(const Json& post, const TokenTable& tokens,
                                                   bool before) {
  std::optional<int64_t> found;
  const std::string type = TextOf(post, "type");
  if (type == "Sequence") {
    for (const Json& step : At(post, "processors")) {
      QM_ASSIGN_OR_RETURN(const auto more, TokenAround(step, tokens, before));
      if (more && found) return Inexpressible("it puts several tokens around a text");
      if (more) found = more;
    }
    return found;
  }
  if (type.empty() || type == "ByteLevel") return found;
  if (type != "TemplateProcessing") {
    return Inexpressible(absl::StrCat("it has a post_processor of type ", type));
  }
  bool text_seen = false;
  for (const Json& piece : At(post, "single")) {
    if (piece.is_object() && piece.contains("Sequence")) text_seen = true;
    const std::string name = TextOf(At(piece, "SpecialToken"), "id");
    if (name.empty() || text_seen == before) continue;
    const auto id = tokens.ids.find(name);
    if (id == tokens.ids.end() || found) {
      return Inexpressible("it puts several or unknown tokens around a text");
    }
    found = id->second;
  }
  return found;
}

// "TOKEN" or {"content": "TOKEN"} of tokenizer_config.json.
std::optional<int64_t> SpecialId(const Json& config, const char* key, const TokenTable& tokens) {
  const Json& value = At(config, key);
  const std::string text = value.is_string() ? value.get<std::string>() : TextOf(value, "content");
  const auto found = tokens.ids.find(text);
  if (text.empty() || found == tokens.ids.end()) return std::nullopt;
  return found->second;
}

absl::Status AddSpecial(const Json& tokenizer, const Json& config, const TokenTable& tokens,
                        GgufMetadata* metadata) {
  const Json& post = At(tokenizer, "post_processor");
  QM_ASSIGN_OR_RETURN(const auto before, TokenAround(post, tokens, /*before=*/true));
  QM_ASSIGN_OR_RETURN(const auto after, TokenAround(post, tokens, /*before=*/false));
  const auto bos = before ? before : SpecialId(config, "bos_token", tokens);
  const auto eos = after ? after : SpecialId(config, "eos_token", tokens);
  const auto add = [&](const char* key, std::optional<int64_t> id) {
    if (id) metadata->emplace_back(key, GgufValue::U32(*id));
  };
  add("tokenizer.ggml.bos_token_id", bos);
  add("tokenizer.ggml.eos_token_id", eos);
  const std::string unknown = TextOf(At(tokenizer, "model"), "unk_token");
  const auto found = tokens.ids.find(unknown);
  if (!unknown.empty() && found != tokens.ids.end()) {
    add("tokenizer.ggml.unknown_token_id", found->second);
  }
  add("tokenizer.ggml.padding_token_id", SpecialId(config, "pad_token", tokens));
  metadata->emplace_back("tokenizer.ggml.add_bos_token", GgufValue::Bool(before.has_value()));
  metadata->emplace_back("tokenizer.ggml.add_eos_token", GgufValue::Bool(after.has_value()));
  return absl::OkStatus();
}

// Whether a space is put before a text; an error if spaces do not become U+2581.
absl::StatusOr<bool> SpacePrefix(const Json& tokenizer) {
  const Json& pre = At(tokenizer, "pre_tokenizer");
  if (!pre.is_null()) {
    if (TextOf(pre, "type") != "Metaspace" || FlagOf(pre, "split", true)) {
      return Inexpressible("it cuts text before pieces are joined");
    }
    const std::string scheme = TextOf(pre, "prepend_scheme");
    return scheme.empty() ? FlagOf(pre, "add_prefix_space", true) : scheme != "never";
  }
  const Json& normalizer = At(tokenizer, "normalizer");
  const Json steps = TextOf(normalizer, "type") == "Sequence" ? At(normalizer, "normalizers")
                                                              : Json::array({normalizer});
  bool prefix = false, replaced = false;
  for (const Json& step : steps) {
    const std::string type = TextOf(step, "type");
    if (type == "Prepend" && TextOf(step, "prepend") == kSpaceMark) {
      prefix = true;
    } else if (type == "Replace" && TextOf(step, "content") == kSpaceMark) {
      replaced = true;
    } else {
      return Inexpressible("its normalizer does more than mark spaces");
    }
  }
  if (!replaced) return Inexpressible("it does not mark spaces");
  return prefix;
}

}  // namespace

absl::StatusOr<GgufMetadata> GgufTokenizer(const Json& tokenizer, const Json& tokenizer_config,
                                           int64_t vocab_size) {
  const Json& model = At(tokenizer, "model");
  const bool pieces = FlagOf(model, "byte_fallback", false);
  QM_ASSIGN_OR_RETURN(const TokenTable tokens, ReadTokens(tokenizer, vocab_size, pieces));
  QM_ASSIGN_OR_RETURN(const auto merges, ReadMerges(model));
  GgufMetadata metadata;
  const auto add = [&](const char* key, GgufValue value) {
    metadata.emplace_back(absl::StrCat("tokenizer.ggml.", key), std::move(value));
  };
  add("model", GgufValue::Text(pieces ? "llama" : "gpt2"));
  if (!pieces) {
    QM_ASSIGN_OR_RETURN(const GgufPreTokenizer* pre, MatchPreTokenizer(tokenizer));
    add("pre", GgufValue::Text(std::string(pre->names[0])));
  } else {
    add("pre", GgufValue::Text("default"));
  }
  add("tokens", {GgufValueType::kString, true, tokens.texts, {}});
  add("token_type", {GgufValueType::kI32, true, {}, tokens.types});
  if (pieces) {
    // Scores in the order of the merges; what no merge makes is never compared.
    std::vector<double> scores(tokens.texts.size(), 0.0);
    std::vector<bool> scored(scores.size(), false);
    for (size_t rank = 0; rank < merges.size(); ++rank) {
      const auto id = tokens.ids.find(merges[rank].first + merges[rank].second);
      if (id == tokens.ids.end()) return Inexpressible("a merge makes no token");
      const auto index = static_cast<size_t>(id->second);
      if (scored[index]) continue;
      scores[index] = -static_cast<double>(rank) - 1;
      scored[index] = true;
    }
    add("scores", {GgufValueType::kF32, true, {}, std::move(scores)});
    QM_ASSIGN_OR_RETURN(const bool prefix, SpacePrefix(tokenizer));
    add("add_space_prefix", GgufValue::Bool(prefix));
  } else {
    std::vector<std::string> lines;
    lines.reserve(merges.size());
    for (const auto& [left, right] : merges) lines.push_back(absl::StrCat(left, " ", right));
    add("merges", {GgufValueType::kString, true, std::move(lines), {}});
  }
  QM_RETURN_IF_ERROR(AddSpecial(tokenizer, tokenizer_config, tokens, &metadata));
  const std::string chat = TextOf(tokenizer_config, "chat_template");
  if (!chat.empty()) metadata.emplace_back("tokenizer.chat_template", GgufValue::Text(chat));
  return metadata;
}

}  // namespace quantmill
