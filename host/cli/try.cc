// quantmill try PLUGIN.so: its methods on made-up layers, beside others.
#include <algorithm>
#include <filesystem>
#include <ostream>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "core/base/status.h"
#include "host/cli/command.h"
#include "host/cli/table.h"
#include "host/pipeline/device.h"
#include "host/trial/try_layers.h"
#include "host/worker/method_options.h"
#include "quantmill/all.h"

namespace quantmill {
namespace {

constexpr int64_t kLongestSide = 16384;

struct Participant {
  const MethodInfo* method = nullptr;
  ResolvedOptions options;
  bool tried = false;  // of the named plugin, not beside it
};

absl::Status ReadShape(const std::string& text, TryRequest* request) {
  const std::vector<std::string> sides = absl::StrSplit(text, 'x');
  if (sides.size() == 2 && absl::SimpleAtoi(sides[0], &request->out_features) &&
      absl::SimpleAtoi(sides[1], &request->in_features) && request->out_features >= 1 &&
      request->in_features >= 1 && request->out_features <= kLongestSide &&
      request->in_features <= kLongestSide) {
    return absl::OkStatus();
  }
  return UsageError(absl::StrCat("--shape wants OUTxIN, not '", text, "'"), "",
                    absl::StrCat("write e.g. 256x512; each side is 1 to ", kLongestSide));
}

// The plugin's methods that quantize linears, or the one asked for.
absl::StatusOr<std::vector<const MethodInfo*>> TriedMethods(const Catalog& catalog,
                                                            const std::string& file,
                                                            const std::string& wanted) {
  const PluginInfo* plugin = nullptr;
  std::error_code error;
  for (const PluginInfo& info : catalog.plugins) {
    if (std::filesystem::equivalent(file, info.path, error)) plugin = &info;
  }
  std::vector<const MethodInfo*> methods;
  std::vector<std::string> ids;
  for (const MethodInfo& method : plugin->methods) {
    if (!method.Has(QM_EXT_QUANTIZE_LINEAR)) continue;
    ids.push_back(method.id);
    if (wanted.empty() || method.id == wanted) methods.push_back(&method);
  }
  if (!methods.empty()) return methods;
  if (!ids.empty()) {
    return UsageError(absl::StrCat("plugin ", file, " has no method '", wanted, "'"),
                      absl::StrCat("it has ", absl::StrJoin(ids, ", ")));
  }
  return UsageError(absl::StrCat("plugin ", file, " offers nothing to try"),
                    absl::StrCat("none of its methods has ", QM_EXT_QUANTIZE_LINEAR),
                    "see quantmill plugins");
}

// An option that no tried method has is a mistake; several methods need not have all of them.
absl::StatusOr<std::vector<Participant>> Tried(const std::vector<const MethodInfo*>& methods,
                                               const std::map<std::string, std::string>& given) {
  std::vector<Participant> participants;
  for (const MethodInfo* method : methods) {
    std::map<std::string, std::string> own;
    for (const auto& [name, value] : given) {
      const auto has = [&name = name](const MethodInfo* other) {
        return std::any_of(other->options.begin(), other->options.end(),
                           [&name](const OptionInfo& option) { return option.name == name; });
      };
      const bool others_have = std::any_of(methods.begin(), methods.end(), has);
      if (has(method) || !others_have) own[name] = value;
    }
    absl::StatusOr<ResolvedOptions> options = OptionsFor(*method, own);
    if (!options.ok()) return UsageError(options.status());
    participants.push_back({method, *std::move(options), /*tried=*/true});
  }
  return participants;
}

// Those that are installed; all of them must be if the user named them.
absl::Status AddBeside(const Arguments& args, const Catalog& catalog,
                       const std::map<std::string, std::string>& given,
                       std::vector<Participant>* participants) {
  for (const absl::string_view id :
       absl::StrSplit(args.Text("beside"), ',', absl::SkipWhitespace())) {
    const MethodInfo* method = catalog.FindMethod({id.data(), id.size()});
    if (method == nullptr || !method->Has(QM_EXT_QUANTIZE_LINEAR)) {
      if (!args.Has("beside")) continue;
      return UsageError(absl::StrCat("no method '", id, "' to put beside the plugin's"), "",
                        "see quantmill plugins");
    }
    const bool present = std::any_of(participants->begin(), participants->end(),
                                     [method](const auto& p) { return p.method == method; });
    if (present) continue;
    absl::StatusOr<ResolvedOptions> options = OptionsFor(*method, FittingOptions(*method, given));
    if (!options.ok()) return UsageError(options.status());
    participants->push_back({method, *std::move(options), /*tried=*/false});
  }
  return absl::OkStatus();
}

std::string Error(double nmse) { return nmse < 0 ? "-" : absl::StrFormat("%.3e", nmse); }

std::string Time(double seconds) {
  return seconds < 1 ? absl::StrFormat("%.2f ms", seconds * 1e3)
                     : absl::StrFormat("%.2f s", seconds);
}

std::string Table(const std::vector<TryRow>& rows) {
  std::vector<std::vector<std::string>> cells = {
      {"LAYER", "METHOD", "BITS", "WEIGHT NMSE", "OUTPUT NMSE", "TIME", "SCRATCH", "RESULT"}};
  for (const TryRow& row : rows) {
    const TrialResult& r = row.result;
    if (row.outcome != "ok") {
      cells.push_back({row.layer, row.method, "-", "-", "-", "-", "-", row.outcome});
      continue;
    }
    cells.push_back({row.layer, row.method, absl::StrFormat("%.3f", r.bits_per_weight),
                     Error(r.weight_nmse), Error(r.output_nmse), Time(r.seconds),
                     FormatBytes(static_cast<int64_t>(r.scratch_bytes)), row.outcome});
  }
  return FormatTable(cells, {2, 3, 4, 5, 6});
}

std::string Failures(const std::vector<TryRow>& rows) {
  std::string text;
  for (const TryRow& row : rows) {
    if (row.outcome == "ok") continue;
    const bool named = row.text.find(row.layer) != std::string::npos;
    absl::StrAppend(&text, "\n", named ? "" : absl::StrCat(row.method, " on ", row.layer, ": "),
                    row.text, "\n");
  }
  return text;
}

absl::StatusOr<std::vector<TryRow>> RunAll(const Arguments& args, TryRequest request,
                                           const std::vector<Participant>& participants) {
  std::vector<std::vector<TryRow>> by_method;
  for (const Participant& participant : participants) {
    request.setup.method = participant.method->id;
    request.options = participant.options;
    if (args.Flag("in-process")) {
      by_method.push_back(TryInProcess(request));
      continue;
    }
    QM_ASSIGN_OR_RETURN(std::vector<TryRow> rows, TryInWorkers(request, args.Real("time-limit")));
    by_method.push_back(std::move(rows));
  }
  std::vector<TryRow> rows;
  for (size_t layer = 0; layer < request.layers.size(); ++layer) {
    for (const std::vector<TryRow>& own : by_method) rows.push_back(own[layer]);
  }
  return rows;
}

nlohmann::ordered_json Json(const TryRequest& request, const std::vector<TryRow>& rows) {
  nlohmann::ordered_json list = nlohmann::ordered_json::array();
  for (const TryRow& row : rows) list.push_back(ToJson(row));
  return {{"device", request.setup.device},
          {"seed", request.seed},
          {"out_features", request.out_features},
          {"in_features", request.in_features},
          {"rows", list}};
}

bool Succeeded(const std::vector<TryRow>& rows, const std::vector<Participant>& participants) {
  for (const TryRow& row : rows) {
    if (row.outcome == "ok") continue;
    for (const Participant& participant : participants) {
      if (participant.tried && participant.method->id == row.method) return false;
    }
  }
  return true;
}

absl::StatusOr<int> RunTryCommand(const Arguments& args) {
  TryRequest request;
  QM_RETURN_IF_ERROR(ReadShape(args.Text("shape"), &request));
  request.seed = static_cast<uint64_t>(args.Integer("seed"));
  request.layers = TryLayerNames();
  request.setup.device = args.Text("device");
  if (const auto device = ParseDevice(request.setup.device); !device.ok()) {
    return UsageError(device.status());
  }
  if (args.Real("time-limit") <= 0) return UsageError("--time-limit wants a number above 0");
  request.setup.plugins = args.List("plugin");
  request.setup.plugins.insert(request.setup.plugins.begin(), args.Text("PLUGIN"));
  absl::StatusOr<Catalog> catalog = DiscoverPlugins(request.setup.plugins);
  if (!catalog.ok()) return UsageError(catalog.status());
  QM_RETURN_IF_ERROR(CheckNamedPlugins(*catalog, request.setup.plugins));
  const auto given = ParseOptions(args.List("option"));
  if (!given.ok()) return UsageError(given.status());
  QM_ASSIGN_OR_RETURN(const auto methods,
                      TriedMethods(*catalog, args.Text("PLUGIN"), args.Text("method")));
  QM_ASSIGN_OR_RETURN(std::vector<Participant> participants, Tried(methods, *given));
  QM_RETURN_IF_ERROR(AddBeside(args, *catalog, *given, &participants));
  QM_ASSIGN_OR_RETURN(const std::vector<TryRow> rows, RunAll(args, request, participants));
  args.out() << "layers of " << request.out_features << " x " << request.in_features << ", seed "
             << request.seed << ", device " << request.setup.device << "\n\n"
             << Table(rows) << Failures(rows);
  const bool succeeded = Succeeded(rows, participants);
  if (!succeeded && !args.Flag("in-process")) {
    std::string options;
    for (const std::string& option : args.List("option")) {
      absl::StrAppend(&options, " --option ", option);
    }
    args.out() << "\nWith --in-process the calls are made in this process, for a debugger:\n"
               << "  gdb --args quantmill try " << args.Text("PLUGIN") << options
               << " --in-process\n";
  }
  QM_RETURN_IF_ERROR(args.WriteJson(Json(request, rows)));
  return succeeded ? kExitDone : kExitFailed;
}

}  // namespace

Command MakeTryCommand() {
  Command command;
  command.name = "try";
  command.summary = "quantize made-up layers with a plugin, beside other methods";
  command.arguments = {{"PLUGIN", "a plugin file (.so)"}};
  command.options = {
      {.name = "method", .value = "ID", .doc = "one method of the plugin, not all of them"},
      {.name = "option",
       .value = "NAME=VALUE",
       .doc = "an option of the plugin's methods; those beside get it if they have it, too",
       .repeatable = true},
      {.name = "beside",
       .value = "IDS",
       .doc = "methods to compare with, those found of the default",
       .default_value = "ptq,hqq,gptq"},
      {.name = "shape", .value = "OUTxIN", .doc = "of the layers", .default_value = "256x512"},
      {.name = "seed",
       .value = "N",
       .doc = "of the layers and of the methods",
       .default_value = "1",
       .kind = CommandOption::Kind::kInteger},
      {.name = "time-limit",
       .value = "SECONDS",
       .doc = "end a call that shows no sign of life for so long",
       .default_value = "60",
       .kind = CommandOption::Kind::kReal},
      {.name = "in-process",
       .value = "",
       .doc = "no worker process: for debuggers; a crash ends the command"},
      DeviceOption(),
      PluginOption()};
  command.examples = {"quantmill try ./libqm_mine.so",
                      "quantmill try ./libqm_mine.so --option bits=3 --shape 1024x4096",
                      "# stop where it crashes",
                      "gdb --args quantmill try ./libqm_mine.so --in-process"};
  command.notes =
      "Layers: 'gaussian' (independent weights and inputs), 'outlier-channels' (few channels with\n"
      "large weights or inputs), 'correlated-inputs' (inputs of low rank and noise). WEIGHT NMSE "
      "is\n"
      "sum (W - A)^2 / sum W^2 for weights W stored as A; OUTPUT NMSE is tr(E H E') / tr(W H W')\n"
      "with E = W - A and H the Hessian of the inputs; BITS counts everything stored, per weight;\n"
      "TIME is the fastest of up to three calls; SCRATCH the most memory a call held beside its\n"
      "result. Exit code 1 if a method of the plugin failed on a layer.";
  command.run = RunTryCommand;
  return command;
}

}  // namespace quantmill
