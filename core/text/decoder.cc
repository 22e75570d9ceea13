#include "core/text/decoder.h"

#include <charconv>
#include <optional>
#include <utility>

#include "absl/strings/str_join.h"
#include "core/base/status.h"
#include "core/text/components.h"
#include "core/text/unicode.h"

namespace quantmill {
namespace {

constexpr char kDecoderName[] = "decoder";
using Tokens = std::vector<std::string>;

absl::StatusOr<Tokens> DecodeByteLevel(const Tokens& tokens) {
  std::string bytes;
  for (const std::string& token : tokens) {
    // A token outside the alphabet (an added one) stands for itself.
    bytes += ByteLevelBytes(token).value_or(token);
  }
  return Tokens{LossyUtf8(bytes)};
}

// The byte of "<0xNN>".
std::optional<char> FallbackByte(const std::string& token) {
  if (token.size() != 6 || token.compare(0, 3, "<0x") != 0 || token[5] != '>') return std::nullopt;
  uint8_t value = 0;
  const auto [end, error] = std::from_chars(token.data() + 3, token.data() + 5, value, 16);
  if (error != std::errc() || end != token.data() + 5) return std::nullopt;
  return static_cast<char>(value);
}

// A run of byte tokens is text if it is UTF-8 as a whole, else one U+FFFD per byte.
absl::StatusOr<Tokens> DecodeByteFallback(const Tokens& tokens) {
  Tokens out;
  std::string run;
  const auto flush = [&out, &run] {
    if (run.empty()) return;
    if (IsUtf8(run)) {
      out.push_back(run);
    } else {
      out.insert(out.end(), run.size(), std::string(kReplacementCharacter));
    }
    run.clear();
  };
  for (const std::string& token : tokens) {
    if (const std::optional<char> byte = FallbackByte(token)) {
      run.push_back(*byte);
    } else {
      flush();
      out.push_back(token);
    }
  }
  flush();
  return out;
}

absl::StatusOr<Tokens> Fuse(const Tokens& tokens) { return Tokens{absl::StrJoin(tokens, "")}; }

// Removes up to `start` leading and `stop` trailing copies of `content`.
std::string StripEnds(std::string_view token, std::string_view content, size_t start, size_t stop) {
  for (; start > 0 && token.substr(0, content.size()) == content; --start) {
    token.remove_prefix(content.size());
  }
  for (; stop > 0 && token.size() >= content.size() &&
         token.substr(token.size() - content.size()) == content;
       --stop) {
    token.remove_suffix(content.size());
  }
  return std::string(token);
}

absl::StatusOr<size_t> CountField(const nlohmann::json& json, const char* key) {
  const auto found = json.find(key);
  if (found == json.end() || !found->is_number_unsigned()) {
    return BadComponent(kDecoderName, absl::StrCat("has no count \"", key, "\""));
  }
  return found->get<size_t>();
}

}  // namespace

absl::StatusOr<TokenDecoder> TokenDecoder::FromJson(const nlohmann::json& json) {
  TokenDecoder decoder;
  if (json.is_null()) {
    decoder.steps_.push_back(
        [](const Tokens& tokens) { return Tokens{absl::StrJoin(tokens, " ")}; });
    return decoder;
  }
  QM_RETURN_IF_ERROR(decoder.Add(json));
  return decoder;
}

absl::Status TokenDecoder::Add(const nlohmann::json& json) {
  QM_ASSIGN_OR_RETURN(const std::string type, ComponentType(json, kDecoderName));
  if (type == "ByteLevel") {
    steps_.push_back(DecodeByteLevel);
  } else if (type == "ByteFallback") {
    steps_.push_back(DecodeByteFallback);
  } else if (type == "Fuse") {
    steps_.push_back(Fuse);
  } else if (type == "Replace") {
    return AddReplace(json);
  } else if (type == "Strip") {
    return AddStrip(json);
  } else if (type == "Metaspace") {
    return AddMetaspace(json);
  } else if (type == "Sequence") {
    QM_ASSIGN_OR_RETURN(const auto* list, ListField(json, "decoders", kDecoderName));
    for (const nlohmann::json& item : *list) QM_RETURN_IF_ERROR(Add(item));
  } else {
    return UnknownComponent(kDecoderName, type);
  }
  return absl::OkStatus();
}

absl::Status TokenDecoder::AddReplace(const nlohmann::json& json) {
  QM_ASSIGN_OR_RETURN(const auto pattern, PatternField(json, kDecoderName));
  QM_ASSIGN_OR_RETURN(const std::string content, StringField(json, "content", kDecoderName));
  steps_.push_back([pattern, content](Tokens tokens) -> absl::StatusOr<Tokens> {
    for (std::string& token : tokens) {
      QM_ASSIGN_OR_RETURN(token, ReplaceMatches(*pattern, token, content));
    }
    return tokens;
  });
  return absl::OkStatus();
}

absl::Status TokenDecoder::AddStrip(const nlohmann::json& json) {
  QM_ASSIGN_OR_RETURN(const std::string content, StringField(json, "content", kDecoderName));
  QM_ASSIGN_OR_RETURN(const size_t start, CountField(json, "start"));
  QM_ASSIGN_OR_RETURN(const size_t stop, CountField(json, "stop"));
  if (content.empty()) return BadComponent(kDecoderName, "Strip has an empty content");
  steps_.push_back([content, start, stop](Tokens tokens) {
    for (std::string& token : tokens) token = StripEnds(token, content, start, stop);
    return tokens;
  });
  return absl::OkStatus();
}

absl::Status TokenDecoder::AddMetaspace(const nlohmann::json& json) {
  QM_ASSIGN_OR_RETURN(const std::string mark, StringField(json, "replacement", kDecoderName));
  QM_ASSIGN_OR_RETURN(bool prefixed, BoolField(json, "add_prefix_space", true, kDecoderName));
  if (json.contains("prepend_scheme")) prefixed = json["prepend_scheme"] != "never";
  const auto marks = Regex::Literal(mark);
  steps_.push_back([marks, prefixed](Tokens tokens) -> absl::StatusOr<Tokens> {
    for (size_t i = 0; i < tokens.size(); ++i) {
      const char* space = i == 0 && prefixed ? "" : " ";
      QM_ASSIGN_OR_RETURN(tokens[i], ReplaceMatches(*marks, tokens[i], space));
    }
    return tokens;
  });
  return absl::OkStatus();
}

absl::StatusOr<std::string> TokenDecoder::Decode(Tokens tokens) const {
  for (const Step& step : steps_) {
    QM_ASSIGN_OR_RETURN(tokens, step(std::move(tokens)));
  }
  return LossyUtf8(absl::StrJoin(tokens, ""));
}

}  // namespace quantmill
