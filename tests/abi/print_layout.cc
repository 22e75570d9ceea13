// Prints the layout of the headers it was built with (for scripts/abi_update).
#include <cstdio>

#include "tests/abi/layout.h"

int main() { std::fputs(quantmill::testing::CurrentLayout().c_str(), stdout); }
