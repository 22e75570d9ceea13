// plugin_api/CHANGELOG.md, read by the gate.
#ifndef QUANTMILL_TESTS_ABI_CHANGELOG_H_
#define QUANTMILL_TESTS_ABI_CHANGELOG_H_

#include <string>
#include <vector>

namespace quantmill::testing {

// "- 1.2 QM-A-004 `qm_call.seed`, `qm_call.device`: why", which may go on in indented lines.
struct ChangelogLine {
  int minor = 0;
  std::string rule;  // "QM-A-004", "QM-A-008" or "break"; "first" and "frozen" mark a minor
  std::vector<std::string> names;  // without the quotes
  std::string fault;               // what is wrong with the line; empty = nothing
};

std::vector<ChangelogLine> ParseChangelog(const std::string& text);

}  // namespace quantmill::testing

#endif  // QUANTMILL_TESTS_ABI_CHANGELOG_H_
