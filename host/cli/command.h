// Sub-commands of the quantmill binary. A file host/cli/NAME.cc defines
//   Command MakeNameCommand();
// and one line in host/cli/CMakeLists.txt registers it. Parsing, --help, --json, exit codes and the
// printing of errors are done here.
#ifndef QUANTMILL_HOST_CLI_COMMAND_H_
#define QUANTMILL_HOST_CLI_COMMAND_H_

#include <cstdint>
#include <functional>
#include <iosfwd>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"

namespace quantmill {

enum ExitCode { kExitDone = 0, kExitFailed = 1, kExitUsage = 2, kExitRefused = 3 };

// Errors that end a command with another code than 1.
absl::Status UsageError(const std::string& what, const std::string& why = "",
                        const std::string& remedy = "");
absl::Status UsageError(const absl::Status& status);
// Refused by preflight: nothing was started.
absl::Status RefusedError(const absl::Status& status);
// kExitFailed unless made by one of the above; kExitDone for OK.
int ExitCodeOf(const absl::Status& status);

struct CommandOption {
  enum class Kind { kText, kInteger, kReal };
  std::string name;        // without dashes: "text"
  std::string value = "";  // what its value is called in the help: "FILE"; empty = a flag
  std::string doc = "";
  std::string default_value = "";  // shown in the help and returned when not given; empty = none
  Kind kind = Kind::kText;         // checked while parsing
  bool repeatable = false;
  bool required = false;
};

struct CommandArgument {
  std::string name;  // "MODEL"
  std::string doc = "";
  bool required = true;
};

// What was given on the command line, checked against the command's declaration.
class Arguments {
 public:
  // An option given, not defaulted. Options and arguments share one set of names.
  bool Has(std::string_view name) const;
  // The value, else the default, else "".
  std::string Text(std::string_view name) const;
  // All values of a repeatable option.
  std::vector<std::string> List(std::string_view name) const;
  bool Flag(std::string_view name) const { return Has(name); }
  // Value or default; 0 when there is neither.
  int64_t Integer(std::string_view name) const;
  double Real(std::string_view name) const;

  // Where text for people goes: stdout, or stderr when JSON goes to stdout.
  std::ostream& out() const;
  bool WantsJson() const { return Has("json"); }
  // A usage error when --json names what cannot be written; found before the work, not after.
  absl::Status CheckJson() const;
  // Writes the command's result where --json says; nothing without --json.
  absl::Status WriteJson(const nlohmann::ordered_json& result) const;

 private:
  friend class ArgumentParser;
  std::map<std::string, std::vector<std::string>, std::less<>> values_;
  std::map<std::string, std::string, std::less<>> defaults_;
};

struct Command {
  std::string name;
  std::string summary;  // one line
  std::vector<CommandArgument> arguments = {};
  std::vector<CommandOption> options = {};  // --help and --json are added to all
  std::vector<std::string> examples = {};   // whole command lines, "# ..." above one explains it
  std::string notes = "";                   // further help, may be empty
  // Returns the exit code, or an error to print and turn into one.
  std::function<absl::StatusOr<int>(const Arguments&)> run = nullptr;
  bool hidden = false;  // not in the list of commands
};

// Declarations used by several commands.
CommandOption DeviceOption();  // --device auto|cpu|cuda:N
CommandOption PluginOption();  // --plugin FILE, repeatable

// Parses what follows the command's name. Errors are usage errors.
absl::StatusOr<Arguments> ParseArguments(const Command& command,
                                         const std::vector<std::string>& args);
std::string CommandHelp(const Command& command);

// The whole program: args without the program's name. Returns the exit code.
int RunCommandLine(const std::vector<Command>& commands, const std::vector<std::string>& args);

// Every registered command, in the order of the help (generated from host/cli/CMakeLists.txt).
std::vector<Command> AllCommands();

// "error: ..." on stderr, one per line of the message.
void PrintError(const absl::Status& status);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_CLI_COMMAND_H_
