#include "core/text/regex.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <utility>

#include "core/base/status.h"

namespace quantmill {
namespace {

constexpr size_t kJitStackBytes = size_t{8} << 20;

// Exactly the White_Space property; PCRE2's own \s also takes U+180E.
constexpr char kSpaceRanges[] =
    R"(\x09-\x0d\x20\x85\xa0\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000})";

std::string ErrorMessage(int code) {
  unsigned char buffer[256] = {};
  pcre2_get_error_message(code, buffer, sizeof buffer);
  return reinterpret_cast<const char*>(buffer);
}

absl::Status BadPattern(absl::string_view pattern, absl::string_view why) {
  return absl::InvalidArgumentError(
      ErrorText(absl::StrCat("cannot use the regular expression ", pattern), why));
}

// Writes \s and \S out, and refuses what the two dialects read differently.
absl::StatusOr<std::string> Translate(const std::string& pattern) {
  std::string out;
  bool in_class = false;
  for (size_t i = 0; i < pattern.size(); ++i) {
    const char c = pattern[i];
    const char next = i + 1 < pattern.size() ? pattern[i + 1] : '\0';
    if (c == '\\') {
      ++i;
      if (next == 's') {
        absl::StrAppend(&out, in_class ? "" : "[", kSpaceRanges, in_class ? "" : "]");
      } else if (next == 'S' && !in_class) {
        absl::StrAppend(&out, "[^", kSpaceRanges, "]");
      } else {
        out += c;
        if (next != '\0') out += next;
      }
      continue;
    }
    if (in_class && c == '[' && next != ':') return BadPattern(pattern, "nested character classes");
    if (in_class && c == '&' && next == '&') return BadPattern(pattern, "intersected classes");
    if (c == '[' && !in_class) {
      in_class = true;
    } else if (c == '[') {  // [:name:]
      const size_t end = pattern.find(":]", i + 2);
      if (end == std::string::npos) return BadPattern(pattern, "unfinished class name");
      out += pattern.substr(i, end + 2 - i);
      i = end + 1;
      continue;
    } else if (c == ']') {
      in_class = false;
    }
    out += c;
  }
  return out;
}

struct FreeMatchData {
  void operator()(pcre2_match_data* data) const { pcre2_match_data_free(data); }
};
struct FreeContext {
  void operator()(pcre2_match_context* context) const { pcre2_match_context_free(context); }
};
struct FreeStack {
  void operator()(pcre2_jit_stack* stack) const { pcre2_jit_stack_free(stack); }
};

// One per thread: a stack that patterns with much backtracking need.
pcre2_match_context* MatchContext() {
  thread_local const std::unique_ptr<pcre2_jit_stack, FreeStack> stack(
      pcre2_jit_stack_create(size_t{32} << 10, kJitStackBytes, nullptr));
  thread_local const std::unique_ptr<pcre2_match_context, FreeContext> context = [] {
    std::unique_ptr<pcre2_match_context, FreeContext> made(pcre2_match_context_create(nullptr));
    pcre2_jit_stack_assign(made.get(), nullptr, stack.get());
    return made;
  }();
  return context.get();
}

}  // namespace

struct Regex::Compiled {
  explicit Compiled(pcre2_code* compiled_code) : code(compiled_code) {}
  ~Compiled() { pcre2_code_free(code); }
  Compiled(const Compiled&) = delete;
  Compiled& operator=(const Compiled&) = delete;
  pcre2_code* code;
};

Regex::~Regex() = default;

absl::StatusOr<std::shared_ptr<const Regex>> Regex::Compile(const std::string& pattern) {
  QM_ASSIGN_OR_RETURN(const std::string translated, Translate(pattern));
  int error = 0;
  size_t offset = 0;
  pcre2_code* code =
      pcre2_compile(reinterpret_cast<PCRE2_SPTR>(translated.data()), translated.size(),
                    PCRE2_UTF | PCRE2_UCP, &error, &offset, nullptr);
  if (code == nullptr) return BadPattern(pattern, ErrorMessage(error));
  std::shared_ptr<Regex> regex(new Regex);
  regex->compiled_ = std::make_unique<Compiled>(code);
  // Without JIT (not available on this processor) matching is slower, and right all the same.
  pcre2_jit_compile(code, PCRE2_JIT_COMPLETE);
  return regex;
}

std::shared_ptr<const Regex> Regex::Literal(std::string_view text) {
  std::shared_ptr<Regex> regex(new Regex);
  regex->literal_ = text;
  return regex;
}

absl::Status Regex::ForEachMatch(std::string_view text,
                                 const std::function<void(size_t, size_t)>& found) const {
  if (compiled_ == nullptr) {
    size_t at = literal_.empty() ? std::string_view::npos : text.find(literal_);
    for (; at != std::string_view::npos; at = text.find(literal_, at + literal_.size())) {
      found(at, at + literal_.size());
    }
    return absl::OkStatus();
  }
  const std::unique_ptr<pcre2_match_data, FreeMatchData> data(
      pcre2_match_data_create_from_pattern(compiled_->code, nullptr));
  const size_t* const span = pcre2_get_ovector_pointer(data.get());
  for (size_t at = 0; at <= text.size();) {
    const int result = pcre2_match(compiled_->code, reinterpret_cast<PCRE2_SPTR>(text.data()),
                                   text.size(), at, PCRE2_NO_UTF_CHECK, data.get(), MatchContext());
    if (result == PCRE2_ERROR_NOMATCH) break;
    if (result < 0) {
      return absl::InternalError(
          ErrorText("splitting text by a regular expression failed", ErrorMessage(result)));
    }
    if (span[1] > span[0]) {
      found(span[0], span[1]);
      at = span[1];
    } else {  // an empty match: on to the next character
      at = span[1] + 1;
      while (at < text.size() && (static_cast<unsigned char>(text[at]) & 0xC0) == 0x80) ++at;
    }
  }
  return absl::OkStatus();
}

}  // namespace quantmill
