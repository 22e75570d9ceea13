#include <string>
#include <vector>

#include "host/cli/command.h"

int main(int argc, char** argv) {
  return quantmill::RunCommandLine(quantmill::AllCommands(),
                                   std::vector<std::string>(argv + 1, argv + argc));
}
