// Packed formats and their kernels, as offered by the loaded plugins.
#ifndef QUANTMILL_HOST_WORKER_FORMATS_H_
#define QUANTMILL_HOST_WORKER_FORMATS_H_

#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "core/formats/packed.h"
#include "core/tensor/backend.h"
#include "host/plugins/registry.h"
#include "host/worker/call_watch.h"
#include "quantmill/all.h"

namespace quantmill {

// FormatRegistry over qm.format/1 and qm.linear-kernel/1. For a format whose reference dequantizer
// is in core/formats, Kernel() and Check() work without any plugin. Not thread-safe.
class PluginFormats : public FormatRegistry {
 public:
  // `host` is a CPU backend for the calls that work on host tensors (Check, ToCheckpoint, ...); it
  // must outlive this object, and every backend given to Kernel() the kernels it returned.
  PluginFormats(std::vector<LoadedMethod> methods, Backend& host);
  // Told of every call of a plugin from now on. Before the first Kernel(); must outlive this object
  // and the kernels.
  void Watch(CallWatch* watch) { watch_ = watch; }

  // The kernel with the highest accepts() score; of equal ones the first.
  absl::StatusOr<std::shared_ptr<PackedKernel>> Kernel(const PackedWeight& weight,
                                                       Backend& backend) override;
  // Tensors must be on the host.
  absl::Status Check(const PackedWeight& weight) override;
  absl::Status CanStore(std::string_view target, std::string_view format_id,
                        std::string_view format_json, int64_t out_features,
                        int64_t in_features) override;
  absl::StatusOr<Stored> ToCheckpoint(std::string_view target, std::string_view layer,
                                      const PackedWeight& weight) override;
  absl::StatusOr<PackedWeight> FromCheckpoint(std::string_view target, std::string_view layer,
                                              const Stored& stored) override;

 private:
  struct Owner {
    const LoadedMethod* method = nullptr;
    const qm_format* table = nullptr;
  };
  // The plugin that can store `format_id` as `target`; any of the format if target is empty.
  absl::StatusOr<Owner> FindFormat(std::string_view format_id, std::string_view target) const;
  std::string MethodList() const;

  std::vector<LoadedMethod> methods_;
  Backend& host_;
  CallWatch* watch_ = nullptr;
  // One kernel object per (method or null for the reference, format, backend), so that workspaces
  // are shared.
  std::map<std::tuple<const qm_method*, std::string, Backend*>, std::shared_ptr<PackedKernel>>
      kernels_;
};

}  // namespace quantmill

#endif  // QUANTMILL_HOST_WORKER_FORMATS_H_
