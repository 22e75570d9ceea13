#include "host/cli/model_session.h"

#include <algorithm>
#include <filesystem>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "core/base/nearest.h"
#include "core/base/status.h"
#include "core/checkpoint/quantization_config.h"
#include "core/io/gguf_file.h"
#include "host/pipeline/device.h"
#include "host/plugins/catalog.h"
#include "host/plugins/registry.h"
#include "host/run/backend.h"
#include "host/run/quantize_on_load.h"
#include "host/run/train/adapted_source.h"
#include "host/run/train/adapter_files.h"
#include "host/worker/method_options.h"

namespace quantmill {

absl::StatusOr<std::unique_ptr<ModelSession>> ModelSession::Open(const Arguments& args) {
  const absl::StatusOr<DeviceChoice> device = ParseDevice(args.Text("device"));
  if (!device.ok()) return UsageError(device.status());
  std::optional<DType> dtype;
  if (const std::string name = args.Has("dtype") ? args.Text("dtype") : "auto"; name != "auto") {
    if (name != "f32" && name != "bf16" && name != "f16") {
      return UsageError(absl::StrCat("--dtype: '", name, "' is no compute type"), "",
                        "use auto, f32, bf16 or f16");
    }
    dtype = name == "f32" ? DType::kF32 : name == "bf16" ? DType::kBF16 : DType::kF16;
  }
  return Open(args.Text("device"), dtype, args.List("plugin"));
}

absl::StatusOr<std::unique_ptr<ModelSession>> ModelSession::Open(
    const std::string& device, std::optional<DType> dtype, std::vector<std::string> plugin_files) {
  std::unique_ptr<ModelSession> session(new ModelSession());
  session->plugin_files_ = std::move(plugin_files);
  QM_ASSIGN_OR_RETURN(session->backend_, MakeBackend(device, dtype));
  return session;
}

absl::Status ModelSession::LoadFormats() {
  if (formats_ != nullptr) return absl::OkStatus();
  QM_ASSIGN_OR_RETURN(catalog_, DiscoverPlugins(plugin_files_));
  QM_RETURN_IF_ERROR(CheckNamedPlugins(catalog_, plugin_files_));
  QM_ASSIGN_OR_RETURN(methods_, LoadMethods(catalog_, {}));
  if (!backend_->device().is_cpu()) {
    QM_ASSIGN_OR_RETURN(host_backend_, MakeCpuBackend());
  }
  Backend& host = host_backend_ != nullptr ? *host_backend_ : *backend_;
  formats_ = std::make_unique<PluginFormats>(methods_, host);
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<CheckpointSource>> ModelSession::OpenCheckpoint(
    const std::string& directory, PackedMode mode) {
  QM_RETURN_IF_ERROR(CheckModelDirectory(directory));
  QM_ASSIGN_OR_RETURN(const auto quantization, ReadQuantizationConfig(directory));
  if (quantization != nullptr) QM_RETURN_IF_ERROR(LoadFormats());
  return OpenModel(directory, formats_.get(), mode);
}

namespace {

// A model and the adapter around it.
class AdaptedModel : public AdaptedSource {
 public:
  AdaptedModel(std::unique_ptr<WeightSource> base, std::unique_ptr<LoadedAdapter> adapter)
      : AdaptedSource(*base, adapter->Lookup()),
        base_(std::move(base)),
        adapter_(std::move(adapter)) {}

 private:
  std::unique_ptr<WeightSource> base_;
  std::unique_ptr<LoadedAdapter> adapter_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<WeightSource>> ModelSession::OpenModelArgument(const Arguments& args,
                                                                              PackedMode mode) {
  QM_ASSIGN_OR_RETURN(std::unique_ptr<WeightSource> base, OpenBase(args, mode));
  if (!args.Has("adapter")) return base;
  QM_RETURN_IF_ERROR(LoadFormats());
  training_ = std::make_unique<ReparamCalls>(*backend_, nullptr, [](const nlohmann::json&) {});
  QM_ASSIGN_OR_RETURN(auto adapter, LoadedAdapter::Open(args.Text("adapter"), catalog_, methods_,
                                                        *training_, base->config()));
  return std::make_unique<AdaptedModel>(std::move(base), std::move(adapter));
}

absl::StatusOr<std::unique_ptr<WeightSource>> ModelSession::OpenBase(const Arguments& args,
                                                                     PackedMode mode) {
  if (args.Has("load")) return OpenQuantizing(args, mode);
  if (args.Has("load-options")) {
    return UsageError("--load-options is of use with --load only", "", "add --load METHOD");
  }
  QM_ASSIGN_OR_RETURN(auto source, OpenCheckpoint(args.Text("MODEL"), mode));
  return std::unique_ptr<WeightSource>(std::move(source));
}

absl::StatusOr<std::unique_ptr<WeightSource>> ModelSession::OpenQuantizing(const Arguments& args,
                                                                           PackedMode mode) {
  const std::string id = args.Text("load");
  QM_RETURN_IF_ERROR(CheckModelDirectory(args.Text("MODEL")));
  QM_RETURN_IF_ERROR(LoadFormats());
  const MethodInfo* method = catalog_.FindMethod(id);
  std::vector<std::string> able;
  for (const std::string& other : catalog_.MethodIds()) {
    if (catalog_.FindMethod(other)->Has(QM_EXT_QUANTIZE_LINEAR)) able.push_back(other);
  }
  if (method == nullptr || std::find(able.begin(), able.end(), id) == able.end()) {
    return UsageError(absl::StrCat("--load: no method '", id, "' that quantizes linears"),
                      NearestHint(id, able), "see quantmill plugins");
  }
  const std::vector<std::string> texts =
      absl::StrSplit(args.Text("load-options"), ',', absl::SkipWhitespace());
  const auto given = ParseOptions(texts, "--load-options");
  if (!given.ok()) return UsageError(given.status());
  const absl::StatusOr<ResolvedOptions> options = OptionsFor(*method, *given);
  if (!options.ok()) return UsageError(options.status());
  for (const LoadedMethod& loaded : methods_) {
    if (id != loaded.method->id) continue;
    return QuantizeOnLoad(args.Text("MODEL"), loaded, *options, *formats_, *backend_, mode);
  }
  return absl::InternalError(absl::StrCat("method '", id, "' was not loaded"));
}

std::vector<CommandOption> LoadOptions() {
  return {{.name = "load",
           .value = "METHOD",
           .doc = "quantize an original MODEL with this method while it is loaded"},
          {.name = "load-options",
           .value = "NAME=VALUE,...",
           .doc = "options of that method (quantmill describe METHOD)"},
          {.name = "dtype",
           .value = "TYPE",
           .doc = "compute in auto, f32, bf16 or f16 (auto: f32 on the CPU, bf16 on a GPU)"},
          {.name = "adapter", .value = "DIR", .doc = "run MODEL with this adapter (PEFT's files)"}};
}

absl::StatusOr<std::unique_ptr<Tokenizer>> OpenTokenizer(const std::string& directory,
                                                         const std::string& fallback) {
  std::error_code error;
  const auto file = std::filesystem::path(directory) / "tokenizer.json";
  QM_ASSIGN_OR_RETURN(const std::string gguf, FindGguf(directory));
  const bool own = !gguf.empty() || std::filesystem::exists(file, error) || fallback.empty();
  return Tokenizer::FromDirectory(own ? directory : fallback);
}

std::string BackendName(const Backend& backend) { return DeviceName(backend.device()); }

}  // namespace quantmill
