#include "host/run/crash_bundle.h"

#include <filesystem>
#include <memory>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/io/files.h"
#include "core/io/json.h"
#include "core/io/safetensors_reader.h"
#include "core/io/safetensors_writer.h"
#include "core/io/sha256.h"

namespace quantmill {
namespace {

constexpr char kCallFile[] = "/call.json";
constexpr char kWeightFile[] = "/weight.safetensors";
constexpr char kStatisticsFile[] = "/statistics.safetensors";

absl::Status WriteTensors(const std::string& path, const std::vector<NamedTensor>& tensors,
                          Backend& backend) {
  std::vector<TensorDeclaration> declarations;
  for (const NamedTensor& t : tensors) {
    declarations.push_back({t.name, t.tensor.dtype(), t.tensor.shape()});
  }
  QM_ASSIGN_OR_RETURN(const std::unique_ptr<SafetensorsWriter> writer,
                      SafetensorsWriter::Create(path, declarations));
  for (const NamedTensor& t : tensors) {
    QM_ASSIGN_OR_RETURN(Tensor host, Tensor::Host(t.tensor.dtype(), t.tensor.shape()));
    QM_RETURN_IF_ERROR(backend.Copy(t.tensor, &host));
    QM_RETURN_IF_ERROR(writer->Write(t.name, host));
  }
  return writer->Finish();
}

// Reads fields of call.json; the first that is missing or of another type is kept as an error.
class FieldReader {
 public:
  FieldReader(const nlohmann::json& json, std::string path) : json_(json), path_(std::move(path)) {}

  std::string Text(const char* key) {
    const auto it = json_.find(key);
    if (it != json_.end() && it->is_string()) return it->get<std::string>();
    Fail(key);
    return "";
  }
  int64_t Integer(const char* key) {
    const auto it = json_.find(key);
    if (it != json_.end() && it->is_number_integer()) return it->get<int64_t>();
    Fail(key);
    return 0;
  }
  uint64_t Unsigned(const char* key) {
    const auto it = json_.find(key);
    if (it != json_.end() && it->is_number_unsigned()) return it->get<uint64_t>();
    Fail(key);
    return 0;
  }
  DType Type(const char* key) {
    const std::optional<DType> dtype = DTypeFromName(Text(key));
    if (!dtype) Fail(key);
    return dtype.value_or(DType::kF32);
  }
  ResolvedOptions Options(const char* key) {
    ResolvedOptions options;
    const auto it = json_.find(key);
    if (it == json_.end() || !it->is_object()) {
      Fail(key);
      return options;
    }
    for (const auto& [name, value] : it->items()) {
      if (!value.is_string()) Fail(key);
      if (value.is_string()) options[name] = value.get<std::string>();
    }
    return options;
  }
  const absl::Status& status() const { return status_; }

 private:
  void Fail(const char* key) {
    if (!status_.ok()) return;
    status_ = absl::DataLossError(
        ErrorText(absl::StrCat("cannot use the call in ", path_),
                  absl::StrCat("'", key, "' is missing or of another type than a run writes")));
  }
  const nlohmann::json& json_;
  std::string path_;
  absl::Status status_;
};

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
  QM_RETURN_IF_ERROR(WriteTensors(directory + kWeightFile, {{"weight", task.weight}}, backend));
  int64_t rows = 0;
  std::vector<NamedTensor> statistics = StatisticsOf(task, &rows);
  if (!statistics.empty()) {
    QM_RETURN_IF_ERROR(WriteTensors(directory + kStatisticsFile, statistics, backend));
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
  bundle.slot.role = fields.Text("role");
  bundle.slot.out_features = fields.Integer("out_features");
  bundle.slot.in_features = fields.Integer("in_features");
  bundle.slot.input_group = static_cast<int>(fields.Integer("input_group"));
  bundle.weight_dtype = fields.Type("weight_dtype");
  bundle.scale_dtype = fields.Type("scale_dtype");
  bundle.seed = fields.Unsigned("seed");
  bundle.options = fields.Options("options");
  QM_RETURN_IF_ERROR(fields.status());
  if (bundle.function == kPlanFunction) return bundle;
  if (bundle.function != kRunFunction) {
    return absl::DataLossError(absl::StrCat("cannot use the call in ", path,
                                            "; this version does not know the function '",
                                            bundle.function, "'"));
  }
  bundle.row_count = fields.Integer("row_count");
  QM_RETURN_IF_ERROR(fields.status());
  QM_RETURN_IF_ERROR(ReadTensors(directory, &bundle));
  return bundle;
}

}  // namespace quantmill
