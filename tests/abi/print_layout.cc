// Prints the current layout: `print_layout > tests/abi/golden/v1.layout` accepts a change, which
// then needs a line in plugin_api/CHANGELOG.md.
#include <cstdio>

#include "tests/abi/layout.h"

int main() { std::fputs(quantmill::testing::CurrentLayout().c_str(), stdout); }
