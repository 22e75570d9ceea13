#include "host/run/train/reparam_bundle.h"

#include <algorithm>
#include <filesystem>
#include <iterator>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/io/files.h"
#include "core/io/safetensors_reader.h"
#include "core/io/sha256.h"
#include "host/run/bundle_files.h"

namespace quantmill {
namespace {

constexpr char kInputsFile[] = "/inputs.safetensors";
constexpr char kParamPrefix[] = "param.";
constexpr char kBasePrefix[] = "base.";
constexpr const char* kReparamFunctions[] = {"reparametrize.plan", "reparametrize.init",
                                             "reparametrize.forward", "reparametrize.vjp",
                                             "reparametrize.finalize"};

// A plugin sees the tensors of a packed base in these two.
bool SeesBase(const std::string& function) {
  return function == "reparametrize.init" || function == "reparametrize.finalize";
}

nlohmann::json NamesOf(const std::vector<NamedTensor>& tensors) {
  nlohmann::json names = nlohmann::json::array();
  for (const NamedTensor& named : tensors) names.push_back(named.name);
  return names;
}

absl::Status DamagedReparam(const std::string& directory, absl::string_view why) {
  return absl::DataLossError(ErrorText(absl::StrCat("cannot use the call in ", directory), why));
}

// Named tensors in the order of `names`.
absl::Status ReadNamed(const SafetensorsFile& file, const std::string& prefix,
                       const std::vector<std::string>& names, std::vector<NamedTensor>* out) {
  for (const std::string& name : names) {
    QM_ASSIGN_OR_RETURN(Tensor tensor, file.Get(prefix + name));
    out->push_back({name, std::move(tensor)});
  }
  return absl::OkStatus();
}

// A tensor of its own name where it was given.
absl::Status ReadOne(const SafetensorsFile& file, const char* name, Tensor* out) {
  const auto& entries = file.entries();
  const bool there = std::any_of(entries.begin(), entries.end(),
                                 [&](const SafetensorsEntry& e) { return e.name == name; });
  if (!there) return absl::OkStatus();
  QM_ASSIGN_OR_RETURN(*out, file.Get(name));
  return absl::OkStatus();
}

// What each function cannot be called without.
absl::Status CheckInputs(const std::string& directory, const BundledReparam& call) {
  const ReparamInputs& in = call.inputs;
  const Shape weight({call.slot.out_features, call.slot.in_features});
  const bool weight_fits =
      in.weight.empty() || (in.weight.dtype() == DType::kF32 && in.weight.shape() == weight);
  const bool runs =
      call.function == "reparametrize.forward" || call.function == "reparametrize.vjp";
  const bool whole = (!runs || !in.in.empty()) &&
                     (call.function != "reparametrize.vjp" || !in.d_out.empty()) &&
                     (call.function != "reparametrize.finalize" || !in.weight.empty());
  if (weight_fits && whole) return absl::OkStatus();
  return DamagedReparam(directory, "inputs.safetensors does not hold what the function is given");
}

}  // namespace

bool IsReparamFunction(const std::string& function) {
  return std::find(std::begin(kReparamFunctions), std::end(kReparamFunctions), function) !=
         std::end(kReparamFunctions);
}

nlohmann::json DescribeReparamCall(const ReparamSubject& subject, const std::string& function,
                                   const Backend& backend) {
  const LinearSlot& slot = *subject.slot;
  const PackedWeight none;
  const PackedWeight& base = subject.base == nullptr ? none : *subject.base;
  return {{"plugin", subject.method->method->id},
          {"version", subject.method->method->version},
          {"path", subject.method->path},
          {"function", function},
          {"stage", subject.stage},
          {"slot", slot.name},
          {"role", slot.role},
          {"out_features", slot.out_features},
          {"in_features", slot.in_features},
          {"input_group", slot.input_group},
          {"weight_dtype", std::string(DTypeName(subject.weight_dtype))},
          {"scale_dtype", std::string(DTypeName(subject.scale_dtype))},
          {"activation_dtype", std::string(DTypeName(backend.activation_dtype()))},
          {"phase", subject.phase},
          {"base_format", base.format_id},
          {"base_parameters", base.format_json},
          {"device", DeviceName(backend.device())},
          {"seed", subject.seed},
          {"options", *subject.options}};
}

absl::Status WriteReparamBundle(const std::string& directory, Backend& backend, nlohmann::json call,
                                const ReparamSubject& subject, const ReparamInputs& inputs) {
  std::error_code error;
  std::filesystem::create_directories(directory, error);
  if (error) return SystemError("create", directory, error.value());
  // A process that ends in the middle leaves no bundle rather than half of one.
  std::filesystem::remove(directory + kCallFile, error);
  std::vector<NamedTensor> named;
  const auto add = [&](const char* name, const Tensor& tensor) {
    if (!tensor.empty()) named.push_back({name, tensor});
  };
  add("weight", inputs.weight);
  add("in", inputs.in);
  add("saved", inputs.saved);
  add("d_out", inputs.d_out);
  for (const NamedTensor& param : inputs.params) {
    named.push_back({absl::StrCat(kParamPrefix, param.name), param.tensor});
  }
  call["params"] = NamesOf(inputs.params);
  call["base_tensors"] = nlohmann::json::array();
  if (subject.base != nullptr && SeesBase(call["function"].get<std::string>())) {
    call["base_tensors"] = NamesOf(subject.base->tensors);
    for (const NamedTensor& one : subject.base->tensors) {
      named.push_back({absl::StrCat(kBasePrefix, one.name), one.tensor});
    }
  }
  call["out_shape"] = nlohmann::json::array();
  for (const int64_t extent : inputs.out_shape.extents()) call["out_shape"].push_back({extent});
  call["out_dtype"] = std::string(DTypeName(inputs.out_dtype));
  call["keeps_saved"] = inputs.keeps_saved ? 1 : 0;
  call["wants_d_in"] = inputs.wants_d_in ? 1 : 0;
  call["wanted"] = inputs.wanted;
  QM_RETURN_IF_ERROR(WriteBundleTensors(directory + kInputsFile, named, backend));
  QM_ASSIGN_OR_RETURN(call["plugin_sha256"], Sha256OfFile(call["path"].get<std::string>()));
  return WriteFile(directory + kCallFile, call.dump(1) + "\n");
}

absl::StatusOr<BundledReparam> ReadReparamBundle(const std::string& directory,
                                                 const nlohmann::json& json) {
  FieldReader fields(json, directory + kCallFile);
  BundledReparam call;
  call.function = fields.Text("function");
  call.slot.name = fields.Text("slot");
  call.slot.role = fields.Text("role");
  call.slot.out_features = fields.Integer("out_features");
  call.slot.in_features = fields.Integer("in_features");
  call.slot.input_group = static_cast<int>(fields.Integer("input_group"));
  call.weight_dtype = fields.Type("weight_dtype");
  call.scale_dtype = fields.Type("scale_dtype");
  call.activation_dtype = fields.Type("activation_dtype");
  call.phase = static_cast<qm_reparam_phase>(fields.Integer("phase"));
  PackedWeight base;
  base.format_id = fields.Text("base_format");
  base.format_json = fields.Text("base_parameters");
  base.out_features = call.slot.out_features;
  base.in_features = call.slot.in_features;
  QM_RETURN_IF_ERROR(fields.status());
  if (!call.plans()) {
    ReparamInputs& in = call.inputs;
    const std::vector<std::string> params = fields.Texts("params");
    const std::vector<std::string> base_tensors = fields.Texts("base_tensors");
    std::vector<int64_t> extents;
    for (const std::vector<int64_t>& row : fields.Table("out_shape", 1)) extents.push_back(row[0]);
    in.out_dtype = fields.Type("out_dtype");
    in.keeps_saved = fields.Integer("keeps_saved") != 0;
    in.wants_d_in = fields.Integer("wants_d_in") != 0;
    in.wanted = fields.Texts("wanted");
    QM_RETURN_IF_ERROR(fields.status());
    if (extents.size() > 2 ||
        std::any_of(extents.begin(), extents.end(), [](int64_t extent) { return extent < 1; })) {
      return DamagedReparam(directory, "'out_shape' is no shape of a matrix");
    }
    in.out_shape = Shape(absl::MakeConstSpan(extents));
    QM_ASSIGN_OR_RETURN(const auto file, SafetensorsFile::Open(directory + kInputsFile));
    QM_RETURN_IF_ERROR(ReadOne(*file, "weight", &in.weight));
    QM_RETURN_IF_ERROR(ReadOne(*file, "in", &in.in));
    QM_RETURN_IF_ERROR(ReadOne(*file, "saved", &in.saved));
    QM_RETURN_IF_ERROR(ReadOne(*file, "d_out", &in.d_out));
    QM_RETURN_IF_ERROR(ReadNamed(*file, kParamPrefix, params, &in.params));
    QM_RETURN_IF_ERROR(ReadNamed(*file, kBasePrefix, base_tensors, &base.tensors));
    QM_RETURN_IF_ERROR(CheckInputs(directory, call));
  }
  if (!base.format_id.empty()) call.base = std::make_shared<const PackedWeight>(std::move(base));
  return call;
}

}  // namespace quantmill
