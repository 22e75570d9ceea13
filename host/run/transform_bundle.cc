#include "host/run/transform_bundle.h"

#include <algorithm>
#include <filesystem>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/io/files.h"
#include "core/io/safetensors_reader.h"
#include "core/io/sha256.h"
#include "core/model/block_edits.h"
#include "core/model/dense_source.h"
#include "host/run/bundle_files.h"
#include "host/run/call_parts.h"

namespace quantmill {
namespace {

constexpr char kConfigFile[] = "/config.json";
constexpr char kWeightsFile[] = "/model.safetensors";
constexpr char kWindowsFile[] = "/windows.safetensors";

std::string StatisticName(int group, absl::string_view id) { return absl::StrCat(group, ".", id); }

absl::Status WriteWeights(const std::string& directory, Backend& backend,
                          const TransformTask& task) {
  BlockWeights weights = *task.dense;
  const BlockTensors tensors(*task.config, task.block->block, &weights);
  std::vector<NamedTensor> named;
  for (const auto& [name, tensor] : tensors.all()) named.push_back({name, *tensor});
  return WriteBundleTensors(directory + kWeightsFile, named, backend);
}

// The groups' statistics as the call sees them, and in *rows the rows they were measured on.
absl::Status WriteStatistics(const std::string& directory, Backend& backend,
                             const TransformTask& task, nlohmann::json* rows) {
  std::vector<NamedTensor> named;
  std::map<int, int64_t> counts;
  for (const LinearSlot& slot : task.block->slots) {
    if (counts.count(slot.input_group) > 0) continue;
    int64_t count = 0;
    for (NamedTensor& tensor : MeasuredStatistics(task.plan->stats, slot.input_group, task.stats,
                                                  task.stats_from_original, &count)) {
      named.push_back({StatisticName(slot.input_group, tensor.name), std::move(tensor.tensor)});
    }
    counts[slot.input_group] = count;
  }
  *rows = nlohmann::json::array();
  for (const auto& [group, count] : counts) rows->push_back({group, count});
  if (named.empty()) return absl::OkStatus();
  return WriteBundleTensors(directory + kStatisticsFile, named, backend);
}

absl::Status WriteWindows(const std::string& directory, Backend& backend,
                          const TransformTask& task) {
  std::vector<NamedTensor> named;
  int64_t bytes = 0;
  for (int64_t window = 0; window < task.windows; ++window) {
    QM_ASSIGN_OR_RETURN(Tensor input, task.inputs(window));
    bytes += input.bytes();
    if (window > 0 && bytes > kMostWindowBytes) break;
    named.push_back({absl::StrCat(window), std::move(input)});
  }
  if (named.empty()) return absl::OkStatus();
  return WriteBundleTensors(directory + kWindowsFile, named, backend);
}

absl::Status Damaged(const std::string& directory, absl::string_view why) {
  return absl::DataLossError(ErrorText(absl::StrCat("cannot use the call in ", directory), why));
}

absl::Status ReadTensors(const std::string& directory, BundledBlock* bundle) {
  QM_ASSIGN_OR_RETURN(bundle->weights, Checkpoint::Open(directory));
  if (FileExists(directory + kStatisticsFile)) {
    QM_ASSIGN_OR_RETURN(const auto file, SafetensorsFile::Open(directory + kStatisticsFile));
    for (const SafetensorsEntry& entry : file->entries()) {
      QM_ASSIGN_OR_RETURN(Tensor tensor, file->Get(entry.name));
      bundle->statistics.push_back({entry.name, std::move(tensor)});
    }
  }
  if (bundle->window_count == 0) return absl::OkStatus();
  QM_ASSIGN_OR_RETURN(const auto file, SafetensorsFile::Open(directory + kWindowsFile));
  for (size_t window = 0; window < file->entries().size(); ++window) {
    QM_ASSIGN_OR_RETURN(Tensor input, file->Get(absl::StrCat(window)));
    if (input.rank() != 2 || input.dim(1) != bundle->config.hidden_size ||
        !IsModelFloat(input.dtype())) {
      return Damaged(directory, absl::StrCat("window ", window, " is no input of the model"));
    }
    bundle->windows.push_back(std::move(input));
  }
  if (bundle->windows.empty() ||
      static_cast<int64_t>(bundle->windows.size()) > bundle->window_count) {
    return Damaged(directory, "windows.safetensors holds other windows than call.json says");
  }
  return absl::OkStatus();
}

// The linears of the call, out of those of the block.
absl::Status FindSlots(const std::string& directory, const std::vector<std::string>& names,
                       BundledBlock* bundle) {
  const std::vector<LinearSlot> all = BlockSlots(bundle->config, bundle->block.block);
  for (const std::string& name : names) {
    const auto found = std::find_if(all.begin(), all.end(),
                                    [&](const LinearSlot& slot) { return slot.name == name; });
    if (found == all.end()) {
      return Damaged(directory, absl::StrCat("config.json has no linear ", name));
    }
    bundle->block.slots.push_back(*found);
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<BlockWeights> BundledBlock::Load(Backend& backend) const {
  return LoadBlockWeights(config, *weights, block.block, backend,
                          [this](const LinearSlot& slot, Backend& target) {
                            return LoadDenseLinear(*weights, slot, target);
                          });
}

absl::StatusOr<Statistics> BundledBlock::StatisticsFor(const TransformPlan& plan,
                                                       Backend& backend) const {
  Statistics result;
  for (const auto& [group, rows] : row_counts) {
    for (const SlotPlan::Stat& stat : plan.stats) {
      StatRequest request = stat.request;
      request.input_group = group;
      result.SetRowCount(group, request.from_original, rows);
      const std::string name = StatisticName(group, AbslView(StatId(request.kind)));
      const auto found =
          std::find_if(statistics.begin(), statistics.end(),
                       [&](const NamedTensor& tensor) { return tensor.name == name; });
      if (found != statistics.end()) {
        QM_ASSIGN_OR_RETURN(Tensor value, backend.ToDevice(found->tensor));
        result.Set(request, std::move(value));
      } else if (!stat.optional) {
        return absl::FailedPreconditionError(ErrorText(
            absl::StrCat("plan() asks for the statistic '", AbslView(StatId(request.kind)), "'"),
            "the failed call did not have it", "run the pipeline again"));
      }
    }
  }
  return result;
}

nlohmann::json DescribeTransformCall(const LoadedMethod& method, const std::string& stage,
                                     const std::string& function, const TransformTask& task,
                                     const Backend& backend, const std::string& config_file) {
  const TransformBlock& block = *task.block;
  nlohmann::json linears = nlohmann::json::array(), dtypes = linears, roundings = linears;
  for (size_t i = 0; i < block.slots.size(); ++i) {
    qm_next_rounding next = {};
    if (!block.next_roundings.empty()) next = block.next_roundings[i];
    linears.push_back(block.slots[i].name);
    dtypes.push_back(std::string(DTypeName(block.weight_dtypes[i])));
    roundings.push_back({next.bits, next.symmetric, next.group_size});
  }
  return {{"plugin", method.method->id},
          {"version", method.method->version},
          {"path", method.path},
          {"function", function},
          {"stage", stage},
          {"slot", block.name},
          {"block", block.block},
          {"linears", std::move(linears)},
          {"weight_dtypes", std::move(dtypes)},
          {"next_roundings", std::move(roundings)},
          {"scale_dtype", std::string(DTypeName(block.scale_dtype))},
          {"config", config_file},
          {"activation_dtype", std::string(DTypeName(backend.activation_dtype()))},
          {"device", DeviceName(backend.device())},
          {"seed", task.seed},
          {"options", *task.options}};
}

absl::Status WriteTransformBundle(const std::string& directory, Backend& backend,
                                  nlohmann::json call, const TransformTask& task) {
  std::error_code error;
  std::filesystem::create_directories(directory, error);
  if (error) return SystemError("create", directory, error.value());
  QM_RETURN_IF_ERROR(WriteFile(directory + kConfigFile, task.config->json.dump(1) + "\n"));
  QM_RETURN_IF_ERROR(WriteWeights(directory, backend, task));
  QM_RETURN_IF_ERROR(WriteStatistics(directory, backend, task, &call["row_counts"]));
  QM_RETURN_IF_ERROR(WriteWindows(directory, backend, task));
  call["windows"] = task.windows;
  QM_ASSIGN_OR_RETURN(call["plugin_sha256"], Sha256OfFile(call["path"].get<std::string>()));
  return WriteFile(directory + kCallFile, call.dump(1) + "\n");
}

absl::StatusOr<BundledBlock> ReadBundledBlock(const std::string& directory,
                                              const nlohmann::json& call, DType scale_dtype,
                                              bool with_tensors) {
  BundledBlock bundle;
  QM_ASSIGN_OR_RETURN(bundle.config, ReadModelConfig(directory));
  FieldReader fields(call, directory + kCallFile);
  TransformBlock& block = bundle.block;
  block.block = fields.Integer("block");
  block.weight_dtypes = fields.Types("weight_dtypes");
  block.scale_dtype = scale_dtype;
  bundle.activation_dtype = fields.Type("activation_dtype");
  const std::vector<std::string> names = fields.Texts("linears");
  for (const std::vector<int64_t>& row : fields.Table("next_roundings", 3)) {
    qm_next_rounding& next = block.next_roundings.emplace_back();
    next.bits = static_cast<int32_t>(row[0]);
    next.symmetric = static_cast<int32_t>(row[1]);
    next.group_size = row[2];
  }
  if (with_tensors) {
    bundle.window_count = fields.Integer("windows");
    for (const std::vector<int64_t>& row : fields.Table("row_counts", 2)) {
      bundle.row_counts[static_cast<int>(row[0])] = row[1];
    }
  }
  QM_RETURN_IF_ERROR(fields.status());
  if (block.block < 0 || block.block >= bundle.config.layers || names.empty() ||
      block.weight_dtypes.size() != names.size() || block.next_roundings.size() != names.size()) {
    return Damaged(directory, "'block', 'linears' and what is said of them do not fit together");
  }
  block.name = BlockName(block.block);
  QM_RETURN_IF_ERROR(FindSlots(directory, names, &bundle));
  block.sites = SitesAmong(bundle.config, block);
  if (with_tensors) QM_RETURN_IF_ERROR(ReadTensors(directory, &bundle));
  return bundle;
}

}  // namespace quantmill
