// Reading small JSON objects: parameters of formats, descriptions that other tools keep in files.
// Uses the standard library alone.
#ifndef QUANTMILL_SDK_JSON_HPP_
#define QUANTMILL_SDK_JSON_HPP_

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstddef>
#include <map>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

namespace qm {

// One member of an object. Which of the fields counts depends on the kind.
struct JsonValue {
  // What the text held.
  enum class Kind { kNull, kBool, kNumber, kString, kList, kObject };
  Kind kind = Kind::kNull;      // which of them this is
  bool truth = false;           // kBool
  double number = 0.0;          // kNumber, finite
  std::string text;             // kString
  bool empty = true;            // kList, kObject; what objects hold is checked and dropped
  bool numeric = true;          // kList: of numbers alone, which are in
  std::vector<double> numbers;  // kList
};

// The members of an object by their names.
using JsonObject = std::map<std::string, JsonValue>;

// Characters that strings give by number ("u" and four digits): not taken, or taken as '?'.
enum class JsonUnicode { kRefuse, kReplace };

namespace internal {

class JsonReader {
 public:
  JsonReader(std::string_view text, JsonUnicode unicode) : rest_(text), unicode_(unicode) {}

  bool AtEnd() {
    SkipSpace();
    return rest_.empty();
  }

  // The members of an object; out may be null.
  bool Object(int depth, bool* empty, JsonObject* out) {
    if (depth > kMostDepth || !Take('{')) return false;
    *empty = Take('}');
    if (*empty) return true;
    do {
      std::string key;
      JsonValue value;
      if (!String(&key) || !Take(':') || !Value(depth, &value)) return false;
      if (out != nullptr && !out->emplace(std::move(key), std::move(value)).second) return false;
    } while (Take(','));
    return Take('}');
  }

 private:
  static constexpr int kMostDepth = 32;

  void SkipSpace() {
    rest_.remove_prefix(std::min(rest_.find_first_not_of(" \t\r\n"), rest_.size()));
  }

  // Skips white space, then takes `c` if it comes next.
  bool Take(char c) {
    SkipSpace();
    if (rest_.empty() || rest_.front() != c) return false;
    rest_.remove_prefix(1);
    return true;
  }

  bool Word(std::string_view word) {
    if (rest_.substr(0, word.size()) != word) return false;
    rest_.remove_prefix(word.size());
    return true;
  }

  bool Value(int depth, JsonValue* out) {
    SkipSpace();
    if (rest_.empty()) return false;
    switch (rest_.front()) {
      case '{':
        out->kind = JsonValue::Kind::kObject;
        return Object(depth + 1, &out->empty, nullptr);
      case '[':
        out->kind = JsonValue::Kind::kList;
        return List(depth + 1, out);
      case '"':
        out->kind = JsonValue::Kind::kString;
        return String(&out->text);
      case 'n':
        return Word("null");
      case 't':
      case 'f':
        out->kind = JsonValue::Kind::kBool;
        out->truth = rest_.front() == 't';
        return Word(out->truth ? "true" : "false");
      default:
        out->kind = JsonValue::Kind::kNumber;
        return Number(&out->number);
    }
  }

  bool List(int depth, JsonValue* out) {
    if (depth > kMostDepth || !Take('[')) return false;
    out->empty = Take(']');
    if (out->empty) return true;
    do {
      JsonValue value;
      if (!Value(depth, &value)) return false;
      out->numeric = out->numeric && value.kind == JsonValue::Kind::kNumber;
      out->numbers.push_back(value.number);
    } while (Take(','));
    return Take(']');
  }

  bool Number(double* out) {
    // from_chars also reads what JSON does not have: nan, inf.
    if (rest_.front() != '-' && (rest_.front() < '0' || rest_.front() > '9')) return false;
    const auto [end, error] = std::from_chars(rest_.data(), rest_.data() + rest_.size(), *out);
    if (error != std::errc() || !std::isfinite(*out)) return false;
    rest_.remove_prefix(static_cast<std::size_t>(end - rest_.data()));
    return true;
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

  bool Escape(char* out) {
    constexpr std::string_view kFrom = "\"\\/bfnrt", kTo = "\"\\/\b\f\n\r\t";
    if (rest_.empty()) return false;
    const char letter = rest_.front();
    rest_.remove_prefix(1);
    if (letter == 'u') {
      const std::string_view digits = rest_.substr(0, 4);
      if (unicode_ == JsonUnicode::kRefuse || digits.size() != 4 ||
          digits.find_first_not_of("0123456789abcdefABCDEF") != std::string_view::npos) {
        return false;
      }
      rest_.remove_prefix(4);
      *out = '?';
      return true;
    }
    const std::size_t at = kFrom.find(letter);
    if (at == std::string_view::npos) return false;
    *out = kTo[at];
    return true;
  }

  std::string_view rest_;
  const JsonUnicode unicode_;
};

}  // namespace internal

// False for anything but one JSON object with distinct keys, nested at most 32 deep.
inline bool ParseJsonObject(std::string_view text, JsonUnicode unicode, JsonObject* out) {
  out->clear();
  internal::JsonReader reader(text, unicode);
  bool empty = false;
  return reader.Object(1, &empty, out) && reader.AtEnd();
}

}  // namespace qm

#endif  // QUANTMILL_SDK_JSON_HPP_
