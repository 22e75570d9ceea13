// quantmill verify DIR: reopen a written checkpoint and check it.
#include "host/run/verify.h"

#include <iostream>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "host/cli/command.h"
#include "host/cli/progress.h"
#include "host/pipeline/device.h"
#include "host/plugins/registry.h"
#include "host/run/backend.h"

namespace quantmill {
namespace {

absl::StatusOr<int> RunVerify(const Arguments& arguments) {
  if (const auto device = ParseDevice(arguments.Text("device")); !device.ok()) {
    return UsageError(device.status());
  }
  QM_ASSIGN_OR_RETURN(const Catalog catalog, DiscoverPlugins(arguments.List("plugin")));
  QM_RETURN_IF_ERROR(CheckNamedPlugins(catalog, arguments.List("plugin")));
  QM_ASSIGN_OR_RETURN(std::vector<LoadedMethod> methods, LoadMethods(catalog, {}));
  QM_ASSIGN_OR_RETURN(const std::unique_ptr<Backend> host, MakeCpuBackend());
  QM_ASSIGN_OR_RETURN(const std::unique_ptr<Backend> backend,
                      MakeBackend(arguments.Text("device"), std::nullopt));
  PluginFormats formats(std::move(methods), *host);
  ProgressLine line;
  VerifyOptions options;
  options.directory = arguments.Text("DIR");
  options.reference = arguments.Text("reference");
  options.progress = [&line](const std::string& step, int64_t done, int64_t total) {
    line.Update({.stage = step, .unit = "block", .done = done, .total = total});
  };
  const absl::StatusOr<VerifyReport> report = VerifyCheckpoint(options, formats, *backend);
  line.Clear();
  QM_RETURN_IF_ERROR(report.status());
  for (const std::string& check : report->checks) arguments.out() << "ok: " << check << "\n";
  for (const std::string& slot : report->unquantized) {
    arguments.out() << "not quantized: " << slot << "\n";
  }
  for (const std::string& warning : report->warnings) std::cerr << "warning: " << warning << "\n";
  QM_RETURN_IF_ERROR(arguments.WriteJson(ToJson(*report)));
  return kExitDone;
}

}  // namespace

Command MakeVerifyCommand() {
  Command command;
  command.name = "verify";
  command.summary = "reopen a written checkpoint and check it by its reader's rules";
  command.arguments = {{"DIR", "the checkpoint directory, or a GGUF file", true}};
  command.options = {
      {.name = "reference", .value = "MODEL", .doc = "the original, to compare predictions with"},
      DeviceOption(),
      PluginOption()};
  command.examples = {"quantmill verify ./out", "quantmill verify ./out --reference ./model"};
  command.run = RunVerify;
  return command;
}

}  // namespace quantmill
