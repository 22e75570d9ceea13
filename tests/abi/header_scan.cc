// MissingFrom: finds what a header declares by its text, so that a struct, type or constant that
// nobody put into layout.cc is noticed.
#include <regex>

#include "tests/abi/gate.h"

namespace quantmill::testing {
namespace {

// Macros that are no values of the ABI.
bool IsHelper(const std::string& name) {
  return name == "QM_NOEXCEPT" || name == "QM_EXTERN_C" || name == "QM_EXPORT";
}

std::vector<std::string> Matches(const std::string& text, const std::string& pattern) {
  const std::regex regex(pattern);
  std::vector<std::string> found;
  for (std::sregex_iterator it(text.begin(), text.end(), regex), end; it != end; ++it) {
    found.push_back((*it)[1]);
  }
  return found;
}

std::string WithoutComments(std::string text) {
  for (size_t begin; (begin = text.find("/*")) != std::string::npos;) {
    const size_t end = text.find("*/", begin);
    text.erase(begin, end == std::string::npos ? end : end + 2 - begin);
  }
  return text;
}

// Without what stands between braces: bodies of structs and enums.
std::string WithoutBodies(const std::string& text) {
  std::string outside;
  int depth = 0;
  for (const char c : std::regex_replace(text, std::regex(R"(extern "C" \{)"), "")) {
    if (c == '}') --depth;
    if (depth <= 0) outside += c;
    if (c == '{') ++depth;
  }
  return outside;
}

}  // namespace

std::vector<std::string> MissingFrom(const Layout& layout, const std::string& header) {
  std::vector<std::string> missing;
  const auto want = [&](const std::string& fact) {
    if (!layout.facts.contains(fact)) missing.push_back(fact);
  };
  const std::string code = WithoutComments(header);
  for (const std::string& name : Matches(code, R"(#define (QM_\w+)[ \t]+\S)")) {
    if (IsHelper(name) || layout.facts.contains("id " + name)) continue;
    want("constant " + name);
  }
  for (const std::string& body : Matches(code, R"(enum\s*\w*\s*\{([^}]*)\})")) {
    for (const std::string& name : Matches(body, R"((\w+)\s*(?:=[^,]*)?(?:,|\s*$))")) {
      want("constant " + name);
    }
  }
  const std::string outside = WithoutBodies(code);
  for (const std::string& name : Matches(outside, R"(typedef\s+\w[\w *]*?[\s*](\w+);)")) {
    if (!layout.structs.contains(name)) want("type " + name);
  }
  for (const std::string& name : Matches(outside, R"(typedef[^;]*\(\*(\w+)\)\()")) {
    want("type " + name);
  }
  for (const std::string& name : Matches(code, R"((?:struct|union)\s+(\w+)\s*\{)")) {
    const auto found = layout.structs.find(name);
    if (found == layout.structs.end()) {
      missing.push_back("struct " + name);
      continue;
    }
    const std::string kind = found->second.growable ? "GROWABLE" : "FROZEN";
    if (!std::regex_search(header,
                           std::regex("struct\\s+" + name + "\\s*\\{\\s*/\\*\\s*" + kind))) {
      missing.push_back("the word " + kind + " after struct " + name + " {");
    }
  }
  return missing;
}

}  // namespace quantmill::testing
