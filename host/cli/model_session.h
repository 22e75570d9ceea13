// What commands that run a model share: the device, the formats of the installed plugins, and
// checkpoints opened with them.
#ifndef QUANTMILL_HOST_CLI_MODEL_SESSION_H_
#define QUANTMILL_HOST_CLI_MODEL_SESSION_H_

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "core/checkpoint/open_model.h"
#include "core/tensor/backend.h"
#include "core/text/tokenizer.h"
#include "host/cli/command.h"
#include "host/cli/progress.h"
#include "host/plugins/catalog.h"
#include "host/plugins/registry.h"
#include "host/run/train/reparam_calls.h"
#include "host/worker/formats.h"

namespace quantmill {

class ModelSession {
 public:
  // Reads --device, --dtype and --plugin. What is none is a usage error.
  static absl::StatusOr<std::unique_ptr<ModelSession>> Open(const Arguments& args);
  // dtype: compute type, as MakeBackend.
  static absl::StatusOr<std::unique_ptr<ModelSession>> Open(const std::string& device,
                                                            std::optional<DType> dtype,
                                                            std::vector<std::string> plugin_files);

  Backend& backend() { return *backend_; }
  // Opens a model's directory. Plugins are looked for, and loaded, only when it is quantized.
  absl::StatusOr<std::unique_ptr<CheckpointSource>> OpenCheckpoint(const std::string& directory,
                                                                   PackedMode mode);
  // Opens the argument MODEL; with --load, its linears are quantized while they are loaded; with
  // --adapter, an adapter is put around them.
  absl::StatusOr<std::unique_ptr<WeightSource>> OpenModelArgument(const Arguments& args,
                                                                  PackedMode mode);

 private:
  ModelSession() = default;
  absl::Status LoadFormats();
  absl::StatusOr<std::unique_ptr<WeightSource>> OpenBase(const Arguments& args, PackedMode mode);
  absl::StatusOr<std::unique_ptr<WeightSource>> OpenQuantizing(const Arguments& args,
                                                               PackedMode mode);

  std::vector<std::string> plugin_files_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Backend> host_backend_;  // for calls of format plugins; only with a GPU
  Catalog catalog_;                        // with formats_
  std::vector<LoadedMethod> methods_;      // likewise
  std::unique_ptr<PluginFormats> formats_;
  std::unique_ptr<ReparamCalls> training_;  // calls of adapters
};

// --load METHOD, --load-options NAME=VALUE,..., --dtype TYPE and --adapter DIR
std::vector<CommandOption> LoadOptions();

// The tokenizer of `directory`, or, when it has none, of `fallback` (may be empty).
absl::StatusOr<std::unique_ptr<Tokenizer>> OpenTokenizer(const std::string& directory,
                                                         const std::string& fallback);

// "cpu" or "cuda:0", for the result's text.
std::string BackendName(const Backend& backend);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_CLI_MODEL_SESSION_H_
