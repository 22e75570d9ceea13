// The gate of ABI stability: against golden/v1.layout, only appends to GROWABLE structs and new
// constants, ids and structs pass.
#include "tests/abi/layout.h"

#include <fstream>
#include <map>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tests/support/shared_data.h"

namespace quantmill::testing {
namespace {

struct StructLayout {
  bool growable = false;
  size_t size = 0;
  size_t field_bytes = 0;
  size_t last_end = 0;
};

struct Layout {
  std::map<std::string, StructLayout> structs;
  std::set<std::string> facts;  // fields, constants, ids: must stay word for word
};

Layout Parse(const std::string& text) {
  Layout layout;
  std::istringstream lines(text);
  std::string line;
  while (std::getline(lines, line)) {
    std::istringstream words(line);
    std::string kind, name, word;
    words >> kind >> name;
    if (kind == "FROZEN" || kind == "GROWABLE") {
      StructLayout& entry = layout.structs[name];
      entry.growable = kind == "GROWABLE";
      words >> word >> entry.size;
      continue;
    }
    layout.facts.insert(line);
    if (line.rfind("  ", 0) != 0) continue;
    StructLayout& entry = layout.structs[kind.substr(0, kind.find('.'))];
    size_t offset = 0, size = 0;
    std::istringstream field(line);
    field >> word >> word >> offset >> word >> size;
    entry.field_bytes += size;
    entry.last_end = std::max(entry.last_end, offset + size);
  }
  return layout;
}

std::string ReadGolden() {
  std::ifstream file(SourcePath("tests/abi/golden/v1.layout"));
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

// Empty if `current` may follow `golden` within a major; else one line per break.
std::vector<std::string> Breaks(const Layout& golden, const Layout& current) {
  std::vector<std::string> breaks;
  for (const auto& [name, old] : golden.structs) {
    const auto found = current.structs.find(name);
    if (found == current.structs.end()) {
      breaks.push_back(name + " is gone");
    } else if (found->second.growable != old.growable) {
      breaks.push_back(name + " changed its kind");
    } else if (old.growable ? found->second.size < old.size : found->second.size != old.size) {
      breaks.push_back(name + " changed its size");
    }
  }
  for (const std::string& fact : golden.facts) {
    if (!current.facts.contains(fact)) breaks.push_back("no longer true: " + fact);
  }
  return breaks;
}

TEST(AbiLayout, OnlyAppendsToTheGoldenLayout) {
  const Layout golden = Parse(ReadGolden());
  ASSERT_GT(golden.structs.size(), 20u);
  for (const std::string& text : Breaks(golden, Parse(CurrentLayout()))) ADD_FAILURE() << text;
}

TEST(AbiLayout, GoldenFileIsUpToDate) {
  EXPECT_EQ(ReadGolden(), CurrentLayout())
      << "run print_layout > tests/abi/golden/v1.layout and add a line to plugin_api/CHANGELOG.md";
}

TEST(AbiLayout, FieldsFillEveryStruct) {
  for (const auto& [name, entry] : Parse(CurrentLayout()).structs) {
    EXPECT_EQ(entry.field_bytes, entry.size) << name << ": padding, or a field not listed";
    EXPECT_EQ(entry.last_end, entry.size) << name;
  }
}

TEST(AbiLayout, TheGateCatchesBreaks) {
  const std::string text =
      "GROWABLE t size 16 align 8\n  t.a offset 0 size 8\n  t.b offset 8 size 8\n"
      "FROZEN f size 8 align 8\n  f.x offset 0 size 8\nconstant C 1\n";
  const Layout golden = Parse(text);
  EXPECT_TRUE(Breaks(golden, golden).empty());
  const std::string appended =
      "GROWABLE t size 24 align 8\n  t.a offset 0 size 8\n  t.b offset 8 size 8\n"
      "  t.c offset 16 size 8\nFROZEN f size 8 align 8\n  f.x offset 0 size 8\nconstant C 1\n";
  EXPECT_TRUE(Breaks(golden, Parse(appended)).empty());
  const std::string inserted =
      "GROWABLE t size 24 align 8\n  t.a offset 0 size 8\n  t.c offset 8 size 8\n"
      "  t.b offset 16 size 8\nFROZEN f size 8 align 8\n  f.x offset 0 size 8\nconstant C 1\n";
  EXPECT_EQ(Breaks(golden, Parse(inserted)).size(), 1u);
  const std::string frozen_grew =
      "GROWABLE t size 16 align 8\n  t.a offset 0 size 8\n  t.b offset 8 size 8\n"
      "FROZEN f size 16 align 8\n  f.x offset 0 size 8\n  f.y offset 8 size 8\nconstant C 1\n";
  EXPECT_EQ(Breaks(golden, Parse(frozen_grew)).size(), 1u);
  const std::string renumbered =
      "GROWABLE t size 16 align 8\n  t.a offset 0 size 8\n"
      "  t.b offset 8 size 8\nFROZEN f size 8 align 8\n  f.x offset 0 size 8\nconstant C 2\n";
  EXPECT_EQ(Breaks(golden, Parse(renumbered)).size(), 1u);
}

}  // namespace
}  // namespace quantmill::testing
