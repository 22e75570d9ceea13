#include "host/run/train/reparam_calls.h"

#include <cmath>
#include <functional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "host/plugins/rule_note.h"
#include "host/run/call_parts.h"
#include "host/run/slot_work.h"
#include "host/run/train/reparam_bundle.h"
#include "host/worker/invoke.h"
#include "nlohmann/json.hpp"

namespace quantmill {
namespace {

constexpr uint64_t kMostParams = 64;
constexpr char kContents[] = "QM-P-010";
constexpr char kPromise[] = "QM-P-012";

const qm_reparametrize* TableOf(const LoadedMethod& method) {
  return method.Ext<qm_reparametrize>(QM_EXT_REPARAMETRIZE);
}

absl::Status CheckParam(const qm_param& param) {
  if (param.name == nullptr || *param.name == '\0' || param.rank < 0 || param.rank > QM_MAX_RANK) {
    return absl::InternalError("a parameter has no name or no valid rank");
  }
  if (param.dtype != QM_F32) {
    return absl::InternalError(absl::StrCat("parameter '", param.name, "' is not F32"));
  }
  for (int32_t i = 0; i < param.rank; ++i) {
    if (param.shape[i] < 1 || param.shape[i] > (int64_t{1} << 40)) {
      return absl::InternalError(absl::StrCat("parameter '", param.name, "' has an empty shape"));
    }
  }
  if (std::isfinite(param.lr_scale) && param.lr_scale >= 0) return absl::OkStatus();
  return absl::InternalError(
      absl::StrCat("parameter '", param.name, "' has the learning rate ", param.lr_scale));
}

absl::StatusOr<ReparamPlan> TakePlan(const qm_reparam_plan& out) {
  ReparamPlan plan;
  if (out.kind < QM_REPARAM_WEIGHT || out.kind > QM_REPARAM_DELTA) {
    return absl::InternalError(absl::StrCat("the plan has the kind ", out.kind));
  }
  if (out.param_count > kMostParams || (out.param_count > 0 && out.params == nullptr)) {
    return absl::InternalError(absl::StrCat("the plan lists ", out.param_count, " parameters"));
  }
  for (uint64_t i = 0; i < out.stat_count && out.stats != nullptr; ++i) {
    if ((out.stats[i].flags & QM_STAT_OPTIONAL) != 0) continue;
    return absl::UnimplementedError("it wants statistics, which training does not measure");
  }
  plan.kind = out.kind;
  for (uint64_t i = 0; i < out.param_count; ++i) {
    const qm_param& param = out.params[i];
    QM_RETURN_IF_ERROR(CheckParam(param));
    plan.params.push_back({param.name,
                           Shape(absl::MakeConstSpan(param.shape, static_cast<size_t>(param.rank))),
                           param.lr_scale, (param.flags & QM_PARAM_TRAINABLE) != 0,
                           (param.flags & QM_PARAM_NO_DECAY) == 0});
  }
  plan.saved_bytes_per_row = out.saved_bytes_per_row;
  plan.saved_bytes_fixed = out.saved_bytes_fixed;
  plan.scratch_bytes = out.scratch_bytes;
  plan.weight_rate = out.weight_lr_scale;
  if (!std::isfinite(plan.weight_rate) || plan.weight_rate < 0) {
    return absl::InternalError(absl::StrCat("the weight has the learning rate ", plan.weight_rate));
  }
  plan.format_id = out.format_id == nullptr ? "" : out.format_id;
  plan.format_json = out.format_json == nullptr ? "" : out.format_json;
  plan.bits_per_weight = out.bits_per_weight;
  plan.fold = (out.flags & QM_REPARAM_FOLD) != 0 && out.kind != QM_REPARAM_WEIGHT;
  return plan;
}

std::vector<qm_named_tensor> Views(absl::Span<const NamedTensor> tensors, bool read_only) {
  std::vector<qm_named_tensor> views;
  views.reserve(tensors.size());
  for (const NamedTensor& named : tensors) {
    qm_named_tensor view = {named.name.c_str(), {}};
    if (!named.tensor.empty()) {
      view.tensor = read_only ? ReadOnlyView(named.tensor) : named.tensor.View();
    }
    views.push_back(view);
  }
  return views;
}

}  // namespace

// One open call of a function for a linear, under the last words' mark.
class ReparamCalls::Call {
 public:
  Call(ReparamCalls& owner, const ReparamSubject& subject, const char* function, bool synchronize,
       uint64_t scratch_limit = 0)
      : owner_(owner),
        subject_(subject),
        function_(absl::StrCat("reparametrize.", function)),
        mark_(owner.words_, WordsOf(subject, function_, owner.backend_)),
        what_(absl::StrCat("stage ", subject.stage, ", plugin ", subject.method->method->id, " ",
                           subject.method->method->version, ", reparametrize.", function, ", ",
                           subject.slot == nullptr ? "" : subject.slot->name)),
        call_(owner.backend_, SettingsFor(subject, synchronize, scratch_limit)) {
    if (subject.slot != nullptr) {
      linear_.emplace(*subject.slot, subject.weight_dtype, subject.scale_dtype);
      info_.linear = linear_->get();
    }
    info_.struct_size = sizeof(info_);
    info_.phase = subject.phase;
    if (subject.base != nullptr) info_.base = base_.emplace(*subject.base).get();
  }

  PluginCall& get() { return call_; }
  const qm_reparam_info* info() const { return &info_; }
  const std::string& what() const { return what_; }

  // What the call is given, asked for if it has to be written down: now, or after a failure.
  absl::Status Keep(std::function<ReparamInputs()> inputs) {
    inputs_ = std::move(inputs);
    return subject_.save_first ? Save() : absl::OkStatus();
  }
  // An OK status, or the failure after a look at whether the device survived it.
  absl::Status After(const absl::Status& status) {
    return status.ok() ? status : Kept(AfterFailure(status, owner_.backend_, mark_));
  }
  absl::Status Wrong(const absl::Status& status, std::string_view rule = kContents) {
    return status.ok() ? status : Kept(BreaksRule(WithContext(status, what_), rule));
  }

 private:
  static nlohmann::json WordsOf(const ReparamSubject& subject, const std::string& function,
                                const Backend& backend) {
    const std::string slot = subject.slot == nullptr ? "" : subject.slot->name;
    nlohmann::json words;
    // plan() sees no tensors: its words are all of its inputs.
    if (function == "reparametrize.plan") words = DescribeReparamCall(subject, function, backend);
    words["plugin"] = subject.method->method->id;
    words["version"] = subject.method->method->version;
    words["path"] = subject.method->path;
    words["function"] = function;
    words["stage"] = subject.stage;
    words["key"] = subject.key;
    words["slot"] = slot;
    words["slots"] = nlohmann::json::array({slot});
    words["shape"] = subject.slot == nullptr ? std::string()
                                             : absl::StrCat("[", subject.slot->out_features, "x",
                                                            subject.slot->in_features, "]");
    words["seed"] = subject.seed;
    if (subject.save_first) words["bundle"] = subject.bundle;
    return words;
  }

  absl::Status Save() {
    if (subject_.bundle.empty() || !inputs_) return absl::OkStatus();
    return WriteReparamBundle(subject_.bundle, owner_.backend_,
                              DescribeReparamCall(subject_, function_, owner_.backend_), subject_,
                              inputs_());
  }

  // The failure, with its inputs written down as far as there are not too many. They are a help for
  // the plugin's author; the failure matters more than its own.
  absl::Status Kept(const absl::Status& failure) {
    if (IsDeviceLost(failure) || subject_.bundle.empty() || !inputs_) return failure;
    if (owner_.failure_bundles_++ >= kMostFailureBundles || !Save().ok()) return failure;
    return absl::Status(failure.code(),
                        absl::StrCat(failure.message(), ReplayHint(subject_.bundle)));
  }

  CallSettings SettingsFor(const ReparamSubject& subject, bool synchronize,
                           uint64_t scratch_limit) {
    CallSettings settings =
        SettingsOf(what_, *subject.options, subject.seed, owner_.words_, &owner_.log_);
    settings.synchronize = synchronize || subject.save_first;  // a fault must name its call
    if (scratch_limit > 0) settings.scratch_limit = scratch_limit + kScratchSlack;
    return settings;
  }

  ReparamCalls& owner_;
  const ReparamSubject& subject_;
  const std::string function_;
  std::function<ReparamInputs()> inputs_;
  LastWordsMark mark_;
  const std::string what_;
  PluginCall call_;
  std::optional<LinearInfoView> linear_;
  std::optional<PackedView> base_;
  qm_reparam_info info_ = {};
};

ReparamCalls::ReparamCalls(Backend& backend, LastWords* words, EventSink sink)
    : backend_(backend),
      words_(words),
      sink_(std::move(sink)),
      log_([this](int32_t severity, const std::string& text) {
        sink_({{"type", "log"}, {"severity", severity}, {"text", text}});
      }) {}

absl::StatusOr<std::optional<ReparamPlan>> ReparamCalls::Plan(const ReparamSubject& subject) {
  const qm_reparametrize* table = TableOf(*subject.method);
  if (!QM_HAS(table, plan) || !QM_HAS(table, init) || !QM_HAS(table, forward) ||
      !QM_HAS(table, vjp)) {
    return absl::FailedPreconditionError(absl::StrCat("plugin ", subject.method->method->id,
                                                      " has no complete ", QM_EXT_REPARAMETRIZE));
  }
  Call call(*this, subject, "plan", true);
  qm_reparam_plan out = {};
  out.struct_size = sizeof(out);
  const absl::Status status = Invoke(call.get(), table->plan, call.info(), &out);
  if (absl::IsUnimplemented(status)) return std::nullopt;
  QM_RETURN_IF_ERROR(status);
  absl::StatusOr<ReparamPlan> plan = TakePlan(out);
  if (!plan.ok()) return call.Wrong(plan.status());
  return *std::move(plan);
}

absl::StatusOr<ReparamCalls::Start> ReparamCalls::Init(const ReparamSubject& subject,
                                                       const ReparamPlan& plan,
                                                       const Tensor& weight) {
  Start start;
  for (const ReparamPlan::Param& param : plan.params) {
    NamedTensor& made = start.params.emplace_back();
    made.name = param.name;
    QM_ASSIGN_OR_RETURN(made.tensor, backend_.Allocate(DType::kF32, param.shape));
    QM_RETURN_IF_ERROR(backend_.Zero(&made.tensor));
  }
  Call call(*this, subject, "init", true, plan.scratch_bytes);
  const qm_tensor view = weight.empty() ? qm_tensor{} : ReadOnlyView(weight);
  QM_RETURN_IF_ERROR(call.Keep([&] {
    ReparamInputs inputs;
    inputs.weight = weight;
    return inputs;
  }));
  std::vector<qm_named_tensor> params = Views(start.params, false);
  qm_stats none = {};
  none.struct_size = sizeof(none);
  QM_RETURN_IF_ERROR(
      call.After(Invoke(call.get(), TableOf(*subject.method)->init, call.info(),
                        weight.empty() ? nullptr : &view, &none, params.data(), params.size())));
  for (NamedTensor& named : call.get().TakeEmitted(0)) {
    if (named.name != "weight" || plan.kind != QM_REPARAM_WEIGHT ||
        named.tensor.dtype() != DType::kF32 || !(named.tensor.shape() == weight.shape())) {
      return call.Wrong(absl::InternalError(absl::StrCat(
          "init emitted '", named.name, "'; only a weight to train is taken, F32 of its shape")));
    }
    QM_ASSIGN_OR_RETURN(start.weight, backend_.ToDevice(named.tensor));
  }
  return start;
}

absl::Status ReparamCalls::Forward(const ReparamSubject& subject, const Tensor& in,
                                   absl::Span<const NamedTensor> params, Tensor* saved,
                                   Tensor* out) {
  Call call(*this, subject, "forward", false);
  const qm_tensor in_view = ReadOnlyView(in);
  const std::vector<qm_named_tensor> views = Views(params, true);
  qm_tensor out_view = out->View();
  const bool keeps = saved != nullptr && !saved->empty();
  QM_RETURN_IF_ERROR(call.Keep([&] {
    ReparamInputs inputs;
    inputs.in = in;
    inputs.params.assign(params.begin(), params.end());
    inputs.out_shape = out->shape();
    inputs.out_dtype = out->dtype();
    inputs.keeps_saved = keeps;
    return inputs;
  }));
  void* memory = saved == nullptr || saved->empty() ? nullptr : saved->data();
  return call.After(Invoke(call.get(), TableOf(*subject.method)->forward, call.info(), &in_view,
                           views.data(), views.size(), memory, &out_view));
}

absl::Status ReparamCalls::Vjp(const ReparamSubject& subject, const Tensor& in,
                               absl::Span<const NamedTensor> params, const Tensor& saved,
                               const Tensor& d_out, Tensor* d_in,
                               absl::Span<const NamedTensor> d_params) {
  Call call(*this, subject, "vjp", false);
  const qm_tensor in_view = ReadOnlyView(in), d_out_view = ReadOnlyView(d_out);
  const std::vector<qm_named_tensor> views = Views(params, true);
  std::vector<qm_named_tensor> d_views = Views(d_params, false);
  qm_tensor d_in_view = d_in == nullptr ? qm_tensor{} : d_in->View();
  QM_RETURN_IF_ERROR(call.Keep([&] {
    ReparamInputs inputs;
    inputs.in = in;
    inputs.saved = saved;
    inputs.d_out = d_out;
    inputs.params.assign(params.begin(), params.end());
    inputs.wants_d_in = d_in != nullptr;
    for (const NamedTensor& d_param : d_params) {
      if (!d_param.tensor.empty()) inputs.wanted.push_back(d_param.name);
    }
    return inputs;
  }));
  return call.After(Invoke(call.get(), TableOf(*subject.method)->vjp, call.info(), &in_view,
                           views.data(), views.size(), saved.empty() ? nullptr : saved.data(),
                           &d_out_view, d_in == nullptr ? nullptr : &d_in_view, d_views.data()));
}

absl::StatusOr<ReparamCalls::Folded> ReparamCalls::Finalize(const ReparamSubject& subject,
                                                            const ReparamPlan& plan,
                                                            const Tensor& weight,
                                                            absl::Span<const NamedTensor> params) {
  const qm_reparametrize* table = TableOf(*subject.method);
  if (!QM_HAS(table, finalize) || table->finalize == nullptr) {
    return absl::FailedPreconditionError(
        absl::StrCat("plugin ", subject.method->method->id, " cannot fold its parameters away"));
  }
  Call call(*this, subject, "finalize", true, plan.scratch_bytes);
  const qm_tensor view = ReadOnlyView(weight);
  const std::vector<qm_named_tensor> views = Views(params, true);
  qm_packed packed = {};
  QM_RETURN_IF_ERROR(call.Keep([&] {
    ReparamInputs inputs;
    inputs.weight = weight;
    inputs.params.assign(params.begin(), params.end());
    return inputs;
  }));
  QM_RETURN_IF_ERROR(call.After(Invoke(call.get(), table->finalize, call.info(), &view,
                                       views.data(), views.size(), &packed)));
  Folded folded;
  const auto to_host = [&](Tensor* tensor) -> absl::Status {
    QM_ASSIGN_OR_RETURN(Tensor host, Tensor::Host(tensor->dtype(), tensor->shape()));
    QM_RETURN_IF_ERROR(backend_.Copy(*tensor, &host));
    *tensor = std::move(host);
    return absl::OkStatus();
  };
  if (plan.kind == QM_REPARAM_WEIGHT && !plan.format_id.empty()) {
    QM_ASSIGN_OR_RETURN(PackedWeight taken, call.get().TakePacked(packed));
    if (taken.format_id != plan.format_id || taken.out_features != subject.slot->out_features ||
        taken.in_features != subject.slot->in_features) {
      return call.Wrong(
          absl::InternalError(absl::StrCat(
              "plan() said ", plan.format_id, " of the linear's shape, the result is ",
              taken.format_id, " [", taken.out_features, ", ", taken.in_features, "]")),
          kPromise);
    }
    for (NamedTensor& named : taken.tensors) QM_RETURN_IF_ERROR(to_host(&named.tensor));
    folded.packed = std::move(taken);
    return folded;
  }
  for (NamedTensor& named : call.get().TakeEmitted(0)) {
    if (named.name == "weight") folded.dense = std::move(named.tensor);
  }
  if (folded.dense.empty() || folded.dense.dtype() != DType::kF32 ||
      !(folded.dense.shape() == weight.shape())) {
    return call.Wrong(absl::InternalError("finalize emitted no F32 'weight' of the linear's shape"),
                      kPromise);
  }
  QM_RETURN_IF_ERROR(to_host(&folded.dense));
  return folded;
}

absl::StatusOr<std::string> ReparamCalls::ToAdapter(const LoadedMethod& method,
                                                    const ResolvedOptions& options,
                                                    const std::string& target) {
  const qm_reparametrize* table = TableOf(method);
  if (!QM_HAS(table, to_adapter) || table->to_adapter == nullptr) {
    return absl::UnimplementedError(
        ErrorText(absl::StrCat("method ", method.method->id, " cannot be written as ", target),
                  "it has no adapters of that kind", "fold it into the weights (merge: true)"));
  }
  ReparamSubject subject;
  subject.method = &method;
  subject.options = &options;
  Call call(*this, subject, "to_adapter", true);
  const char* json = nullptr;
  QM_RETURN_IF_ERROR(call.After(Invoke(call.get(), table->to_adapter, target.c_str(), &json)));
  const auto parsed = nlohmann::json::parse(json == nullptr ? "" : json, nullptr, false);
  if (!parsed.is_object()) {
    return call.Wrong(absl::InternalError("the adapter's config is no JSON object"));
  }
  return std::string(json);
}

absl::StatusOr<std::optional<ResolvedOptions>> ReparamCalls::FromAdapter(
    const LoadedMethod& method, const std::string& target, const std::string& config_json) {
  const qm_reparametrize* table = TableOf(method);
  if (!QM_HAS(table, from_adapter) || table->from_adapter == nullptr) return std::nullopt;
  const ResolvedOptions none;
  ReparamSubject subject;
  subject.method = &method;
  subject.options = &none;
  Call call(*this, subject, "from_adapter", true);
  const char* json = nullptr;
  const absl::Status status = call.After(
      Invoke(call.get(), table->from_adapter, target.c_str(), config_json.c_str(), &json));
  if (absl::IsUnimplemented(status)) return std::nullopt;
  QM_RETURN_IF_ERROR(status);
  const auto parsed = nlohmann::json::parse(json == nullptr ? "" : json, nullptr, false);
  ResolvedOptions options;
  bool texts = parsed.is_object();
  if (texts) {
    for (const auto& [name, value] : parsed.items()) {
      texts = texts && value.is_string();
      if (texts) options[name] = value.get<std::string>();
    }
  }
  if (!texts) {
    return call.Wrong(absl::InternalError("the options of the adapter are no object of texts"));
  }
  return options;
}

}  // namespace quantmill
