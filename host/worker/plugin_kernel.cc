#include "host/worker/plugin_kernel.h"

#include <algorithm>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "host/worker/invoke.h"

namespace quantmill {
namespace {

constexpr char kDequantize[] = "linear-kernel.dequantize";
constexpr char kPrepack[] = "linear-kernel.prepack";
constexpr char kMatMul[] = "linear-kernel.matmul";

class PluginKernel : public PackedKernel {
 public:
  PluginKernel(const LoadedMethod& method, Backend& backend, CallWatch* watch)
      : method_(method),
        table_(method.Ext<qm_linear_kernel>(QM_EXT_LINEAR_KERNEL)),
        backend_(backend),
        watch_(watch) {}

  absl::Status Dequantize(const PackedWeight& weight, Tensor* out) override {
    WatchedCall watched(watch_, method_, kDequantize);
    PluginCall call(backend_, Settings(kDequantize, /*synchronize=*/true));
    const PackedView view(weight);
    qm_tensor target = out->View();
    return After(Invoke(call, table_->dequantize, view.get(), &target), watched);
  }

  absl::StatusOr<PackedWeight> Prepack(const PackedWeight& weight) override {
    if (!QM_HAS(table_, prepack)) return weight;
    WatchedCall watched(watch_, method_, kPrepack);
    PluginCall call(backend_, Settings(kPrepack, /*synchronize=*/true));
    const PackedView view(weight);
    qm_packed result = {};
    QM_RETURN_IF_ERROR(After(Invoke(call, table_->prepack, view.get(), &result), watched));
    return call.TakePacked(result);
  }

  absl::Status MatMul(const PackedWeight& weight, const Tensor& x, Tensor* out) override {
    if (!QM_HAS(table_, matmul)) return absl::UnimplementedError("this plugin has no matmul");
    const WatchedCall watched(watch_, method_, kMatMul);
    const PackedView view(weight);
    QM_ASSIGN_OR_RETURN(void* workspace, Workspace(*view.get(), x.dim(0)));
    PluginCall call(backend_, Settings(kMatMul, /*synchronize=*/false));
    const qm_tensor input = x.View();
    qm_tensor output = out->View();
    return Invoke(call, table_->matmul, view.get(), &input, workspace, &output);
  }

 private:
  // A device that is of no more use is this call's doing.
  absl::Status After(const absl::Status& status, WatchedCall& watched) {
    if (!status.ok() && backend_.device().is_cuda() && !backend_.Synchronize().ok()) watched.Keep();
    return status;
  }

  CallSettings Settings(const char* function, bool synchronize) const {
    CallSettings settings;
    settings.what =
        absl::StrCat("plugin ", method_.method->id, " ", method_.method->version, ", ", function);
    settings.synchronize = synchronize;
    return settings;
  }

  // Grown buffers are kept: a captured graph may still use the old address.
  absl::StatusOr<void*> Workspace(const qm_packed& packed, int64_t rows) {
    if (!QM_HAS(table_, workspace_bytes)) return nullptr;
    const int64_t bytes = static_cast<int64_t>(table_->workspace_bytes(&packed, rows));
    if (bytes == 0) return nullptr;
    if (workspaces_.empty() || workspaces_.back().bytes() < bytes) {
      const int64_t grown =
          workspaces_.empty() ? bytes : std::max(bytes, 2 * workspaces_.back().bytes());
      QM_ASSIGN_OR_RETURN(Tensor memory, backend_.Allocate(DType::kU8, Shape({grown})));
      QM_RETURN_IF_ERROR(backend_.Zero(&memory));
      workspaces_.push_back(std::move(memory));
    }
    return workspaces_.back().data();
  }

  const LoadedMethod method_;
  const qm_linear_kernel* table_;
  Backend& backend_;
  CallWatch* watch_;
  std::vector<Tensor> workspaces_;
};

}  // namespace

std::shared_ptr<PackedKernel> MakePluginKernel(const LoadedMethod& method, Backend& backend,
                                               CallWatch* watch) {
  return std::make_shared<PluginKernel>(method, backend, watch);
}

}  // namespace quantmill
