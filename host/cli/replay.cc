// quantmill replay DIR: the call that failed in a run, once more.
#include <filesystem>
#include <ostream>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/io/sha256.h"
#include "host/cli/command.h"
#include "host/cli/table.h"
#include "host/pipeline/device.h"
#include "host/plugins/catalog.h"
#include "host/supervisor/supervise.h"
#include "host/trial/replay_call.h"
#include "host/worker/method_options.h"

namespace quantmill {
namespace {

// The bundle's options as far as the plugin still has them, with defaults for those it has gained.
absl::StatusOr<ResolvedOptions> OptionsNow(const MethodInfo& method, const CrashBundle& bundle) {
  return OptionsFor(method, FittingOptions(method, bundle.options));
}

absl::StatusOr<ReplayRequest> MakeRequest(const Arguments& args, const CrashBundle& bundle) {
  ReplayRequest request;
  request.directory = args.Text("DIR");
  request.setup.method = bundle.method;
  request.setup.device = args.Has("device") ? args.Text("device") : bundle.device;
  if (const auto device = ParseDevice(request.setup.device); !device.ok()) {
    return UsageError(device.status());
  }
  request.setup.plugins = args.List("plugin");
  if (request.setup.plugins.empty()) request.setup.plugins = {bundle.plugin_path};
  absl::StatusOr<Catalog> catalog = DiscoverPlugins(request.setup.plugins);
  if (!catalog.ok()) {
    return UsageError(std::string(catalog.status().message()), "",
                      "name the plugin's file with --plugin");
  }
  QM_RETURN_IF_ERROR(CheckNamedPlugins(*catalog, request.setup.plugins));
  const MethodInfo* method = catalog->FindMethod(bundle.method);
  if (method == nullptr) {
    return UsageError(absl::StrCat("no plugin offers method '", bundle.method, "'"),
                      "the failed call was one of it", "name the plugin's file with --plugin");
  }
  absl::StatusOr<ResolvedOptions> options = OptionsNow(*method, bundle);
  if (!options.ok()) return UsageError(options.status());
  request.options = *std::move(options);
  return request;
}

std::string FileNote(const CrashBundle& bundle, const std::string& file) {
  const absl::StatusOr<std::string> digest = Sha256OfFile(file);
  const bool same = digest.ok() && *digest == bundle.plugin_sha256;
  return same ? "" : " (not the file that failed, or built anew since)";
}

// What the call works on.
std::string Target(const CrashBundle& bundle) {
  if (bundle.block == nullptr) {
    std::string text = absl::StrCat("layer    ", bundle.slot.name, " [", bundle.slot.out_features,
                                    " x ", bundle.slot.in_features, "]");
    if (bundle.reparam == nullptr) return text;
    const BundledReparam& call = *bundle.reparam;
    if (call.base != nullptr) absl::StrAppend(&text, ", packed as ", call.base->format_id);
    if (!call.inputs.in.empty()) absl::StrAppend(&text, ", ", call.inputs.in.dim(0), " rows");
    return text;
  }
  const BundledBlock& block = *bundle.block;
  std::string text =
      absl::StrCat("block    ", bundle.slot.name, ", ", block.block.slots.size(), " linears");
  if (block.window_count > 0) {
    absl::StrAppend(&text, ", ", block.windows.size(), " of ", block.window_count,
                    " windows of text");
  }
  return text;
}

std::string Head(const CrashBundle& bundle, const ReplayRequest& request) {
  const std::string& file = request.setup.plugins[0];
  return absl::StrCat("call     ", bundle.function, " of ", bundle.method, ", stage ", bundle.stage,
                      "\nplugin   ", file, FileNote(bundle, file), "\n", Target(bundle), ", seed ",
                      bundle.seed, "\ndevice   ", request.setup.device, "\n");
}

std::string Tail(const CrashBundle& bundle, const ReplayResult& replay) {
  std::string text = absl::StrCat("outcome  ", replay.outcome);
  if (!replay.succeeded()) return absl::StrCat(text, ": ", replay.text, "\n");
  if (bundle.plans()) return text + "\n";
  const TrialResult& r = replay.result;
  const std::string scratch = FormatBytes(static_cast<int64_t>(r.scratch_bytes));
  if (r.not_finite >= 0) {
    return absl::StrCat(text, ": ",
                        r.not_finite == 0 ? std::string("results are finite")
                                          : absl::StrCat(r.not_finite, " values are not finite"),
                        ", ", r.seconds, " s\n");
  }
  if (r.tuned >= 0) {
    return absl::StrCat(text, ": ", r.tuned, " linears tuned, ", r.edits, " edits, error of the ",
                        "block ", r.loss_before, " before, ", r.loss_after, " after",
                        r.loss_after <= r.loss_before ? "" : " (a run keeps what was packed)", ", ",
                        r.seconds, " s, scratch ", scratch, "\n");
  }
  if (r.edits >= 0) {
    return absl::StrCat(text, ": ", r.edits, " edits, ", r.seconds, " s, scratch ", scratch, "\n");
  }
  return absl::StrCat(text, ": ", r.format_id, ", ", r.bits_per_weight, " bits per weight, weight ",
                      "NMSE ", r.weight_nmse, ", ", r.seconds, " s, scratch ", scratch, "\n");
}

nlohmann::ordered_json Json(const CrashBundle& bundle, const ReplayRequest& request,
                            const ReplayResult& replay) {
  nlohmann::ordered_json json = {
      {"function", bundle.function}, {"plugin", bundle.method},  {"path", request.setup.plugins[0]},
      {"stage", bundle.stage},       {"slot", bundle.slot.name}, {"device", request.setup.device},
      {"outcome", replay.outcome}};
  if (!replay.text.empty()) json["text"] = replay.text;
  if (replay.succeeded() && !bundle.plans()) {
    json["result"] = ToJson(replay.result);
  }
  return json;
}

absl::StatusOr<int> RunReplayCommand(const Arguments& args) {
  const absl::StatusOr<CrashBundle> bundle = ReadCrashBundle(args.Text("DIR"));
  if (!bundle.ok()) return UsageError(bundle.status());
  QM_ASSIGN_OR_RETURN(const ReplayRequest request, MakeRequest(args, *bundle));
  // Before the call: in this process it may be the last thing to be seen.
  args.out() << Head(*bundle, request) << std::flush;
  const absl::StatusOr<ReplayResult> replay =
      args.Flag("in-process") ? ReplayInProcess(request) : ReplayInWorker(request, HangSeconds());
  if (!replay.ok()) return RefusedError(replay.status());
  args.out() << Tail(*bundle, *replay);
  if (!replay->succeeded() && !args.Flag("in-process")) {
    args.out() << "debug    gdb --args quantmill replay " << args.Text("DIR") << " --in-process\n";
  }
  QM_RETURN_IF_ERROR(args.WriteJson(Json(*bundle, request, *replay)));
  return replay->succeeded() ? kExitDone : kExitFailed;
}

}  // namespace

Command MakeReplayCommand() {
  CommandOption device = DeviceOption();
  device.default_value = "";
  device.doc = "instead of the one of the run";
  CommandOption plugin = PluginOption();
  plugin.doc = "instead of the file of the run";
  Command command;
  command.name = "replay";
  command.summary = "make a plugin call that failed in a run once more";
  command.arguments = {{"DIR", "the folder that the run's message named"}};
  command.options = {{.name = "in-process",
                      .value = "",
                      .doc = "no worker process: for debuggers; a crash ends the command"},
                     device,
                     plugin};
  command.examples = {"quantmill replay model.work/crash/KEY/model.layers.3.mlp.down_proj",
                      "# stop where it crashes", "gdb --args quantmill replay DIR --in-process",
                      "# find what a kernel writes outside of its buffers",
                      "compute-sanitizer quantmill replay DIR --in-process"};
  command.notes =
      "A run keeps the inputs of a call that fails or, at the second attempt, of one that crashes\n"
      "or hangs (no sign of life for $QM_HANG_SECONDS, by default 300), below crash/ in its work\n"
      "directory. plan() is asked again, then run() gets the same weight (a transform or a tuning: "
      "the block\n"
      "and its inputs), statistics, options and seed. Exit code 0 if that succeeds now, 1 if it "
      "fails "
      "in\n"
      "any way.";
  command.run = RunReplayCommand;
  return command;
}

}  // namespace quantmill
