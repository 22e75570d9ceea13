// quantmill check PLUGIN: the conformance cases, each in a process of its own.
#include <iostream>
#include <set>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "core/base/status.h"
#include "host/cli/command.h"
#include "host/cli/table.h"
#include "host/pipeline/device.h"
#include "sdk/check/runner.h"

namespace quantmill {
namespace {

using check::CaseResult;
using check::CheckReport;
using check::CheckRequest;
using check::State;

constexpr State kStates[] = {State::kPassed, State::kSkipped, State::kWarning,
                             State::kFailed, State::kCrashed, State::kTimedOut};

bool IsBad(State state) {
  return state == State::kFailed || state == State::kCrashed || state == State::kTimedOut;
}

// The rule that was broken, else those that were tested.
std::string RuleOf(const CaseResult& result) {
  return result.verdict.rule.empty() ? absl::StrJoin(result.rules, " ") : result.verdict.rule;
}

std::string NameOf(const CaseResult& result) {
  return result.method.empty() ? result.name : absl::StrCat(result.name, " ", result.method);
}

std::string Table(const CheckReport& report) {
  std::vector<std::vector<std::string>> rows = {{"CASE", "RULE", "STATE", "TEXT"}};
  for (const CaseResult& result : report.results) {
    rows.push_back({NameOf(result), RuleOf(result),
                    std::string(check::StateName(result.verdict.state)), result.verdict.text});
  }
  return FormatTable(rows);
}

std::string Summary(const CheckReport& report) {
  std::vector<std::string> parts;
  for (const State state : kStates) {
    const int count = report.Count(state);
    if (count == 0 && state != State::kPassed && state != State::kFailed) continue;
    parts.push_back(absl::StrCat(count, " ", std::string(check::StateName(state))));
  }
  return absl::StrJoin(parts, ", ");
}

// How to look closer at what went wrong.
void PrintAdvice(const CheckRequest& request, const CheckReport& report, std::ostream& out) {
  std::set<std::string> rules;
  const CaseResult* first = nullptr;
  for (const CaseResult& result : report.results) {
    if (!IsBad(result.verdict.state)) continue;
    if (first == nullptr) first = &result;
    rules.insert(RuleOf(result));
  }
  if (first == nullptr) return;
  out << "rules: ";
  for (const std::string& rule : rules) {
    out << (rule == *rules.begin() ? "" : ", ") << rule;
  }
  out << "; see plugin_api/RULES.md\n"
      << "under a debugger: gdb --args quantmill check " << request.plugin << " --only '^"
      << absl::StrReplaceAll(first->name, {{".", "\\."}}) << "$' --in-process --device "
      << request.device << " --seed " << request.seed << "\n";
}

nlohmann::ordered_json Json(const CheckRequest& request, const CheckReport& report) {
  nlohmann::ordered_json cases = nlohmann::ordered_json::array();
  for (const CaseResult& result : report.results) {
    cases.push_back({{"case", result.name},
                     {"method", result.method},
                     {"rules", result.rules},
                     {"asserts", result.asserts},
                     {"state", std::string(check::StateName(result.verdict.state))},
                     {"rule", result.verdict.rule},
                     {"text", result.verdict.text},
                     {"seconds", result.seconds}});
  }
  nlohmann::ordered_json json = {{"plugin", request.plugin},
                                 {"device", report.device},
                                 {"seed", request.seed},
                                 {"ok", report.ok() ? 1 : 0},
                                 {"rejected", report.rejected}};
  for (const State state : kStates) {
    json[absl::StrReplaceAll(std::string(check::StateName(state)), {{" ", "_"}})] =
        report.Count(state);
  }
  json["cases"] = cases;
  return json;
}

absl::StatusOr<int> List(const Arguments& args) {
  std::vector<std::vector<std::string>> rows = {{"CASE", "RULES", "ASSERTS"}};
  nlohmann::ordered_json list = nlohmann::ordered_json::array();
  for (const check::Case& item : check::AllCases()) {
    rows.push_back({item.name, absl::StrJoin(item.rules, " "), item.asserts});
    list.push_back({{"case", item.name}, {"rules", item.rules}, {"asserts", item.asserts}});
  }
  args.out() << FormatTable(rows);
  QM_RETURN_IF_ERROR(args.WriteJson({{"cases", list}}));
  return kExitDone;
}

absl::StatusOr<CheckRequest> RequestFrom(const Arguments& args) {
  if (const auto device = ParseDevice(args.Text("device")); !device.ok()) {
    return UsageError(device.status());
  }
  if (args.Integer("seed") < 0) return UsageError("--seed must not be negative");
  if (args.Real("limit") < 0) return UsageError("--limit must not be negative");
  CheckRequest request;
  request.plugin = args.Text("PLUGIN");
  request.other_plugins = args.List("plugin");
  request.only = args.Text("only");
  request.device = args.Text("device");
  request.seed = static_cast<uint64_t>(args.Integer("seed"));
  request.slow = args.Flag("slow");
  request.in_process = args.Flag("in-process");
  request.limit_seconds = args.Real("limit");
  return request;
}

absl::StatusOr<int> RunCheckCommand(const Arguments& args) {
  if (args.Flag("list")) return List(args);
  if (!args.Has("PLUGIN")) {
    return UsageError("no plugin to check", "",
                      "name its file: quantmill check ./libqm_NAME.so; --list shows the cases");
  }
  QM_ASSIGN_OR_RETURN(const CheckRequest request, RequestFrom(args));
  const absl::StatusOr<CheckReport> report = check::CheckPlugin(request, nullptr);
  if (absl::IsInvalidArgument(report.status())) return UsageError(report.status());
  QM_RETURN_IF_ERROR(report.status());
  std::ostream& out = args.out();
  if (!report->results.empty()) out << Table(*report);
  if (!report->rejected.empty()) {
    out << "the plugin does not load, so cases of its methods were left out: " << report->rejected
        << "\n";
  } else if (report->results.empty()) {
    out << "no case was made: those asked for are about functions this plugin does not have, or "
           "are slow ones (--slow)\n";
  }
  out << Summary(*report) << "\n";
  PrintAdvice(request, *report, out);
  QM_RETURN_IF_ERROR(args.WriteJson(Json(request, *report)));
  return report->ok() ? kExitDone : kExitFailed;
}

}  // namespace

Command MakeCheckCommand() {
  CommandOption device = DeviceOption();
  device.default_value = "cpu";
  return {
      .name = "check",
      .summary = "check that a plugin keeps the rules of the ABI",
      .arguments = {{"PLUGIN", "file of the plugin, libqm_NAME.so", false}},
      .options = {device,
                  PluginOption(),
                  {.name = "only",
                   .value = "RE",
                   .doc = "run the cases whose name matches this regular expression"},
                  {.name = "seed",
                   .value = "N",
                   .doc = "of everything a case draws at random",
                   .default_value = "1",
                   .kind = CommandOption::Kind::kInteger},
                  {.name = "slow", .doc = "on the CPU too, the cases with large shapes"},
                  {.name = "in-process",
                   .doc = "run the cases in this process, for a debugger; the first crash ends it"},
                  {.name = "limit",
                   .value = "SECONDS",
                   .doc = "time limit of one case; 0 = the case's own",
                   .default_value = "0",
                   .kind = CommandOption::Kind::kReal},
                  {.name = "list", .doc = "show the cases and the rules they test, and run none"}},
      .examples = {"quantmill check ./libqm_rounding.so",
                   "quantmill check ./libqm_rounding.so --only '^memory' --json report.json",
                   "# on a GPU", "quantmill check ./libqm_rounding.so --device cuda:0"},
      .notes =
          "Each case runs in a process of its own with a time limit: passed, skipped, warning,\n"
          "failed, crashed or timed out. Exit code 0: every case passed, was skipped or "
          "warned.\nThe rules are described in plugin_api/RULES.md.",
      .run = RunCheckCommand};
}

}  // namespace quantmill
