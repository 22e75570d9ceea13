#include "host/run/tune_bundle.h"

#include <filesystem>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/io/files.h"
#include "core/io/safetensors_reader.h"
#include "host/run/bundle_files.h"

namespace quantmill {
namespace {

constexpr char kPackedFile[] = "/packed.safetensors";
constexpr char kFormatIds[] = "packed_formats";
constexpr char kFormatParameters[] = "packed_parameters";
constexpr char kTensorNames[] = "packed_tensors";  // in the order a plugin sees them

// What both have, under one name.
TransformTask SharedParts(const TuneTask& task, const TransformPlan& plan) {
  TransformTask shared;
  shared.block = task.block;
  shared.plan = &plan;
  shared.options = task.options;
  shared.seed = task.seed;
  shared.config = task.config;
  shared.dense = task.dense;
  shared.windows = task.windows;
  shared.inputs = task.inputs;
  return shared;
}

}  // namespace

nlohmann::json DescribeTuneCall(const LoadedMethod& method, const std::string& stage,
                                const std::string& function, const TuneTask& task,
                                const Backend& backend, const std::string& config_file) {
  const TransformPlan none;
  return DescribeTransformCall(method, stage, function, SharedParts(task, none), backend,
                               config_file);
}

absl::Status WriteTuneBundle(const std::string& directory, Backend& backend, nlohmann::json call,
                             const TuneTask& task) {
  std::error_code error;
  std::filesystem::create_directories(directory, error);
  if (error) return SystemError("create", directory, error.value());
  std::vector<NamedTensor> named;
  nlohmann::json ids = nlohmann::json::array(), parameters = ids, names = ids;
  for (size_t i = 0; i < task.packed.size(); ++i) {
    ids.push_back(task.packed[i].format_id);
    parameters.push_back(task.packed[i].format_json);
    for (const NamedTensor& tensor : task.packed[i].tensors) {
      named.push_back({absl::StrCat(i, ".", tensor.name), tensor.tensor});
      names.push_back(named.back().name);
    }
  }
  call[kFormatIds] = std::move(ids);
  call[kFormatParameters] = std::move(parameters);
  call[kTensorNames] = std::move(names);
  QM_RETURN_IF_ERROR(WriteBundleTensors(directory + kPackedFile, named, backend));
  const TransformPlan none;
  return WriteTransformBundle(directory, backend, std::move(call), SharedParts(task, none));
}

absl::Status ReadTuneParts(const std::string& directory, const nlohmann::json& call,
                           bool with_tensors, BundledBlock* bundle) {
  bundle->block.next_roundings.clear();
  bundle->block.sites.clear();
  if (!with_tensors) return absl::OkStatus();
  FieldReader fields(call, directory + kCallFile);
  const std::vector<std::string> ids = fields.Texts(kFormatIds);
  const std::vector<std::string> parameters = fields.Texts(kFormatParameters);
  const std::vector<std::string> names = fields.Texts(kTensorNames);
  QM_RETURN_IF_ERROR(fields.status());
  const std::vector<LinearSlot>& slots = bundle->block.slots;
  if (ids.size() != slots.size() || parameters.size() != slots.size()) {
    return absl::DataLossError(ErrorText(absl::StrCat("cannot use the call in ", directory),
                                         "'linears' and what is said of them do not fit together"));
  }
  QM_ASSIGN_OR_RETURN(const auto file, SafetensorsFile::Open(directory + kPackedFile));
  for (size_t i = 0; i < slots.size(); ++i) {
    PackedWeight& packed = bundle->packed.emplace_back();
    packed.format_id = ids[i];
    packed.format_json = parameters[i];
    packed.out_features = slots[i].out_features;
    packed.in_features = slots[i].in_features;
    const std::string prefix = absl::StrCat(i, ".");
    for (const std::string& name : names) {
      if (!absl::StartsWith(name, prefix)) continue;
      QM_ASSIGN_OR_RETURN(Tensor tensor, file->Get(name));
      packed.tensors.push_back({name.substr(prefix.size()), std::move(tensor)});
    }
  }
  return absl::OkStatus();
}

}  // namespace quantmill
