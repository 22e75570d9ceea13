// quantmill check-case: the process that runs one conformance case. Started by `check`; its request
// comes on stdin, its verdict goes to descriptor 3.
#include <fcntl.h>

#include <iostream>
#include <iterator>
#include <string>

#include "host/cli/command.h"
#include "host/supervisor/process.h"
#include "sdk/check/runner.h"

namespace quantmill {
namespace {

absl::StatusOr<int> RunCheckcaseCommand(const Arguments&) {
  if (fcntl(kEventDescriptor, F_GETFD) < 0) {
    return UsageError("'check-case' is started by 'check'", "", "use quantmill check");
  }
  fcntl(kEventDescriptor, F_SETFD, FD_CLOEXEC);
  const std::string text((std::istreambuf_iterator<char>(std::cin)), {});
  const auto request = nlohmann::json::parse(text, nullptr, false);
  if (!request.is_object()) return UsageError("'check-case' was given no request");
  check::RunCaseProcess(request, kEventDescriptor);
}

}  // namespace

Command MakeCheckcaseCommand() {
  Command command;
  command.name = "check-case";
  command.summary = "internal: the process of one conformance case";
  command.hidden = true;
  command.run = RunCheckcaseCommand;
  return command;
}

}  // namespace quantmill
