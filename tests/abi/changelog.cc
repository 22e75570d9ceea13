#include "tests/abi/changelog.h"

#include <regex>
#include <sstream>

namespace quantmill::testing {
namespace {

// Entries are the lines that start with "- 1."; indented lines after one belong to it.
std::vector<std::string> Entries(const std::string& text) {
  std::vector<std::string> entries;
  std::istringstream lines(text);
  std::string line;
  bool open = false;
  while (std::getline(lines, line)) {
    if (line.rfind("- 1.", 0) == 0) {
      entries.push_back(line);
      open = true;
    } else if (open && line.rfind("  ", 0) == 0) {
      entries.back() += line.substr(1);
    } else {
      open = false;
    }
  }
  return entries;
}

ChangelogLine ParseEntry(const std::string& entry) {
  static const std::regex kForm(R"(- 1\.(\d+) ([-A-Za-z0-9]+)((?:,? `[\w.]+`)*): \S.*)");
  static const std::regex kName("`([^`]+)`");
  ChangelogLine line;
  std::smatch match;
  if (!std::regex_match(entry, match, kForm)) {
    line.fault = "not of the form \"- 1.MINOR RULE `name`, `name`: why\": " + entry;
    return line;
  }
  line.minor = std::stoi(match[1]);
  line.rule = match[2];
  const std::string names = match[3];
  for (std::sregex_iterator it(names.begin(), names.end(), kName), end; it != end; ++it) {
    line.names.push_back((*it)[1]);
  }
  const bool marks = line.rule == "first" || line.rule == "frozen";
  const bool changes = line.rule == "QM-A-004" || line.rule == "QM-A-008" || line.rule == "break";
  if (!marks && !changes) line.fault = "unknown rule '" + line.rule + "': " + entry;
  if (changes && line.names.empty()) line.fault = "names nothing: " + entry;
  return line;
}

}  // namespace

std::vector<ChangelogLine> ParseChangelog(const std::string& text) {
  std::vector<ChangelogLine> lines;
  for (const std::string& entry : Entries(text)) lines.push_back(ParseEntry(entry));
  return lines;
}

}  // namespace quantmill::testing
