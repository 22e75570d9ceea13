#include "host/worker/call.h"

#include <charconv>
#include <cstdlib>
#include <mutex>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "host/plugins/rule_note.h"
#include "host/worker/services.h"
#include "nlohmann/json.hpp"

namespace quantmill {
namespace {

// Of RULES.md.
constexpr std::string_view kMessageRule = "QM-P-005";
constexpr std::string_view kMemoryRule = "QM-P-009";
constexpr std::string_view kFormatRule = "QM-P-010";
constexpr std::string_view kScratchBoundRule = "QM-P-015";

constexpr uint64_t kMaxTensors = 64;  // of one packed weight; no format has nearly as many

bool IsKnownDType(qm_dtype dtype) {
  return (dtype >= QM_F32 && dtype <= QM_F8_E5M2) || (dtype >= QM_I8 && dtype <= QM_I64);
}

std::string CodeName(qm_status code) {
  if (code >= 0 && code <= static_cast<int>(absl::StatusCode::kUnauthenticated)) {
    return absl::StatusCodeToString(static_cast<absl::StatusCode>(code));
  }
  return absl::StrCat("code ", code);
}

absl::StatusCode ToStatusCode(qm_status code) {
  if (code > 0 && code <= static_cast<int>(absl::StatusCode::kUnauthenticated)) {
    return static_cast<absl::StatusCode>(code);
  }
  return absl::StatusCode::kUnknown;
}

struct Emitted {
  uint64_t item = 0;
  std::string name;
  Tensor tensor;
};

// Product of extents, or nullopt for a negative extent or a product over 2^56.
std::optional<int64_t> CheckedElements(int32_t rank, const int64_t* shape) {
  int64_t product = 1;
  for (int32_t axis = 0; axis < rank; ++axis) {
    if (shape[axis] < 0 || __builtin_mul_overflow(product, shape[axis], &product)) {
      return std::nullopt;
    }
  }
  if (product > (int64_t{1} << 56)) return std::nullopt;
  return product;
}

}  // namespace

class PluginCall::Impl : public CallContext {
 public:
  Impl(Backend& b, CallSettings s) : CallContext(b), settings_(std::move(s)) {
    with_services = settings_.with_services;
    service = settings_.service;
    block = settings_.block;
    call_.struct_size = sizeof(call_);
    call_.host_data = static_cast<CallContext*>(this);
    call_.fail = &Impl::Fail;
    call_.log = &Impl::Log;
    call_.progress = &Impl::Progress;
    call_.scratch = &Impl::Scratch;
    call_.emit = &Impl::Emit;
    call_.opt_i64 = &Impl::OptI64;
    call_.opt_f64 = &Impl::OptF64;
    call_.opt_str = &Impl::OptStr;
    call_.seed = settings_.seed;
    call_.device = {b.device().kind, b.device().index};
    call_.cuda_stream = b.stream();
    call_.host_ext = &Impl::HostExt;
  }

  qm_call* get() { return &call_; }
  absl::Status Finish(qm_status code);
  absl::StatusOr<PackedWeight> TakePacked(const qm_packed& packed, uint64_t item);
  std::vector<NamedTensor> TakeEmitted(uint64_t item);
  uint64_t scratch_bytes() const { return scratch_bytes_; }

 private:
  static Impl& Self(qm_call* call) {
    return *static_cast<Impl*>(static_cast<CallContext*>(call->host_data));
  }

  static qm_status Fail(qm_call* call, qm_status code, const char* message) noexcept {
    Impl& self = Self(call);
    std::lock_guard<std::mutex> lock(self.mutex_);
    self.message_ = message == nullptr ? "" : message;
    return code;
  }
  // A refusal by the host itself. Kept apart: plugins often answer with a text of their own.
  qm_status Refuse(qm_status code, std::string text, std::string_view rule) {
    std::lock_guard<std::mutex> lock(mutex_);
    refusal_ = std::move(text);
    refusal_rule_ = rule;
    return code;
  }
  static void Log(qm_call* call, int32_t severity, const char* message) noexcept;
  static int32_t Progress(qm_call* call, double fraction) noexcept {
    const auto& progress = Self(call).settings_.progress;
    return progress && progress(fraction) ? 1 : 0;
  }
  static void* Scratch(qm_call* call, qm_device device, uint64_t bytes) noexcept {
    return Self(call).AllocateScratch(device, bytes);
  }
  static qm_status Emit(qm_call* call, uint64_t item, const char* name, qm_device device,
                        qm_dtype dtype, int32_t rank, const int64_t* shape,
                        qm_tensor* out) noexcept {
    return Self(call).EmitTensor(item, name, device, dtype, rank, shape, out);
  }
  static int64_t OptI64(qm_call* call, const char* name) noexcept;
  static double OptF64(qm_call* call, const char* name) noexcept;
  static const char* OptStr(qm_call* call, const char* name) noexcept {
    const std::string* text = Self(call).Option(name);
    return text == nullptr ? "" : text->c_str();
  }
  static const void* HostExt(qm_call* call, const char* id) noexcept {
    return id == nullptr ? nullptr : HostService(Self(call), id);
  }

  const std::string* Option(const char* name) const {
    if (settings_.options == nullptr || name == nullptr) return nullptr;
    const auto it = settings_.options->find(name);
    return it == settings_.options->end() ? nullptr : &it->second;
  }
  bool OnCallDevice(qm_device device) const {
    return device.kind == call_.device.kind && device.index == call_.device.index;
  }
  absl::StatusOr<Tensor> AllocateOn(qm_device device, DType dtype, const Shape& shape) {
    return device.kind == QM_CPU ? Tensor::Host(dtype, shape) : backend->Allocate(dtype, shape);
  }
  void* AllocateScratch(qm_device device, uint64_t bytes);
  qm_status EmitTensor(uint64_t item, const char* name, qm_device device, qm_dtype dtype,
                       int32_t rank, const int64_t* shape, qm_tensor* out);
  const Emitted* FindEmitted(uint64_t item, std::string_view name) const {
    for (const Emitted& e : emitted_) {
      if (e.item == item && e.name == name) return &e;
    }
    return nullptr;
  }
  absl::Status Wrong(absl::string_view why, std::string_view rule) const {
    return BreaksRule(absl::InternalError(absl::StrCat(settings_.what, ": ", why)), rule);
  }

  CallSettings settings_;
  qm_call call_ = {};
  std::mutex mutex_;  // guards the two texts, scratch and emitted
  std::string message_;
  std::string refusal_;
  std::string_view refusal_rule_;  // "" where the refusal is nobody's fault
  std::vector<Tensor> scratch_;
  uint64_t scratch_bytes_ = 0;
  std::vector<Emitted> emitted_;
};

// Of the calls without a listener, which come once per layer.
PluginLog& StderrLog() {
  static auto* const log = new PluginLog(PrintWarning);  // never destroyed: plugins stay loaded
  return *log;
}

void PluginCall::Impl::Log(qm_call* call, int32_t severity, const char* message) noexcept {
  if (message == nullptr) return;
  const Impl& self = Self(call);
  if (self.settings_.log) {
    self.settings_.log(severity, message);
  } else {
    StderrLog().Line(self.settings_.what, severity, message);
  }
}

int64_t PluginCall::Impl::OptI64(qm_call* call, const char* name) noexcept {
  const std::string* text = Self(call).Option(name);
  if (text == nullptr) return 0;
  if (*text == "true") return 1;
  int64_t value = 0;
  std::from_chars(text->data(), text->data() + text->size(), value);
  return value;
}

double PluginCall::Impl::OptF64(qm_call* call, const char* name) noexcept {
  const std::string* text = Self(call).Option(name);
  if (text == nullptr) return 0;
  double value = 0;
  std::from_chars(text->data(), text->data() + text->size(), value);
  return value;
}

void* PluginCall::Impl::AllocateScratch(qm_device device, uint64_t bytes) {
  if (device.kind != QM_CPU && !OnCallDevice(device)) {
    Refuse(QM_INVALID_ARGUMENT,
           absl::StrCat("scratch was asked on device kind ", device.kind,
                        "; only the CPU and the call's device are offered"),
           kMemoryRule);
    return nullptr;
  }
  std::unique_lock<std::mutex> lock(mutex_);
  const uint64_t limit = settings_.scratch_limit;
  if (limit != 0 && (bytes > limit || scratch_bytes_ > limit - bytes)) {
    refusal_ = absl::StrCat("scratch of ", bytes, " bytes refused: ", scratch_bytes_, " of the ",
                            limit, " bytes that plan() asked for are in use");
    refusal_rule_ = kScratchBoundRule;
    return nullptr;
  }
  if (bytes > (uint64_t{1} << 56)) {
    refusal_ = absl::StrCat("scratch of ", bytes, " bytes refused: no machine has that much");
    refusal_rule_ = "";
    return nullptr;
  }
  absl::StatusOr<Tensor> memory =
      AllocateOn(device, DType::kU8, Shape({static_cast<int64_t>(bytes == 0 ? 1 : bytes)}));
  if (!memory.ok()) {
    refusal_ = std::string(memory.status().message());
    refusal_rule_ = "";
    return nullptr;
  }
  scratch_.push_back(*std::move(memory));
  scratch_bytes_ += bytes;
  return scratch_.back().data();
}

qm_status PluginCall::Impl::EmitTensor(uint64_t item, const char* name, qm_device device,
                                       qm_dtype dtype, int32_t rank, const int64_t* shape,
                                       qm_tensor* out) {
  if (name == nullptr || *name == '\0' || out == nullptr) {
    return Refuse(QM_INVALID_ARGUMENT, "emit wants a tensor name and a place for the result",
                  kFormatRule);
  }
  if (rank < 0 || rank > QM_MAX_RANK || (rank > 0 && shape == nullptr)) {
    return Refuse(QM_INVALID_ARGUMENT,
                  absl::StrCat("emit of '", name, "': rank ", rank, " is not in 0..", QM_MAX_RANK),
                  kFormatRule);
  }
  if (!IsKnownDType(dtype)) {
    return Refuse(QM_INVALID_ARGUMENT, absl::StrCat("emit of '", name, "': unknown dtype ", dtype),
                  kFormatRule);
  }
  if (device.kind != QM_CPU && !OnCallDevice(device)) {
    return Refuse(QM_INVALID_ARGUMENT,
                  absl::StrCat("emit of '", name, "': only the CPU and the call's device are ",
                               "offered, not device kind ", device.kind),
                  kMemoryRule);
  }
  if (!CheckedElements(rank, shape)) {
    return Refuse(QM_INVALID_ARGUMENT,
                  absl::StrCat("emit of '", name, "': negative or absurd extent"), kFormatRule);
  }
  std::unique_lock<std::mutex> lock(mutex_);
  if (FindEmitted(item, name) != nullptr) {
    refusal_ = absl::StrCat("'", name, "' was emitted twice for item ", item);
    refusal_rule_ = kFormatRule;
    return QM_INVALID_ARGUMENT;
  }
  absl::StatusOr<Tensor> tensor =
      AllocateOn(device, static_cast<DType>(dtype), Shape(absl::Span<const int64_t>(shape, rank)));
  if (!tensor.ok()) {
    refusal_ = std::string(tensor.status().message());
    refusal_rule_ = "";
    return QM_RESOURCE_EXHAUSTED;
  }
  *out = tensor->View();
  emitted_.push_back({item, name, *std::move(tensor)});
  return QM_OK;
}

absl::Status PluginCall::Impl::Finish(qm_status code) {
  if (code == QM_OK) {
    if (!settings_.synchronize) return absl::OkStatus();
    return WithContext(backend->Synchronize(), settings_.what);
  }
  std::lock_guard<std::mutex> lock(mutex_);
  std::string text = message_;
  if (text.empty()) text = std::exchange(refusal_, "");
  std::string_view rule = refusal_rule_;
  if (text.empty()) {
    if (code != QM_CANCELLED) rule = kMessageRule;
    text = code == QM_CANCELLED ? "cancelled"
                                : absl::StrCat("returned ", CodeName(code), " without a message");
  }
  if (!refusal_.empty() && refusal_ != text) absl::StrAppend(&text, " (", refusal_, ")");
  const absl::Status status(ToStatusCode(code), absl::StrCat(settings_.what, ": ", text));
  return rule.empty() ? status : BreaksRule(status, rule);
}

absl::StatusOr<PackedWeight> PluginCall::Impl::TakePacked(const qm_packed& packed, uint64_t item) {
  if (packed.format_id == nullptr || packed.format_json == nullptr) {
    return Wrong("the result has no format id or no format parameters", kFormatRule);
  }
  if (packed.out_features <= 0 || packed.in_features <= 0) {
    return Wrong(
        absl::StrCat("the result says it is [", packed.out_features, ", ", packed.in_features, "]"),
        kFormatRule);
  }
  if (packed.tensor_count == 0 || packed.tensor_count > kMaxTensors || packed.tensors == nullptr) {
    return Wrong(absl::StrCat("the result lists ", packed.tensor_count, " tensors"), kFormatRule);
  }
  const auto json = nlohmann::json::parse(packed.format_json, nullptr, false);
  if (!json.is_object()) {
    return Wrong(absl::StrCat("format parameters are no JSON object: ", packed.format_json),
                 kFormatRule);
  }
  PackedWeight weight;
  weight.format_id = packed.format_id;
  weight.format_json = json.dump();
  weight.out_features = packed.out_features;
  weight.in_features = packed.in_features;
  for (uint64_t i = 0; i < packed.tensor_count; ++i) {
    const qm_named_tensor& listed = packed.tensors[i];
    const std::string name = listed.name == nullptr ? "" : listed.name;
    const Emitted* emitted = FindEmitted(item, name);
    if (emitted == nullptr || emitted->tensor.View().data != listed.tensor.data) {
      return Wrong(absl::StrCat("the result lists a tensor '", name, "' of item ", item,
                                " that was not emitted in this call"),
                   kMemoryRule);
    }
    if (weight.Find(name) != nullptr)
      return Wrong(absl::StrCat("'", name, "' is listed twice"), kFormatRule);
    weight.tensors.push_back({name, emitted->tensor});
  }
  for (const Emitted& emitted : emitted_) {
    if (emitted.item == item && weight.Find(emitted.name) == nullptr) {
      return Wrong(absl::StrCat("'", emitted.name, "' was emitted but the result does not list it"),
                   kFormatRule);
    }
  }
  return weight;
}

std::vector<NamedTensor> PluginCall::Impl::TakeEmitted(uint64_t item) {
  std::vector<NamedTensor> tensors;
  for (const Emitted& e : emitted_) {
    if (e.item == item) tensors.push_back({e.name, e.tensor});
  }
  return tensors;
}

PluginCall::PluginCall(Backend& backend, CallSettings settings)
    : impl_(std::make_unique<Impl>(backend, std::move(settings))) {}
PluginCall::~PluginCall() = default;

qm_call* PluginCall::get() { return impl_->get(); }
absl::Status PluginCall::Finish(qm_status code) { return impl_->Finish(code); }
absl::StatusOr<PackedWeight> PluginCall::TakePacked(const qm_packed& packed, uint64_t item) {
  return impl_->TakePacked(packed, item);
}
std::vector<NamedTensor> PluginCall::TakeEmitted(uint64_t item) { return impl_->TakeEmitted(item); }
uint64_t PluginCall::scratch_peak_bytes() const { return impl_->scratch_bytes(); }

PackedView::PackedView(const PackedWeight& weight) : packed_{} {
  tensors_.reserve(weight.tensors.size());
  for (const NamedTensor& t : weight.tensors) {
    tensors_.push_back({t.name.c_str(), t.tensor.View()});
    tensors_.back().tensor.flags |= QM_TENSOR_READONLY;
  }
  packed_.format_id = weight.format_id.c_str();
  packed_.format_json = weight.format_json.c_str();
  packed_.tensors = tensors_.data();
  packed_.tensor_count = tensors_.size();
  packed_.out_features = weight.out_features;
  packed_.in_features = weight.in_features;
}

}  // namespace quantmill
