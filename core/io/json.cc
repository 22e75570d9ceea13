#include "core/io/json.h"

#include <exception>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_set.h"
#include "core/base/status.h"
#include "core/io/files.h"

namespace quantmill {
namespace {

constexpr int kMaxDepth = 128;
constexpr absl::string_view kRemedy = "fix the file, or download it again";

absl::Status BadJson(absl::string_view source, absl::string_view why) {
  return absl::InvalidArgumentError(
      ErrorText(absl::StrCat("cannot read JSON from ", source), why, kRemedy));
}

// Brackets outside strings; a malformed text is left for the parser to report.
absl::Status CheckDepth(std::string_view text, absl::string_view source) {
  int depth = 0;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') ++i;
      if (c == '"') in_string = false;
      continue;
    }
    if (c == '"') in_string = true;
    if (c == '[' || c == '{') ++depth;
    if (c == ']' || c == '}') --depth;
    if (depth > kMaxDepth) {
      return BadJson(
          source, absl::StrCat("it is nested more than ", kMaxDepth, " levels deep at byte ", i));
    }
  }
  return absl::OkStatus();
}

// Library messages start with "[json.exception.NAME.NUMBER] ".
absl::string_view WithoutTag(absl::string_view message) {
  const size_t end = message.find("] ");
  return end == absl::string_view::npos ? message : message.substr(end + 2);
}

template <class Json>
absl::StatusOr<Json> ParseStrict(std::string_view text, absl::string_view source) {
  QM_RETURN_IF_ERROR(CheckDepth(text, source));
  std::vector<absl::flat_hash_set<std::string>> open_objects;
  bool found_duplicate = false;
  std::string duplicate;
  const auto callback = [&](int, typename Json::parse_event_t event, Json& parsed) {
    if (event == Json::parse_event_t::object_start) open_objects.emplace_back();
    if (event == Json::parse_event_t::object_end) open_objects.pop_back();
    if (event == Json::parse_event_t::key && !found_duplicate) {
      const std::string& key = parsed.template get_ref<const std::string&>();
      found_duplicate = !open_objects.back().insert(key).second;
      if (found_duplicate) duplicate = key;
    }
    return true;
  };
  try {
    Json json = Json::parse(text.begin(), text.end(), callback);
    if (found_duplicate) {
      return BadJson(source, absl::StrCat("key \"", duplicate, "\" appears twice in one object"));
    }
    return json;
  } catch (const std::exception& error) {
    return BadJson(source, WithoutTag(error.what()));
  }
}

}  // namespace

absl::StatusOr<nlohmann::json> ParseJson(std::string_view text, std::string_view source) {
  return ParseStrict<nlohmann::json>(text, AbslView(source));
}

absl::StatusOr<nlohmann::ordered_json> ParseOrderedJson(std::string_view text,
                                                        std::string_view source) {
  return ParseStrict<nlohmann::ordered_json>(text, AbslView(source));
}

absl::StatusOr<nlohmann::json> ReadJson(const std::string& path) {
  QM_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  return ParseJson(text, path);
}

absl::StatusOr<nlohmann::ordered_json> ReadOrderedJson(const std::string& path) {
  QM_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  return ParseOrderedJson(text, path);
}

}  // namespace quantmill
