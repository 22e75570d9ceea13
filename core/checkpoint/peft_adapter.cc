#include "core/checkpoint/peft_adapter.h"

#include <algorithm>
#include <filesystem>
#include <set>
#include <system_error>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/io/files.h"
#include "core/io/json.h"
#include "core/io/safetensors_reader.h"
#include "core/io/safetensors_writer.h"
#include "core/model/graph.h"

namespace quantmill {
namespace {

constexpr char kConfigFile[] = "/adapter_config.json";
constexpr char kTensorFile[] = "/adapter_model.safetensors";
constexpr char kPrefix[] = "base_model.model.";
constexpr char kSuffix[] = ".weight";

std::string LastPart(const std::string& name) { return name.substr(name.rfind('.') + 1); }

}  // namespace

std::vector<std::string> PeftTargets(const ModelConfig& config,
                                     const std::vector<std::string>& modules) {
  const std::set<std::string> wanted(modules.begin(), modules.end());
  std::set<std::string> parts;
  for (const std::string& module : modules) parts.insert(LastPart(module));
  for (const LinearSlot& slot : AllSlots(config)) {
    if (parts.contains(LastPart(slot.name)) && !wanted.contains(slot.name)) {
      return {wanted.begin(), wanted.end()};
    }
  }
  return {parts.begin(), parts.end()};
}

absl::Status WritePeftAdapter(const std::string& directory, const PeftAdapter& adapter) {
  std::vector<TensorDeclaration> declarations;
  const auto name_of = [](const std::string& module, const std::string& parameter) {
    return absl::StrCat(kPrefix, module, ".", parameter, kSuffix);
  };
  for (const auto& [module, parameters] : adapter.modules) {
    for (const NamedTensor& named : parameters) {
      declarations.push_back(
          {name_of(module, named.name), named.tensor.dtype(), named.tensor.shape()});
    }
  }
  QM_ASSIGN_OR_RETURN(auto writer,
                      SafetensorsWriter::Create(directory + kTensorFile, declarations));
  for (const auto& [module, parameters] : adapter.modules) {
    for (const NamedTensor& named : parameters) {
      QM_RETURN_IF_ERROR(writer->Write(name_of(module, named.name), named.tensor));
    }
  }
  QM_RETURN_IF_ERROR(writer->Finish());
  return WriteFile(directory + kConfigFile, adapter.config.dump(2) + "\n");
}

absl::StatusOr<PeftAdapter> ReadPeftAdapter(const std::string& directory) {
  std::error_code error;
  for (const char* file : {kConfigFile, kTensorFile}) {
    if (std::filesystem::exists(directory + file, error)) continue;
    return absl::NotFoundError(ErrorText(absl::StrCat(directory, " holds no ", file + 1),
                                         "an adapter of PEFT has an adapter_config.json and an "
                                         "adapter_model.safetensors",
                                         "name the directory of an adapter"));
  }
  PeftAdapter adapter;
  QM_ASSIGN_OR_RETURN(adapter.config, ReadJson(directory + kConfigFile));
  if (!adapter.config.is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(directory, kConfigFile, " is no JSON object"));
  }
  QM_ASSIGN_OR_RETURN(const auto file, SafetensorsFile::Open(directory + kTensorFile));
  for (const auto& entry : file->entries()) {
    const std::string& name = entry.name;
    const size_t prefix = sizeof(kPrefix) - 1, suffix = sizeof(kSuffix) - 1;
    const size_t dot =
        name.size() > suffix ? name.rfind('.', name.size() - suffix - 1) : std::string::npos;
    if (!absl::StartsWith(name, kPrefix) || !absl::EndsWith(name, kSuffix) ||
        dot == std::string::npos || dot <= prefix) {
      return absl::InvalidArgumentError(ErrorText(
          absl::StrCat(directory, kTensorFile, ": tensor '", name, "' is no parameter of a module"),
          "adapters hold base_model.model.<module>.<parameter>.weight only",
          "save it without modules_to_save and trained embeddings"));
    }
    QM_ASSIGN_OR_RETURN(Tensor tensor, file->Get(name));
    adapter.modules[name.substr(prefix, dot - prefix)].push_back(
        {name.substr(dot + 1, name.size() - suffix - dot - 1), std::move(tensor)});
  }
  if (adapter.modules.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(directory, kTensorFile, " holds no tensors"));
  }
  return adapter;
}

}  // namespace quantmill
