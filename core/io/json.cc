#include "core/io/json.h"

#include <exception>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_set.h"
#include "core/base/status.h"
#include "core/io/files.h"

namespace quantmill {
namespace {

constexpr size_t kMaxDepth = 128;
constexpr absl::string_view kRemedy = "fix the file, or download it again";

absl::Status BadJson(absl::string_view source, absl::string_view why) {
  return absl::InvalidArgumentError(
      ErrorText(absl::StrCat("cannot read JSON from ", source), why, kRemedy));
}

// Library messages start with "[json.exception.NAME.NUMBER] ".
absl::string_view WithoutTag(absl::string_view message) {
  const size_t end = message.find("] ");
  return end == absl::string_view::npos ? message : message.substr(end + 2);
}

// Walks a document without building it and keeps the first objection. A pass of its own: the
// library's parser with callbacks takes quadratic time on an object with many objects in it.
class Checker final : public nlohmann::json_sax<nlohmann::json> {
 public:
  const std::string& objection() const { return objection_; }

  bool null() override { return true; }
  bool boolean(bool) override { return true; }
  bool number_integer(number_integer_t) override { return true; }
  bool number_unsigned(number_unsigned_t) override { return true; }
  bool number_float(number_float_t, const string_t&) override { return true; }
  bool string(string_t&) override { return true; }
  bool binary(binary_t&) override { return true; }
  bool start_object(size_t) override { return Open(); }
  bool end_object() override { return Close(); }
  bool start_array(size_t) override { return Open(); }
  bool end_array() override { return Close(); }
  bool key(string_t& name) override {
    if (open_.back().insert(name).second) return true;
    objection_ = absl::StrCat("key \"", name, "\" appears twice in one object");
    return false;
  }
  bool parse_error(size_t, const std::string&, const nlohmann::json::exception& error) override {
    objection_ = std::string(WithoutTag(error.what()));
    return false;
  }

 private:
  bool Open() {
    open_.emplace_back();
    if (open_.size() <= kMaxDepth) return true;
    objection_ = absl::StrCat("it is nested more than ", kMaxDepth, " levels deep");
    return false;
  }
  bool Close() {
    open_.pop_back();
    return true;
  }

  std::vector<absl::flat_hash_set<std::string>> open_;  // keys seen; empty for arrays
  std::string objection_;
};

template <class Json>
absl::StatusOr<Json> ParseStrict(std::string_view text, absl::string_view source) {
  try {
    Checker checker;
    if (!nlohmann::json::sax_parse(text.begin(), text.end(), &checker)) {
      return BadJson(source, checker.objection());
    }
    return Json::parse(text.begin(), text.end());
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
