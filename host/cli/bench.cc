// quantmill bench BENCH.yaml: methods side by side.
#include "host/bench/bench.h"

#include <iostream>

#include "core/base/status.h"
#include "host/bench/tables.h"
#include "host/cli/command.h"
#include "host/cli/console.h"
#include "host/pipeline/device.h"

namespace quantmill {
namespace {

absl::StatusOr<int> RunBenchCommand(const Arguments& arguments) {
  BenchOptions options;
  options.file = arguments.Text("BENCH");
  options.directory = arguments.Text("out");
  options.resume = arguments.Flag("resume");
  options.plugins = arguments.List("plugin");
  if (arguments.Has("device")) {
    options.device = arguments.Text("device");
    const auto device = ParseDevice(options.device);
    if (!device.ok()) return UsageError(device.status());
  }
  Console console;
  options.sink = console.Sink();
  options.say = [&console](const std::string& line) {
    console.Clear();
    std::cerr << line << std::endl;
  };
  const absl::StatusOr<nlohmann::ordered_json> results = RunBench(options);
  console.Clear();
  if (!results.ok()) return results.status();
  arguments.out() << "\n" << BenchText(*results);
  QM_RETURN_IF_ERROR(WriteBenchFiles(options.directory, *results));
  arguments.out() << options.directory
                  << ": results.json, results.csv, results.md, index.html; checkpoints in cells/\n";
  QM_RETURN_IF_ERROR(arguments.WriteJson(*results));
  return BenchIsComplete(*results) ? kExitDone : kExitFailed;
}

}  // namespace

Command MakeBenchCommand() {
  Command command;
  command.name = "bench";
  command.summary = "compare methods: quality, size, speed, time and memory in one table";
  command.arguments = {{"BENCH", "a bench file (.yaml): models, and rows of stages", true}};
  command.options = {
      {.name = "out", .value = "DIR", .doc = "where checkpoints and results go", .required = true},
      {.name = "resume",
       .value = "",
       .doc = "go on in DIR: compute only what is missing or has changed"},
      DeviceOption(),
      PluginOption()};
  command.examples = {"quantmill bench configs/bench/quickstart.yaml --out build/bench",
                      "# after an interruption, or with rows added to the file",
                      "quantmill bench configs/bench/quickstart.yaml --out build/bench --resume",
                      "quantmill bench methods.yaml --out results --device cuda:0 --json -"};
  command.notes =
      "Every row runs on every model as `run` would, in DIR/cells/MODEL/ROW. A row that fails is "
      "shown\n"
      "with its error; the others go on, and the exit code is 1. The untouched model is measured "
      "in "
      "the\n"
      "same way. Schema: docs/schema/bench.schema.json; examples: configs/bench/.";
  command.run = RunBenchCommand;
  return command;
}

}  // namespace quantmill
