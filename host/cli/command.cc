#include "host/cli/command.h"

#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>

#include "absl/strings/cord.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "core/base/nearest.h"
#include "core/base/status.h"
#include "quantmill/plugin.h"

namespace quantmill {
namespace {

constexpr char kExitPayload[] = "quantmill/exit-code";

absl::Status WithExitCode(absl::Status status, int code) {
  status.SetPayload(kExitPayload, absl::Cord(std::to_string(code)));
  return status;
}

std::vector<std::string> VisibleNames(const std::vector<Command>& commands) {
  std::vector<std::string> names;
  for (const Command& command : commands) {
    if (!command.hidden) names.push_back(command.name);
  }
  return names;
}

std::string Overview(const std::vector<Command>& commands) {
  std::string text =
      "quantmill quantizes LLM checkpoints by chaining method plugins.\n\n"
      "Usage: quantmill COMMAND [ARGUMENTS]\n       quantmill --version\n\nCommands:\n";
  for (const Command& command : commands) {
    if (command.hidden) continue;
    const size_t pad = command.name.size() < 12 ? 12 - command.name.size() : 1;
    absl::StrAppend(&text, "  ", command.name, std::string(pad, ' '), command.summary, "\n");
  }
  absl::StrAppend(&text,
                  "\n'quantmill COMMAND --help' shows arguments and examples.\n"
                  "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 refused by preflight.\n");
  return text;
}

std::string VersionText() {
  return absl::StrCat("quantmill ", QM_VERSION, "\nplugin ABI ", QM_ABI_MAJOR, ".", QM_ABI_MINOR,
                      "\nCUDA ", QM_CUDA_VERSION, "\nbuilt with ", QM_BUILD_INFO, "\n");
}

const Command* Find(const std::vector<Command>& commands, std::string_view name) {
  for (const Command& command : commands) {
    if (command.name == name) return &command;
  }
  return nullptr;
}

bool AsksForHelp(const std::vector<std::string>& args) {
  for (const std::string& arg : args) {
    if (arg == "--") return false;
    if (arg == "--help" || arg == "-h") return true;
  }
  return false;
}

int Report(const absl::Status& status) {
  PrintError(status);
  return ExitCodeOf(status);
}

int RunOne(const Command& command, const std::vector<std::string>& args) {
  if (AsksForHelp(args)) {
    std::cout << CommandHelp(command);
    return kExitDone;
  }
  absl::StatusOr<Arguments> parsed = ParseArguments(command, args);
  if (!parsed.ok()) return Report(parsed.status());
  if (const absl::Status status = parsed->CheckJson(); !status.ok()) return Report(status);
  absl::StatusOr<int> code = command.run(*parsed);
  if (!code.ok()) return Report(code.status());
  std::cout.flush();
  if (!std::cout) return Report(absl::DataLossError("cannot write to stdout"));
  return *code;
}

}  // namespace

absl::Status UsageError(const std::string& what, const std::string& why,
                        const std::string& remedy) {
  return UsageError(absl::InvalidArgumentError(ErrorText(what, why, remedy)));
}

absl::Status UsageError(const absl::Status& status) { return WithExitCode(status, kExitUsage); }

absl::Status RefusedError(const absl::Status& status) { return WithExitCode(status, kExitRefused); }

int ExitCodeOf(const absl::Status& status) {
  if (status.ok()) return kExitDone;
  const auto payload = status.GetPayload(kExitPayload);
  int code = kExitFailed;
  if (payload && absl::SimpleAtoi(std::string(*payload), &code)) return code;
  return kExitFailed;
}

void PrintError(const absl::Status& status) {
  for (absl::string_view line : absl::StrSplit(status.message(), '\n', absl::SkipEmpty())) {
    std::cerr << "error: " << line << "\n";
  }
  if (status.message().empty()) std::cerr << "error: " << status.ToString() << "\n";
  std::cerr.flush();
}

bool Arguments::Has(std::string_view name) const { return values_.find(name) != values_.end(); }

std::string Arguments::Text(std::string_view name) const {
  if (auto it = values_.find(name); it != values_.end() && !it->second.empty()) {
    return it->second.back();
  }
  auto it = defaults_.find(name);
  return it == defaults_.end() ? "" : it->second;
}

std::vector<std::string> Arguments::List(std::string_view name) const {
  auto it = values_.find(name);
  return it == values_.end() ? std::vector<std::string>() : it->second;
}

int64_t Arguments::Integer(std::string_view name) const {
  int64_t value = 0;
  return absl::SimpleAtoi(Text(name), &value) ? value : 0;
}

double Arguments::Real(std::string_view name) const {
  double value = 0;
  return absl::SimpleAtod(Text(name), &value) ? value : 0;
}

std::ostream& Arguments::out() const { return Text("json") == "-" ? std::cerr : std::cout; }

absl::Status Arguments::WriteJson(const nlohmann::ordered_json& result) const {
  if (!WantsJson()) return absl::OkStatus();
  // Names from damaged files may not be UTF-8; replacing beats throwing.
  const std::string text = result.dump(2, ' ', false, nlohmann::json::error_handler_t::replace);
  const std::string path = Text("json");
  if (path == "-") {
    std::cout << text << "\n" << std::flush;
    return std::cout ? absl::OkStatus() : absl::DataLossError("cannot write JSON to stdout");
  }
  std::ofstream file(path);
  file << text << "\n";
  file.close();
  if (file) return absl::OkStatus();
  return absl::UnavailableError(ErrorText(absl::StrCat("cannot write JSON to ", path), "",
                                          "check that the folder exists and is writable"));
}

absl::Status Arguments::CheckJson() const {
  const std::string path = Text("json");
  if (!WantsJson() || path == "-") return absl::OkStatus();
  std::error_code error;
  if (std::filesystem::is_directory(path, error)) {
    return UsageError(absl::StrCat("--json ", path, " is a directory"), "", "name a file");
  }
  const std::string folder = std::filesystem::path(path).parent_path().string();
  if (access(folder.empty() ? "." : folder.c_str(), W_OK | X_OK) == 0) return absl::OkStatus();
  return UsageError(absl::StrCat("--json ", path, " cannot be written"), std::strerror(errno),
                    "name a file in a folder that exists and is writable");
}

CommandOption DeviceOption() {
  return {.name = "device",
          .value = "auto|cpu|cuda:N",
          .doc = "where to compute; auto takes the first GPU, else the CPU",
          .default_value = "auto"};
}

CommandOption PluginOption() {
  return {.name = "plugin",
          .value = "FILE",
          .doc = "one more plugin file, searched first",
          .repeatable = true};
}

int RunCommandLine(const std::vector<Command>& commands, const std::vector<std::string>& args) {
  const std::string first = args.empty() ? "--help" : args[0];
  if (first == "--version") {
    std::cout << VersionText();
    return kExitDone;
  }
  if (first == "--help" || first == "-h" || first == "help") {
    if (args.size() < 2) {
      std::cout << Overview(commands);
      return kExitDone;
    }
    if (const Command* command = Find(commands, args[1])) {
      std::cout << CommandHelp(*command);
      return kExitDone;
    }
  }
  const std::string name = first == "help" ? args[1] : first;
  if (const Command* command = Find(commands, name)) {
    return RunOne(*command, std::vector<std::string>(args.begin() + 1, args.end()));
  }
  const bool option = name.size() > 1 && name[0] == '-';
  return Report(UsageError(
      absl::StrCat(option ? "unknown option " : "unknown command '", name, option ? "" : "'"),
      option ? "options follow a command" : NearestHint(name, VisibleNames(commands)),
      "see quantmill --help"));
}

}  // namespace quantmill
