#include "host/run/crash_bundle.h"

#include <filesystem>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/io/files.h"
#include "core/io/json.h"
#include "core/io/safetensors_reader.h"
#include "core/io/sha256.h"
#include "host/run/bundle_files.h"
#include "host/run/tune_bundle.h"

namespace quantmill {
namespace {

constexpr char kWeightFile[] = "/weight.safetensors";

absl::Status ReadTensors(const std::string& directory, CrashBundle* bundle) {
  QM_ASSIGN_OR_RETURN(const auto file, SafetensorsFile::Open(directory + kWeightFile));
  QM_ASSIGN_OR_RETURN(bundle->weight, file->Get("weight"));
  const Shape expected({bundle->slot.out_features, bundle->slot.in_features});
  if (bundle->weight.dtype() != DType::kF32 || bundle->weight.shape() != expected) {
    return absl::DataLossError(absl::StrCat(directory, kWeightFile, " is no f32 weight of shape ",
                                            expected.ToString(), " as call.json says"));
  }
  if (!FileExists(directory + kStatisticsFile)) return absl::OkStatus();
  QM_ASSIGN_OR_RETURN(const auto statistics, SafetensorsFile::Open(directory + kStatisticsFile));
  for (const SafetensorsEntry& entry : statistics->entries()) {
    QM_ASSIGN_OR_RETURN(Tensor tensor, statistics->Get(entry.name));
    bundle->statistics.push_back({entry.name, std::move(tensor)});
  }
  return absl::OkStatus();
}

}  // namespace

nlohmann::json DescribeCall(const LoadedMethod& method, const std::string& stage,
                            const std::string& function, const SlotTask& task, Device device) {
  const LinearSlot& slot = *task.slot;
  return {{"plugin", method.method->id},
          {"version", method.method->version},
          {"path", method.path},
          {"function", function},
          {"stage", stage},
          {"slot", slot.name},
          {"role", slot.role},
          {"out_features", slot.out_features},
          {"in_features", slot.in_features},
          {"input_group", slot.input_group},
          {"weight_dtype", std::string(DTypeName(task.weight_dtype))},
          {"scale_dtype", std::string(DTypeName(task.scale_dtype))},
          {"device", DeviceName(device)},
          {"seed", task.seed},
          {"options", *task.options}};
}

absl::Status WriteCrashBundle(const std::string& directory, Backend& backend, nlohmann::json call,
                              const SlotTask& task) {
  std::error_code error;
  std::filesystem::create_directories(directory, error);
  if (error) return SystemError("create", directory, error.value());
  QM_RETURN_IF_ERROR(
      WriteBundleTensors(directory + kWeightFile, {{"weight", task.weight}}, backend));
  int64_t rows = 0;
  std::vector<NamedTensor> statistics = StatisticsOf(task, &rows);
  if (!statistics.empty()) {
    QM_RETURN_IF_ERROR(WriteBundleTensors(directory + kStatisticsFile, statistics, backend));
  }
  call["row_count"] = rows;
  QM_ASSIGN_OR_RETURN(call["plugin_sha256"], Sha256OfFile(call["path"].get<std::string>()));
  return WriteFile(directory + kCallFile, call.dump(1) + "\n");
}

absl::StatusOr<CrashBundle> ReadCrashBundle(const std::string& directory) {
  const std::string path = directory + kCallFile;
  if (!FileExists(path)) {
    return absl::NotFoundError(
        ErrorText(absl::StrCat("no failed call in ", directory), "it has no file call.json",
                  "name the folder that the message of the run named, WORK_DIR/crash/KEY/LAYER"));
  }
  QM_ASSIGN_OR_RETURN(const nlohmann::json json, ReadJson(path));
  FieldReader fields(json, path);
  CrashBundle bundle;
  bundle.function = fields.Text("function");
  bundle.method = fields.Text("plugin");
  bundle.version = fields.Text("version");
  bundle.plugin_path = fields.Text("path");
  bundle.plugin_sha256 = fields.Text("plugin_sha256");
  bundle.stage = fields.Text("stage");
  bundle.device = fields.Text("device");
  bundle.slot.name = fields.Text("slot");
  bundle.scale_dtype = fields.Type("scale_dtype");
  bundle.seed = fields.Unsigned("seed");
  bundle.options = fields.Options("options");
  QM_RETURN_IF_ERROR(fields.status());
  if (bundle.function == kTransformPlanFunction || bundle.function == kTransformRunFunction ||
      bundle.tunes()) {
    QM_ASSIGN_OR_RETURN(BundledBlock block, ReadBundledBlock(directory, json, bundle.scale_dtype,
                                                             /*with_tensors=*/!bundle.plans()));
    if (bundle.tunes()) {
      QM_RETURN_IF_ERROR(ReadTuneParts(directory, json, !bundle.plans(), &block));
    }
    bundle.block = std::make_shared<const BundledBlock>(std::move(block));
    return bundle;
  }
  if (IsReparamFunction(bundle.function)) {
    QM_ASSIGN_OR_RETURN(BundledReparam call, ReadReparamBundle(directory, json));
    bundle.slot = call.slot;
    bundle.reparam = std::make_shared<const BundledReparam>(std::move(call));
    return bundle;
  }
  if (bundle.function != kPlanFunction && bundle.function != kRunFunction) {
    return absl::DataLossError(absl::StrCat("cannot use the call in ", path,
                                            "; this version does not know the function '",
                                            bundle.function, "'"));
  }
  bundle.slot.role = fields.Text("role");
  bundle.slot.out_features = fields.Integer("out_features");
  bundle.slot.in_features = fields.Integer("in_features");
  bundle.slot.input_group = static_cast<int>(fields.Integer("input_group"));
  bundle.weight_dtype = fields.Type("weight_dtype");
  QM_RETURN_IF_ERROR(fields.status());
  if (bundle.function == kPlanFunction) return bundle;
  bundle.row_count = fields.Integer("row_count");
  QM_RETURN_IF_ERROR(fields.status());
  QM_RETURN_IF_ERROR(ReadTensors(directory, &bundle));
  return bundle;
}

}  // namespace quantmill
