// Command line parsing over Boost.Program_options, with this program's words for what is wrong.
#include <boost/program_options.hpp>
#include <set>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "core/base/nearest.h"
#include "host/cli/command.h"

namespace quantmill {
namespace po = boost::program_options;
namespace {

constexpr char kPositional[] = "argument";

std::vector<CommandOption> WithCommonOptions(const Command& command) {
  std::vector<CommandOption> options = command.options;
  options.push_back(
      {.name = "json",
       .value = "FILE|-",
       .doc = "also write the result as JSON; - is stdout, text then goes to stderr"});
  options.push_back({.name = "help", .value = "", .doc = "show this help"});
  return options;
}

std::string Usage(const Command& command) {
  std::string text = absl::StrCat("quantmill ", command.name);
  for (const CommandArgument& argument : command.arguments) {
    absl::StrAppend(&text, argument.required ? " " : " [", argument.name,
                    argument.required ? "" : "]");
  }
  for (const CommandOption& option : command.options) {
    if (option.required) absl::StrAppend(&text, " --", option.name, " ", option.value);
  }
  return absl::StrCat(text, " [OPTIONS]");
}

std::string SeeHelp(const Command& command) {
  return absl::StrCat("see quantmill ", command.name, " --help");
}

absl::Status CheckNumber(const CommandOption& option, const std::string& text) {
  int64_t integer = 0;
  double real = 0;
  if (option.kind == CommandOption::Kind::kInteger && !absl::SimpleAtoi(text, &integer)) {
    return UsageError(absl::StrCat("--", option.name, " wants a whole number, not '", text, "'"));
  }
  if (option.kind == CommandOption::Kind::kReal && !absl::SimpleAtod(text, &real)) {
    return UsageError(absl::StrCat("--", option.name, " wants a number, not '", text, "'"));
  }
  return absl::OkStatus();
}

}  // namespace

class ArgumentParser {
 public:
  explicit ArgumentParser(const Command& command)
      : command_(command), options_(WithCommonOptions(command)) {}

  absl::StatusOr<Arguments> Parse(const std::vector<std::string>& args) {
    po::options_description description;
    for (const CommandOption& option : options_) {
      if (option.value.empty()) {
        description.add_options()(option.name.c_str(), "");
      } else {
        description.add_options()(option.name.c_str(), po::value<std::string>(), "");
      }
    }
    description.add_options()(kPositional, po::value<std::vector<std::string>>(), "");
    po::positional_options_description positional;
    positional.add(kPositional, -1);
    try {
      // No short options, so that "-1" and "-" are values; no guessing, so that adding an option
      // never changes what an old command line means.
      const auto style = po::command_line_style::allow_long |
                         po::command_line_style::long_allow_adjacent |
                         po::command_line_style::long_allow_next;
      const auto parsed = po::command_line_parser(args)
                              .options(description)
                              .positional(positional)
                              .style(style)
                              .run();
      for (const auto& option : parsed.options) {
        if (absl::Status status = Take(option.string_key, option.position_key, option.value);
            !status.ok()) {
          return status;
        }
      }
    } catch (const po::unknown_option& error) {
      return UnknownOption(error.get_option_name());
    } catch (const po::invalid_command_line_syntax& error) {
      return SyntaxError(error);
    } catch (const std::exception& error) {
      return UsageError(error.what(), "", SeeHelp(command_));
    }
    return Finish();
  }

 private:
  const CommandOption* Find(std::string_view name) const {
    for (const CommandOption& option : options_) {
      if (option.name == name) return &option;
    }
    return nullptr;
  }

  absl::Status UnknownOption(const std::string& written) const {
    std::string name = written;
    while (!name.empty() && name[0] == '-') name.erase(0, 1);
    name = name.substr(0, name.find('='));
    std::vector<std::string> names;
    for (const CommandOption& option : options_) names.push_back(option.name);
    const std::string nearest = NearestName(name, names);
    return UsageError(absl::StrCat("unknown option --", name),
                      nearest.empty() ? "" : absl::StrCat("did you mean --", nearest, "?"),
                      SeeHelp(command_));
  }

  absl::Status MissingValue(const CommandOption& option) const {
    return UsageError(absl::StrCat("--", option.name, " needs a value"),
                      absl::StrCat("write --", option.name, " ", option.value), SeeHelp(command_));
  }

  absl::Status SyntaxError(const po::invalid_command_line_syntax& error) const {
    std::string name = error.get_option_name();
    while (!name.empty() && name[0] == '-') name.erase(0, 1);
    const CommandOption* option = Find(name);
    if (option != nullptr && option->value.empty()) {
      return UsageError(absl::StrCat("--", name, " takes no value"), "", SeeHelp(command_));
    }
    if (option != nullptr) return MissingValue(*option);
    return UsageError(error.what(), "", SeeHelp(command_));
  }

  absl::Status Take(const std::string& name, int position_key,
                    const std::vector<std::string>& values) {
    if (name == kPositional && position_key >= 0) return TakeArgument(values);
    const CommandOption* option = Find(name);
    if (option == nullptr) return UnknownOption(name);
    auto& stored = arguments_.values_[name];
    if (!stored.empty() && !option->repeatable) {
      return UsageError(absl::StrCat("--", name, " is given twice"));
    }
    for (const std::string& value : values) {
      // The parser takes the next word whatever it is.
      if (absl::StartsWith(value, "--") && Find(value.substr(2)) != nullptr) {
        return MissingValue(*option);
      }
      if (absl::Status status = CheckNumber(*option, value); !status.ok()) return status;
      stored.push_back(value);
    }
    return absl::OkStatus();
  }

  absl::Status TakeArgument(const std::vector<std::string>& values) {
    for (const std::string& value : values) {
      if (value.size() > 1 && value[0] == '-' && !absl::StartsWith(value, "--")) {
        return UnknownOption(value);
      }
      if (next_argument_ >= command_.arguments.size()) {
        return UsageError(absl::StrCat("unexpected argument '", value, "'"),
                          absl::StrCat("usage: ", Usage(command_)));
      }
      arguments_.values_[command_.arguments[next_argument_++].name] = {value};
    }
    return absl::OkStatus();
  }

  absl::StatusOr<Arguments> Finish() {
    for (const CommandArgument& argument : command_.arguments) {
      if (!argument.required || arguments_.Has(argument.name)) continue;
      return UsageError(absl::StrCat(argument.name, " is missing"),
                        absl::StrCat("usage: ", Usage(command_)), SeeHelp(command_));
    }
    for (const CommandOption& option : options_) {
      if (!option.default_value.empty()) {
        arguments_.defaults_[option.name] = option.default_value;
      }
      if (!option.required || arguments_.Has(option.name)) continue;
      return UsageError(absl::StrCat("--", option.name, " ", option.value, " is missing"),
                        option.doc, SeeHelp(command_));
    }
    return std::move(arguments_);
  }

  const Command& command_;
  std::vector<CommandOption> options_;
  Arguments arguments_;
  size_t next_argument_ = 0;
};

absl::StatusOr<Arguments> ParseArguments(const Command& command,
                                         const std::vector<std::string>& args) {
  return ArgumentParser(command).Parse(args);
}

std::string CommandHelp(const Command& command) {
  std::string text = absl::StrCat(command.summary, "\n\nUsage: ", Usage(command), "\n");
  auto line = [&text](std::string left, const std::string& doc) {
    left = absl::StrCat("  ", left);
    if (left.size() < 30) left.resize(30, ' ');
    absl::StrAppend(&text, left, " ", doc, "\n");
  };
  if (!command.arguments.empty()) absl::StrAppend(&text, "\nArguments:\n");
  for (const CommandArgument& argument : command.arguments) line(argument.name, argument.doc);
  absl::StrAppend(&text, "\nOptions:\n");
  for (const CommandOption& option : WithCommonOptions(command)) {
    std::string doc = option.doc;
    if (!option.default_value.empty())
      absl::StrAppend(&doc, " (default ", option.default_value, ")");
    if (option.repeatable) absl::StrAppend(&doc, " (may be repeated)");
    line(absl::StrCat("--", option.name, option.value.empty() ? "" : " ", option.value), doc);
  }
  if (!command.notes.empty()) absl::StrAppend(&text, "\n", command.notes, "\n");
  if (!command.examples.empty()) absl::StrAppend(&text, "\nExamples:\n");
  for (const std::string& example : command.examples) absl::StrAppend(&text, "  ", example, "\n");
  return text;
}

}  // namespace quantmill
