#include "host/cli/model_session.h"

#include <filesystem>
#include <utility>

#include "core/base/status.h"
#include "core/checkpoint/quantization_config.h"
#include "core/io/gguf_file.h"
#include "host/pipeline/device.h"
#include "host/plugins/catalog.h"
#include "host/plugins/registry.h"
#include "host/run/backend.h"

namespace quantmill {

absl::StatusOr<std::unique_ptr<ModelSession>> ModelSession::Open(const Arguments& args) {
  const absl::StatusOr<DeviceChoice> device = ParseDevice(args.Text("device"));
  if (!device.ok()) return UsageError(device.status());
  return Open(args.Text("device"), std::nullopt, args.List("plugin"));
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
  QM_ASSIGN_OR_RETURN(const Catalog catalog, DiscoverPlugins(plugin_files_));
  QM_RETURN_IF_ERROR(CheckNamedPlugins(catalog, plugin_files_));
  QM_ASSIGN_OR_RETURN(std::vector<LoadedMethod> methods, LoadMethods(catalog, {}));
  if (!backend_->device().is_cpu()) {
    QM_ASSIGN_OR_RETURN(host_backend_, MakeCpuBackend());
  }
  Backend& host = host_backend_ != nullptr ? *host_backend_ : *backend_;
  formats_ = std::make_unique<PluginFormats>(std::move(methods), host);
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<CheckpointSource>> ModelSession::OpenCheckpoint(
    const std::string& directory, PackedMode mode) {
  QM_RETURN_IF_ERROR(CheckModelDirectory(directory));
  QM_ASSIGN_OR_RETURN(const auto quantization, ReadQuantizationConfig(directory));
  if (quantization != nullptr) QM_RETURN_IF_ERROR(LoadFormats());
  return OpenModel(directory, formats_.get(), mode);
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
