#include "host/worker/formats.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "core/base/status.h"
#include "core/formats/reference.h"
#include "host/plugins/rule_note.h"
#include "host/worker/invoke.h"
#include "host/worker/plugin_kernel.h"

namespace quantmill {
namespace {

bool Lists(const qm_format& table, std::string_view target) {
  for (uint64_t i = 0; i < table.target_count; ++i) {
    if (target == table.targets[i]) return true;
  }
  return false;
}

CallSettings FormatCall(const LoadedMethod& method, const char* function, std::string_view layer) {
  CallSettings settings;
  settings.what = absl::StrCat("plugin ", method.method->id, " ", method.method->version,
                               ", format.", function);
  if (!layer.empty()) absl::StrAppend(&settings.what, ", ", std::string(layer));
  return settings;
}

absl::Status WantHostTensors(const std::vector<NamedTensor>& tensors) {
  for (const NamedTensor& t : tensors) {
    if (t.tensor.device().is_cpu()) continue;
    return absl::InvalidArgumentError(
        absl::StrCat("tensor '", t.name, "' of a packed weight is not on the host"));
  }
  return absl::OkStatus();
}

}  // namespace

PluginFormats::PluginFormats(std::vector<LoadedMethod> methods, Backend& host)
    : methods_(std::move(methods)), host_(host) {}

std::string PluginFormats::MethodList() const {
  if (methods_.empty()) return "no plugin is loaded";
  return absl::StrCat("asked: ", absl::StrJoin(methods_, ", ", [](std::string* out, const auto& m) {
                        absl::StrAppend(out, m.method->id);
                      }));
}

absl::StatusOr<std::shared_ptr<PackedKernel>> PluginFormats::Kernel(const PackedWeight& weight,
                                                                    Backend& backend) {
  const LoadedMethod* best = nullptr;
  int32_t best_score = 0;
  for (const LoadedMethod& method : methods_) {
    const auto* table = method.Ext<qm_linear_kernel>(QM_EXT_LINEAR_KERNEL);
    if (!QM_HAS(table, accepts) || !QM_HAS(table, dequantize)) continue;
    const WatchedCall watched(watch_, method, "linear-kernel.accepts");
    const int32_t score =
        table->accepts(weight.format_id.c_str(), weight.format_json.c_str(), backend.device().kind,
                       backend.sm(), static_cast<qm_dtype>(backend.activation_dtype()));
    if (score > best_score) {
      best = &method;
      best_score = score;
    }
  }
  if (best == nullptr && FindReferenceFormat(weight.format_id) == nullptr) {
    return absl::NotFoundError(
        ErrorText(absl::StrCat("no plugin computes with ", weight.format_id, " ",
                               weight.format_json, " on ", DeviceName(backend.device())),
                  MethodList(), "install the plugin of that format or name it with --plugin"));
  }
  auto& kernel = kernels_[{best == nullptr ? nullptr : best->method, weight.format_id, &backend}];
  if (kernel == nullptr) {
    kernel = best == nullptr ? MakeReferencePackedKernel(backend)
                             : MakePluginKernel(*best, backend, watch_);
  }
  return kernel;
}

absl::StatusOr<PluginFormats::Owner> PluginFormats::FindFormat(std::string_view format_id,
                                                               std::string_view target) const {
  bool known = false;
  for (const LoadedMethod& method : methods_) {
    const auto* table = method.Ext<qm_format>(QM_EXT_FORMAT);
    if (table == nullptr || format_id != table->format_id) continue;
    known = true;
    if (target.empty() || Lists(*table, target)) return Owner{&method, table};
  }
  if (known) {
    return absl::FailedPreconditionError(ErrorText(
        absl::StrCat(std::string(format_id), " cannot be stored as ", std::string(target)), "",
        "choose another export format; `quantmill plugins` lists what each format can become"));
  }
  return absl::NotFoundError(
      ErrorText(absl::StrCat("no plugin knows the format ", std::string(format_id)), MethodList(),
                "install the plugin of that format or name it with --plugin"));
}

absl::Status PluginFormats::Check(const PackedWeight& weight) {
  QM_RETURN_IF_ERROR(WantHostTensors(weight.tensors));
  const ReferenceFormat* reference = FindReferenceFormat(weight.format_id);
  if (reference != nullptr) QM_RETURN_IF_ERROR(reference->check(weight));
  const absl::StatusOr<Owner> owner = FindFormat(weight.format_id, "");
  if (!owner.ok()) {
    return reference != nullptr ? absl::OkStatus() : owner.status();
  }
  if (!QM_HAS(owner->table, check)) return absl::OkStatus();
  const WatchedCall watched(watch_, *owner->method, "format.check");
  PluginCall call(host_, FormatCall(*owner->method, "check", ""));
  const PackedView view(weight);
  return Invoke(call, owner->table->check, view.get());
}

absl::Status PluginFormats::CanStore(std::string_view target, std::string_view format_id,
                                     std::string_view format_json, int64_t out_features,
                                     int64_t in_features) {
  QM_ASSIGN_OR_RETURN(const Owner owner, FindFormat(format_id, target));
  if (!QM_HAS(owner.table, can_store)) return absl::OkStatus();
  const WatchedCall watched(watch_, *owner.method, "format.can_store");
  PluginCall call(host_, FormatCall(*owner.method, "can_store", ""));
  return Invoke(call, owner.table->can_store, std::string(target).c_str(),
                std::string(format_json).c_str(), out_features, in_features);
}

absl::StatusOr<FormatRegistry::Stored> PluginFormats::ToCheckpoint(std::string_view target,
                                                                   std::string_view layer,
                                                                   const PackedWeight& weight) {
  QM_RETURN_IF_ERROR(WantHostTensors(weight.tensors));
  QM_ASSIGN_OR_RETURN(const Owner owner, FindFormat(weight.format_id, target));
  if (!QM_HAS(owner.table, to_checkpoint)) {
    return absl::UnimplementedError(
        absl::StrCat("plugin ", owner.method->method->id, " cannot write ", weight.format_id));
  }
  const WatchedCall watched(watch_, *owner.method, "format.to_checkpoint");
  PluginCall call(host_, FormatCall(*owner.method, "to_checkpoint", layer));
  const PackedView view(weight);
  const qm_named_tensor* listed = nullptr;
  uint64_t count = 0;
  const char* config = nullptr;
  QM_RETURN_IF_ERROR(Invoke(call, owner.table->to_checkpoint, std::string(target).c_str(),
                            std::string(layer).c_str(), view.get(), &listed, &count, &config));
  Stored stored;
  stored.tensors = call.TakeEmitted();
  stored.config_json = config == nullptr ? "{}" : config;
  if (stored.tensors.size() != count || count == 0) {
    return BreaksRule(
        absl::InternalError(absl::StrCat(
            "plugin ", owner.method->method->id, ", format.to_checkpoint, ", std::string(layer),
            ": ", count, " tensors listed, ", stored.tensors.size(), " emitted")),
        "QM-P-009");
  }
  return stored;
}

absl::StatusOr<PackedWeight> PluginFormats::FromCheckpoint(std::string_view target,
                                                           std::string_view layer,
                                                           const Stored& stored) {
  QM_RETURN_IF_ERROR(WantHostTensors(stored.tensors));
  std::vector<qm_named_tensor> views;
  for (const NamedTensor& t : stored.tensors) {
    views.push_back({t.name.c_str(), t.tensor.View()});
    views.back().tensor.flags |= QM_TENSOR_READONLY;
  }
  absl::Status last = absl::NotFoundError(
      ErrorText(absl::StrCat("no plugin reads the checkpoint format ", std::string(target)),
                MethodList(), "install the plugin of that format or name it with --plugin"));
  // Several formats may share a target; the first that accepts these tensors is theirs.
  // UNIMPLEMENTED says that they are another's: a reason to refuse that is more than that is told.
  for (const LoadedMethod& method : methods_) {
    const auto* table = method.Ext<qm_format>(QM_EXT_FORMAT);
    if (!QM_HAS(table, from_checkpoint) || !Lists(*table, target)) continue;
    const WatchedCall watched(watch_, method, "format.from_checkpoint");
    PluginCall call(host_, FormatCall(method, "from_checkpoint", layer));
    qm_packed packed = {};
    const absl::Status status = Invoke(call, table->from_checkpoint, std::string(target).c_str(),
                                       std::string(layer).c_str(), views.data(), views.size(),
                                       stored.config_json.c_str(), &packed);
    if (status.ok()) return call.TakePacked(packed);
    const bool says_little = absl::IsNotFound(last) || absl::IsUnimplemented(last);
    if (says_little || !absl::IsUnimplemented(status)) last = status;
  }
  return last;
}

}  // namespace quantmill
