// The gate on the command line, for scripts/abi_update and scripts/abi_capsule:
//   abi_gate scan LAYOUT HEADER...                    is everything in the headers in the layout?
//   abi_gate breaks OLD NEW                           is NEW a legal successor of OLD?
//   abi_gate changelog RELEASED NEW CHANGELOG         does the changelog say what was added?
// Exit code 0: yes; 1: no, with a line per reason on stdout; 2: wrong usage or unreadable file.
#include <cstdio>
#include <fstream>
#include <iostream>
#include <iterator>
#include <string>
#include <vector>

#include "tests/abi/gate.h"

namespace quantmill::testing {
namespace {

// The whole file.
bool Read(const std::string& path, std::string* text) {
  std::ifstream file(path);
  text->assign(std::istreambuf_iterator<char>(file), {});
  if (!file) std::cerr << "error: cannot read " << path << "\n";
  return static_cast<bool>(file);
}

int Answer(const std::vector<std::string>& reasons) {
  for (const std::string& reason : reasons) std::cout << "  " << reason << "\n";
  return reasons.empty() ? 0 : 1;
}

int Main(const std::vector<std::string>& arguments) {
  const std::string command = arguments.empty() ? "" : arguments[0];
  std::vector<std::string> texts(arguments.size());
  for (size_t i = 1; i < arguments.size(); ++i) {
    if (!Read(arguments[i], &texts[i])) return 2;
  }
  if (command == "scan" && arguments.size() > 2) {
    const Layout layout = ParseLayout(texts[1]);
    std::vector<std::string> reasons = RuleFaults(layout);
    for (size_t i = 2; i < arguments.size(); ++i) {
      for (const std::string& name : MissingFrom(layout, texts[i])) {
        reasons.push_back(arguments[i] + ": the layout lacks " + name);
      }
    }
    return Answer(reasons);
  }
  if (command == "breaks" && arguments.size() == 3) {
    return Answer(Breaks(ParseLayout(texts[1]), ParseLayout(texts[2])));
  }
  if (command == "changelog" && arguments.size() == 4) {
    return Answer(ChangelogFaults(ParseLayout(texts[1]), ParseLayout(texts[2]), texts[3]));
  }
  std::cerr << "error: usage: abi_gate scan LAYOUT HEADER... | breaks OLD NEW | changelog RELEASED "
               "NEW CHANGELOG\n";
  return 2;
}

}  // namespace
}  // namespace quantmill::testing

int main(int argc, char** argv) { return quantmill::testing::Main({argv + 1, argv + argc}); }
