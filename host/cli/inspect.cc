// quantmill inspect PATH: a checkpoint's tensors, or a plugin's descriptor.
#include <filesystem>
#include <fstream>
#include <ostream>
#include <string_view>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "core/base/status.h"
#include "core/checkpoint/open_model.h"
#include "host/cli/command.h"
#include "host/cli/inspect_checkpoint.h"
#include "host/plugins/catalog.h"
#include "host/plugins/manifest.h"
#include "host/plugins/registry.h"

namespace quantmill {
namespace {

void PrintPlugin(const PluginInfo& info, std::ostream& out) {
  out << info.path << "\n"
      << "  abi        " << info.abi_major << "." << info.abi_minor << ", needs host "
      << info.abi_major << "." << info.min_host_minor << " or newer\n"
      << "  vendor     " << info.vendor << " (" << info.license << ")\n"
      << "  built with " << info.build_info << "\n"
      << "  sha256     " << info.sha256 << "\n";
  for (const MethodInfo& method : info.methods) {
    out << "  method " << method.id << " " << method.version << ": " << method.summary << "\n"
        << "    capabilities " << absl::StrJoin(method.capabilities, ", ") << "\n"
        << "    options      " << method.options.size() << "\n";
    for (const auto& format : method.formats) {
      out << "    format       " << format.id << ", stored as "
          << absl::StrJoin(format.targets, ", ") << "\n";
    }
  }
}

bool IsElf(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  char magic[4] = {};
  file.read(magic, sizeof(magic));
  return std::string_view(magic, sizeof(magic)) ==
         "\x7f"
         "ELF";
}

absl::StatusOr<int> InspectPlugin(const Arguments& args, const std::string& path) {
  if (args.Flag("manifest")) {
    QM_ASSIGN_OR_RETURN(const std::string manifest, WriteManifest(path));
    args.out() << "wrote " << manifest << "\n";
    if (!args.WantsJson()) return kExitDone;
  }
  QM_ASSIGN_OR_RETURN(const PluginInfo info, DescribePlugin(path));
  if (!args.Flag("manifest")) PrintPlugin(info, args.out());
  QM_RETURN_IF_ERROR(args.WriteJson(nlohmann::ordered_json(ToJson(info))));
  return kExitDone;
}

absl::StatusOr<int> RunInspectCommand(const Arguments& args) {
  const std::string path = args.Text("PATH");
  std::error_code error;
  if (!std::filesystem::exists(path, error)) {
    return absl::NotFoundError(
        ErrorText(absl::StrCat("cannot open ", path), "it does not exist", "check the path"));
  }
  const bool directory = std::filesystem::is_directory(path, error);
  const bool tensors = absl::EndsWith(path, ".safetensors");
  const bool gguf = absl::EndsWith(path, ".gguf");
  if (!directory && !tensors && !gguf) {
    if (!IsElf(path)) {
      return absl::InvalidArgumentError(ErrorText(
          absl::StrCat("cannot inspect ", path),
          "it is neither a checkpoint directory, a .safetensors or .gguf file nor a plugin"));
    }
    return InspectPlugin(args, path);
  }
  if (directory) QM_RETURN_IF_ERROR(CheckModelDirectory(path));
  if (args.Flag("manifest")) {
    return UsageError("--manifest is for plugin files", absl::StrCat(path, " is none"));
  }
  QM_ASSIGN_OR_RETURN(const CheckpointSummary summary,
                      tensors ? SummarizeFile(path) : SummarizeCheckpoint(path));
  args.out() << FormatSummary(summary);
  QM_RETURN_IF_ERROR(args.WriteJson(SummaryToJson(summary)));
  return kExitDone;
}

}  // namespace

Command MakeInspectCommand() {
  return {
      .name = "inspect",
      .summary = "show a checkpoint's tensors, formats and bits per weight, or a plugin",
      .arguments = {{"PATH",
                     "a checkpoint directory, a .safetensors or .gguf file, or a plugin's .so"}},
      .options = {{.name = "manifest",
                   .doc = "write a plugin's descriptor to NAME.qm.json beside it"}},
      .examples = {"quantmill inspect ./Llama-3.1-8B", "quantmill inspect ./out --json -",
                   "quantmill inspect --manifest build/libqm_mine.so"},
      .notes = "A plugin is loaded into this process: its constructors run.",
      .run = RunInspectCommand};
}

}  // namespace quantmill
