// Every page of the tree: what it links to is there, and so is every path it writes in backticks.
#include <cctype>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "gtest/gtest.h"
#include "tests/support/shared_data.h"

namespace quantmill::testing {
namespace {

namespace fs = std::filesystem;

std::vector<fs::path> Pages() {
  std::vector<fs::path> pages;
  for (auto it = fs::recursive_directory_iterator(SourcePath(""));
       it != fs::recursive_directory_iterator(); ++it) {
    const std::string name = it->path().filename().string();
    if (it->is_directory() && (name == "build" || name == "third_party" || name[0] == '.')) {
      it.disable_recursion_pending();
    } else if (it->path().extension() == ".md") {
      pages.push_back(it->path());
    }
  }
  return pages;
}

// Without blocks of code, which show what a reader's own folders hold.
std::string Prose(const fs::path& page) {
  std::ifstream file(page);
  std::string prose, line;
  bool code = false;
  while (std::getline(file, line)) {
    if (absl::StartsWith(line, "```")) code = !code;
    if (!code) absl::StrAppend(&prose, line, "\n");
  }
  return prose;
}

// The texts between `open` and the next `close`, on one line each.
std::vector<std::string> Between(const std::string& text, const std::string& open, char close) {
  std::vector<std::string> found;
  for (size_t at = text.find(open); at != std::string::npos; at = text.find(open, at)) {
    at += open.size();
    const size_t end = text.find_first_of(std::string("\n") + close, at);
    if (end == std::string::npos) break;
    if (text[end] == close) found.push_back(text.substr(at, end - at));
    at = end + 1;
  }
  return found;
}

// Where the pages of an installed tree lie in this one.
std::string FromInstalled(const std::string& target) {
  const std::string page = absl::StrReplaceAll(target, {{"@PREFIX@/share/doc/quantmill/", ""}});
  const std::string in_docs = SourcePath("docs/" + page);
  return fs::exists(in_docs) ? in_docs : SourcePath(page);
}

bool HasAnchor(const fs::path& page, const std::string& anchor) {
  std::ifstream file(page);
  for (std::string line; std::getline(file, line);) {
    if (absl::StrContains(line, absl::StrCat("<a id=\"", anchor, "\">"))) return true;
    if (line.empty() || line[0] != '#') continue;
    std::string id;  // as a reader makes it of a heading
    for (const char c : line.substr(line.find_first_not_of("# "))) {
      if (std::isalnum(static_cast<unsigned char>(c)) || c == '-') id += absl::ascii_tolower(c);
      if (c == ' ') id += '-';
    }
    if (id == anchor) return true;
  }
  return false;
}

TEST(LinksTest, LeadSomewhere) {
  const std::vector<fs::path> pages = Pages();
  ASSERT_GT(pages.size(), 15u);
  for (const fs::path& page : pages) {
    for (std::string target : Between(Prose(page), "](", ')')) {
      if (absl::StrContains(target, "://") || absl::StartsWith(target, "mailto:")) continue;
      std::string anchor;
      if (const size_t hash = target.find('#'); hash != std::string::npos) {
        anchor = target.substr(hash + 1);
        target.resize(hash);
      }
      fs::path file = page;
      if (absl::StartsWith(target, "@PREFIX@")) {
        file = FromInstalled(target);
      } else if (!target.empty()) {
        file = page.parent_path() / target;
      }
      EXPECT_TRUE(fs::exists(file)) << page << " links to " << target;
      EXPECT_TRUE(anchor.empty() || HasAnchor(file, anchor)) << page << ": #" << anchor;
    }
  }
}

TEST(LinksTest, PathsOfTheTreeAreThere) {
  const std::set<std::string> folders = {"core",    "host",    "plugins",    "sdk",  "docs",
                                         "scripts", "configs", "plugin_api", "tests"};
  for (const fs::path& page : Pages()) {
    for (const std::string& path : Between(Prose(page), "`", '`')) {
      const bool in_tree = absl::StrContains(path, "/") &&
                           folders.count(path.substr(0, path.find('/'))) > 0 &&
                           path.find_first_of(" *{<") == std::string::npos;
      const bool stands_for_something =
          absl::StrContains(path, "NAME") || absl::StrContains(path, "VERSION");
      if (!in_tree || stands_for_something) continue;
      EXPECT_TRUE(fs::exists(SourcePath(path))) << page << ": " << path;
    }
  }
}

// Messages of author mode point at these.
TEST(LinksTest, EveryRuleHasAnAnchor) {
  std::ifstream file(SourcePath("plugin_api/RULES.md"));
  const std::string rules{std::istreambuf_iterator<char>(file), {}};
  int count = 0;
  for (const std::string& id : Between(rules, "</a>", ' ')) {
    const std::string cell =
        absl::StrCat("\n| <a id=\"", absl::AsciiStrToLower(id), "\"></a>", id, " |");
    EXPECT_TRUE(absl::StrContains(rules, cell)) << id;
    ++count;
  }
  EXPECT_GE(count, 40);
  EXPECT_FALSE(absl::StrContains(rules, "\n| QM-"));
}

}  // namespace
}  // namespace quantmill::testing
