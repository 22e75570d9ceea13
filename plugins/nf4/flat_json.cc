#include "flat_json.h"

#include <charconv>
#include <cmath>

namespace quantmill::nf4 {
namespace {

class Reader {
 public:
  explicit Reader(std::string_view text) : rest_(text) {}

  // Skips white space, then takes `c` if it comes next.
  bool Take(char c) {
    SkipSpace();
    if (rest_.empty() || rest_.front() != c) return false;
    rest_.remove_prefix(1);
    return true;
  }

  bool AtEnd() {
    SkipSpace();
    return rest_.empty();
  }

  bool String(std::string* out) {
    if (!Take('"')) return false;
    while (!rest_.empty()) {
      char c = rest_.front();
      rest_.remove_prefix(1);
      if (c == '"') return true;
      if (static_cast<unsigned char>(c) < 0x20) return false;
      if (c == '\\' && !Escape(&c)) return false;
      out->push_back(c);
    }
    return false;
  }

  bool Number(double* out) {
    SkipSpace();
    // from_chars also reads what JSON does not have: nan, inf.
    if (rest_.empty() || (rest_.front() != '-' && (rest_.front() < '0' || rest_.front() > '9'))) {
      return false;
    }
    const auto [end, error] = std::from_chars(rest_.data(), rest_.data() + rest_.size(), *out);
    if (error != std::errc() || !std::isfinite(*out)) return false;
    rest_.remove_prefix(static_cast<size_t>(end - rest_.data()));
    return true;
  }

  bool Value(JsonValue* out) {
    SkipSpace();
    if (rest_.empty()) return false;
    if (rest_.front() == '"') {
      out->kind = JsonValue::Kind::kString;
      return String(&out->text);
    }
    if (rest_.front() == '[') return Numbers(out);
    for (const std::string_view word : {"null", "true", "false"}) {
      if (rest_.substr(0, word.size()) != word) continue;
      rest_.remove_prefix(word.size());
      out->kind = JsonValue::Kind::kOther;
      return true;
    }
    out->kind = JsonValue::Kind::kNumber;
    out->numbers.assign(1, 0.0);
    return Number(&out->numbers[0]);
  }

 private:
  void SkipSpace() {
    const size_t end = rest_.find_first_not_of(" \t\r\n");
    rest_.remove_prefix(end == std::string_view::npos ? rest_.size() : end);
  }

  bool Escape(char* out) {
    constexpr std::string_view kFrom = "\"\\/bfnrt", kTo = "\"\\/\b\f\n\r\t";
    const size_t at = rest_.empty() ? std::string_view::npos : kFrom.find(rest_.front());
    if (at == std::string_view::npos) return false;
    *out = kTo[at];
    rest_.remove_prefix(1);
    return true;
  }

  bool Numbers(JsonValue* out) {
    out->kind = JsonValue::Kind::kNumbers;
    if (!Take('[')) return false;
    if (Take(']')) return true;
    do {
      double number = 0;
      if (!Number(&number)) return false;
      out->numbers.push_back(number);
    } while (Take(','));
    return Take(']');
  }

  std::string_view rest_;
};

}  // namespace

bool ParseFlatJson(std::string_view text, FlatJson* out) {
  out->clear();
  Reader reader(text);
  if (!reader.Take('{')) return false;
  if (reader.Take('}')) return reader.AtEnd();
  do {
    std::string key;
    JsonValue value;
    if (!reader.String(&key) || !reader.Take(':') || !reader.Value(&value)) return false;
    if (!out->emplace(std::move(key), std::move(value)).second) return false;
  } while (reader.Take(','));
  return reader.Take('}') && reader.AtEnd();
}

}  // namespace quantmill::nf4
