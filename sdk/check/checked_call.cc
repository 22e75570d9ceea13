#include "sdk/check/checked_call.h"

#include <string.h>

#include <algorithm>
#include <atomic>
#include <charconv>
#include <chrono>
#include <mutex>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "host/worker/services.h"
#include "nlohmann/json.hpp"
#include "sdk/check/cuda_probe.h"
#include "sdk/check/fence.h"

namespace quantmill::check {
namespace {

using Clock = std::chrono::steady_clock;

constexpr uint64_t kAlignment = 256;      // of buffers, as the ABI promises
constexpr uint64_t kStructAlignment = 8;  // so that structs end where a page ends
constexpr uint64_t kNewerBytes = 64;      // what a later minor adds to every growable struct
constexpr uint8_t kPoison = 0xFF;
constexpr uint8_t kTailCanary = 0xA5;
constexpr uint64_t kMostTensors = 64;

std::string CodeName(qm_status code) {
  if (code == kThrewException) return "an exception";
  if (code >= 0 && code <= static_cast<int>(absl::StatusCode::kUnauthenticated)) {
    return absl::StatusCodeToString(static_cast<absl::StatusCode>(code));
  }
  return absl::StrCat("code ", code);
}

bool IsKnownCode(qm_status code) {
  return code >= 0 && code <= static_cast<int>(absl::StatusCode::kUnauthenticated);
}

bool IsKnownDType(qm_dtype dtype) {
  return (dtype >= QM_F32 && dtype <= QM_F8_E5M2) || (dtype >= QM_I8 && dtype <= QM_I64);
}

// A block on a GPU, with a pattern behind it.
struct DeviceBlock {
  std::string name;
  Tensor memory;  // U8 [bytes + kAlignment]
  int64_t bytes = 0;
  std::vector<uint8_t> content;  // of an input, to compare; else empty
};

struct EmittedTensor {
  uint64_t item = 0;
  std::string name;
  qm_tensor tensor = {};
};

// A value of the option's type, for one without a default.
std::string AnyValue(const qm_option& option) {
  if (option.type == QM_OPT_BOOL) return "false";
  if (option.type == QM_OPT_STR) return "x";
  const std::string choices = option.choices == nullptr ? "" : option.choices;
  const std::string first = choices.substr(0, std::min(choices.find('|'), choices.find("..")));
  return first.empty() ? "1" : first;
}

}  // namespace

OptionValues DefaultOptions(const qm_method& method) {
  OptionValues values;
  for (uint64_t i = 0; i < method.option_count; ++i) {
    const qm_option& option = method.options[i];
    values[option.name] = option.default_value != nullptr ? option.default_value : AnyValue(option);
  }
  return values;
}

CallSetup DefaultSetup(const Subject& subject) {
  CallSetup setup;
  setup.options = DefaultOptions(*subject.method);
  setup.seed = subject.seed;
  return setup;
}

class CheckedCall::Impl : public CallContext {
 public:
  Impl(Subject& subject, CallSetup setup)
      : CallContext(*subject.backend), subject_(subject), setup_(std::move(setup)) {
    with_services = setup_.services;
    qm_call call = {};
    call.struct_size = sizeof call;
    call.host_data = static_cast<CallContext*>(this);
    call.fail = &Impl::Fail;
    call.log = [](qm_call*, int32_t, const char*) noexcept {};
    call.progress = &Impl::Progress;
    call.scratch = &Impl::Scratch;
    call.emit = &Impl::Emit;
    call.opt_i64 = &Impl::OptI64;
    call.opt_f64 = &Impl::OptF64;
    call.opt_str = &Impl::OptStr;
    call.seed = setup_.seed;
    call.device = {subject.backend->device().kind, subject.backend->device().index};
    call.cuda_stream = subject.backend->stream();
    call.host_ext = &Impl::HostExt;
    call_ = static_cast<qm_call*>(NewStruct("the qm_call", &call, sizeof call, true));
    context_before_ = CurrentCudaContext();
  }
  ~Impl() {
    for (Fence* fence : fences_) fence->Close();
  }

  static Impl& Self(qm_call* call) {
    return *static_cast<Impl*>(static_cast<CallContext*>(call->host_data));
  }

  // ---- memory ----
  Fence* NewFence(const std::string& name, FenceUse use, uint64_t bytes, uint64_t alignment,
                  uint8_t fill) {
    Fence* fence = Fence::New(name, use, bytes, alignment, fill);
    if (fence == nullptr) return nullptr;
    const std::lock_guard<std::mutex> lock(mutex_);
    fences_.push_back(fence);
    return fence;
  }
  void* NewStruct(const std::string& name, const void* data, uint64_t bytes, bool growable) {
    const uint64_t size = growable && setup_.newer_host ? bytes + kNewerBytes : bytes;
    Fence* fence = NewFence(name, FenceUse::kHostStruct, size, kStructAlignment, kPoison);
    if (fence == nullptr) return nullptr;
    if (bytes > 0) memcpy(fence->data(), data, bytes);
    if (growable) memcpy(fence->data(), &size, sizeof size);
    return fence->data();
  }
  // Memory on `on`; `content` may be null. Null when there is none.
  void* NewMemory(const std::string& name, FenceUse use, qm_device on, uint64_t bytes,
                  const void* content) {
    if (on.kind == QM_CUDA) return NewDeviceMemory(name, use, bytes, content);
    Fence* fence = NewFence(name, use, bytes, kAlignment, setup_.fill);
    if (fence == nullptr) return nullptr;
    if (content != nullptr && bytes > 0) memcpy(fence->data(), content, bytes);
    if (use == FenceUse::kInput) fence->Seal();
    return fence->data();
  }
  void* NewDeviceMemory(const std::string& name, FenceUse use, uint64_t bytes, const void* content);

  qm_device call_device() const { return call_->device; }
  absl::StatusOr<Tensor> ToHost(const qm_tensor& tensor);

  std::optional<Verdict> Finish(qm_status code);
  absl::StatusOr<PackedWeight> TakePacked(const qm_packed& packed, uint64_t item);

  Subject& subject_;
  CallSetup setup_;
  qm_call* call_ = nullptr;
  std::mutex mutex_;  // guards the lists and texts below
  std::vector<Fence*> fences_;
  std::vector<DeviceBlock> device_blocks_;
  std::vector<EmittedTensor> emitted_;
  std::map<std::string, const void*> strings_, services_;
  std::string error_;
  std::string broken_;  // what it asked of the host that no host grants
  qm_status code_ = QM_OK;
  int64_t scratch_calls_ = 0, emit_calls_ = 0;
  uint64_t scratch_bytes_ = 0;
  std::atomic<int64_t> progress_calls_{0};
  std::atomic<int64_t> cancelled_at_{0};  // nanoseconds of the clock; 0 = not asked to stop
  double seconds_since_cancel_ = 0;
  const void* context_before_ = nullptr;

 private:
  static qm_status Fail(qm_call* call, qm_status code, const char* message) noexcept {
    Impl& self = Self(call);
    const std::lock_guard<std::mutex> lock(self.mutex_);
    self.error_ = message == nullptr ? "" : message;
    return code;
  }
  static int32_t Progress(qm_call* call, double) noexcept {
    Impl& self = Self(call);
    const int64_t nth = self.progress_calls_++;
    if (self.setup_.cancel_at < 0 || nth < self.setup_.cancel_at) return 0;
    int64_t never = 0;
    self.cancelled_at_.compare_exchange_strong(never, Clock::now().time_since_epoch().count());
    return 1;
  }
  static void* Scratch(qm_call* call, qm_device device, uint64_t bytes) noexcept;
  static qm_status Emit(qm_call* call, uint64_t item, const char* name, qm_device device,
                        qm_dtype dtype, int32_t rank, const int64_t* shape,
                        qm_tensor* out) noexcept {
    return Self(call).EmitTensor(item, name, device, dtype, rank, shape, out);
  }
  qm_status EmitTensor(uint64_t item, const char* name, qm_device device, qm_dtype dtype,
                       int32_t rank, const int64_t* shape, qm_tensor* out);
  qm_status Refuse(qm_status code, const std::string& text, bool broken) {
    const std::lock_guard<std::mutex> lock(mutex_);
    error_ = text;
    if (broken) broken_ = text;
    return code;
  }
  bool OnCallDevice(qm_device device) const {
    return device.kind == call_->device.kind && device.index == call_->device.index;
  }
  const std::string* Option(const char* name) const {
    if (name == nullptr) return nullptr;
    const auto found = setup_.options.find(name);
    return found == setup_.options.end() ? nullptr : &found->second;
  }
  static int64_t OptI64(qm_call* call, const char* name) noexcept {
    const std::string* text = Self(call).Option(name);
    int64_t value = 0;
    if (text != nullptr && *text == "true") return 1;
    if (text != nullptr) std::from_chars(text->data(), text->data() + text->size(), value);
    return value;
  }
  static double OptF64(qm_call* call, const char* name) noexcept {
    const std::string* text = Self(call).Option(name);
    double value = 0;
    if (text != nullptr) std::from_chars(text->data(), text->data() + text->size(), value);
    return value;
  }
  static const char* OptStr(qm_call* call, const char* name) noexcept;
  static const void* HostExt(qm_call* call, const char* id) noexcept;

  std::optional<Verdict> CheckMemory();
  std::optional<Verdict> CheckDeviceMemory();
  const EmittedTensor* FindEmitted(uint64_t item, std::string_view name) const {
    for (const EmittedTensor& e : emitted_) {
      if (e.item == item && e.name == name) return &e;
    }
    return nullptr;
  }
};

void* CheckedCall::Impl::NewDeviceMemory(const std::string& name, FenceUse use, uint64_t bytes,
                                         const void* content) {
  if (bytes > (uint64_t{1} << 46)) return nullptr;
  const int64_t all = static_cast<int64_t>(bytes + kAlignment);
  absl::StatusOr<Tensor> memory = subject_.backend->Allocate(DType::kU8, Shape({all}));
  absl::StatusOr<Tensor> staged = Tensor::Host(DType::kU8, Shape({all}));
  if (!memory.ok() || !staged.ok()) return nullptr;
  memset(staged->data(), setup_.fill, bytes);
  if (content != nullptr && bytes > 0) memcpy(staged->data(), content, bytes);
  memset(staged->as<uint8_t>() + bytes, kTailCanary, kAlignment);
  if (!subject_.backend->Copy(*staged, &*memory).ok() || !subject_.backend->Synchronize().ok()) {
    return nullptr;
  }
  DeviceBlock block = {name, *memory, static_cast<int64_t>(bytes), {}};
  if (use == FenceUse::kInput) {
    block.content.assign(staged->as<uint8_t>(), staged->as<uint8_t>() + bytes);
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  device_blocks_.push_back(std::move(block));
  return memory->data();
}

void* CheckedCall::Impl::Scratch(qm_call* call, qm_device device, uint64_t bytes) noexcept {
  Impl& self = Self(call);
  int64_t nth = 0;
  {
    const std::lock_guard<std::mutex> lock(self.mutex_);
    nth = self.scratch_calls_++;
    if (nth == self.setup_.fail_scratch_at) return nullptr;
    const uint64_t limit = self.setup_.scratch_limit;
    self.scratch_bytes_ += bytes;
    if (limit != 0 && self.scratch_bytes_ > limit) return nullptr;
  }
  if (device.kind != QM_CPU && !self.OnCallDevice(device)) {
    self.Refuse(QM_INVALID_ARGUMENT,
                absl::StrCat("scratch was asked on device kind ", device.kind, " index ",
                             device.index, ", neither the CPU nor the call's device"),
                true);
    return nullptr;
  }
  return self.NewMemory(absl::StrCat("scratch ", nth), FenceUse::kScratch, device, bytes, nullptr);
}

qm_status CheckedCall::Impl::EmitTensor(uint64_t item, const char* name, qm_device device,
                                        qm_dtype dtype, int32_t rank, const int64_t* shape,
                                        qm_tensor* out) {
  if (emit_calls_++ == setup_.fail_emit_at) {
    return Refuse(QM_RESOURCE_EXHAUSTED, "no memory for the result", false);
  }
  if (name == nullptr || *name == '\0' || out == nullptr) {
    return Refuse(QM_INVALID_ARGUMENT, "emit was given no name or no place for the result", true);
  }
  const std::string what = absl::StrCat("emit of '", name, "': ");
  if (rank < 0 || rank > QM_MAX_RANK || (rank > 0 && shape == nullptr) || !IsKnownDType(dtype)) {
    return Refuse(QM_INVALID_ARGUMENT, absl::StrCat(what, "rank ", rank, ", dtype ", dtype), true);
  }
  if (device.kind != QM_CPU && !OnCallDevice(device)) {
    return Refuse(QM_INVALID_ARGUMENT,
                  absl::StrCat(what, "neither on the CPU nor on the call's device"), true);
  }
  int64_t elements = 1;
  for (int32_t axis = 0; axis < rank; ++axis) {
    if (shape[axis] < 0 || __builtin_mul_overflow(elements, shape[axis], &elements)) {
      return Refuse(QM_INVALID_ARGUMENT, absl::StrCat(what, "extent ", shape[axis]), true);
    }
  }
  if (FindEmitted(item, name) != nullptr) {
    return Refuse(QM_INVALID_ARGUMENT, absl::StrCat(what, "twice for item ", item), true);
  }
  const Shape extents(absl::Span<const int64_t>(shape, static_cast<size_t>(rank)));
  const uint64_t bytes = static_cast<uint64_t>(elements) *
                         static_cast<uint64_t>(ElementSize(static_cast<DType>(dtype)));
  void* data = NewMemory(absl::StrCat("the emitted tensor '", name, "'"), FenceUse::kResult, device,
                         bytes, nullptr);
  if (data == nullptr) return Refuse(QM_RESOURCE_EXHAUSTED, "no memory for the result", false);
  *out =
      Tensor(nullptr, data, static_cast<DType>(dtype), extents, {device.kind, device.index}).View();
  emitted_.push_back({item, name, *out});
  return QM_OK;
}

// Texts and tables die with the call, so each call makes its own.
const char* CheckedCall::Impl::OptStr(qm_call* call, const char* name) noexcept {
  Impl& self = Self(call);
  const std::string* found = self.Option(name);
  const std::string text = found == nullptr ? "" : *found;
  const void*& copy = self.strings_[name == nullptr ? "" : name];
  if (copy == nullptr) {
    copy = self.NewStruct(absl::StrCat("the text of option ", name == nullptr ? "" : name),
                          text.c_str(), text.size() + 1, false);
  }
  return static_cast<const char*>(copy);
}

const void* CheckedCall::Impl::HostExt(qm_call* call, const char* id) noexcept {
  Impl& self = Self(call);
  const void* table = id == nullptr ? nullptr : HostService(self, id);
  if (table == nullptr) return nullptr;
  const void*& copy = self.services_[id];
  if (copy == nullptr) {
    copy = self.NewStruct(absl::StrCat("the host's table ", id), table,
                          *static_cast<const uint64_t*>(table), true);
  }
  return copy;
}

absl::StatusOr<Tensor> CheckedCall::Impl::ToHost(const qm_tensor& tensor) {
  const Shape shape(absl::Span<const int64_t>(tensor.shape, static_cast<size_t>(tensor.rank)));
  const DType dtype = static_cast<DType>(tensor.dtype);
  QM_ASSIGN_OR_RETURN(Tensor copy, Tensor::Host(dtype, shape));
  if (copy.bytes() == 0) return copy;
  const Tensor source(nullptr, tensor.data, dtype, shape,
                      {tensor.device.kind, tensor.device.index});
  if (tensor.device.kind == QM_CUDA) {
    QM_RETURN_IF_ERROR(subject_.backend->Copy(source, &copy));
  } else {
    memcpy(copy.data(), source.data(), static_cast<size_t>(copy.bytes()));
  }
  return copy;
}

std::optional<Verdict> CheckedCall::Impl::CheckDeviceMemory() {
  for (const DeviceBlock& block : device_blocks_) {
    absl::StatusOr<Tensor> copy = Tensor::Host(DType::kU8, block.memory.shape());
    if (!copy.ok() || !subject_.backend->Copy(block.memory, &*copy).ok()) {
      return Failed("QM-P-006", absl::StrCat(block.name, " cannot be read back from the GPU"));
    }
    const uint8_t* bytes = copy->as<uint8_t>();
    const auto is_canary = [](uint8_t b) { return b == kTailCanary; };
    if (!std::all_of(bytes + block.bytes, bytes + copy->bytes(), is_canary)) {
      return Failed("QM-P-014", absl::StrCat("bytes behind the end of ", block.name, " (",
                                             block.bytes, " bytes) were overwritten"));
    }
    if (!block.content.empty() && memcmp(bytes, block.content.data(), block.content.size()) != 0) {
      return Failed("QM-P-004", absl::StrCat("it changed its input, ", block.name));
    }
  }
  return std::nullopt;
}

std::optional<Verdict> CheckedCall::Impl::CheckMemory() {
  for (const Fence* fence : fences_) {
    const std::string text = fence->Overrun();
    if (!text.empty()) return Failed("QM-P-014", text);
  }
  return CheckDeviceMemory();
}

std::optional<Verdict> CheckedCall::Impl::Finish(qm_status code) {
  code_ = code;
  if (const int64_t since = cancelled_at_.load(); since != 0) {
    const Clock::duration passed(Clock::now().time_since_epoch().count() - since);
    seconds_since_cancel_ = std::chrono::duration<double>(passed).count();
  }
  if (CurrentCudaContext() != context_before_) {
    return Failed(
        "QM-P-006",
        "another CUDA device or context is current after the call than before it; put back "
        "what cudaSetDevice changed");
  }
  if (const absl::Status status = backend->Synchronize(); !status.ok()) {
    return Failed("QM-P-006", absl::StrCat("its work on the stream ended in an error: ",
                                           std::string(status.message())));
  }
  if (code == kThrewException) return Failed("QM-P-007", "an exception left the plugin");
  if (auto bad = CheckMemory()) return bad;
  if (!broken_.empty()) return Failed("QM-P-009", broken_);
  if (!IsKnownCode(code)) {
    return Failed("QM-P-005", absl::StrCat("it returned ", code, ", which is no qm_status"));
  }
  if (code != QM_OK && code != QM_CANCELLED && error_.empty()) {
    return Failed("QM-P-005", absl::StrCat("it returned ", CodeName(code),
                                           " without a message; end such calls with `return "
                                           "call->fail(call, code, \"what; why; what to do\")`"));
  }
  return std::nullopt;
}

absl::StatusOr<PackedWeight> CheckedCall::Impl::TakePacked(const qm_packed& packed, uint64_t item) {
  const auto bad = [](const std::string& text) { return absl::InvalidArgumentError(text); };
  if (packed.format_id == nullptr || packed.format_json == nullptr) {
    return bad("the result has no format id or no format parameters");
  }
  if (packed.tensor_count == 0 || packed.tensor_count > kMostTensors || packed.tensors == nullptr) {
    return bad(absl::StrCat("the result lists ", packed.tensor_count, " tensors"));
  }
  const auto json = nlohmann::json::parse(packed.format_json, nullptr, false);
  if (!json.is_object()) {
    return bad(absl::StrCat("format parameters are no JSON object: ", packed.format_json));
  }
  PackedWeight weight = {
      packed.format_id, packed.format_json, {}, packed.out_features, packed.in_features};
  for (uint64_t i = 0; i < packed.tensor_count; ++i) {
    const std::string name = packed.tensors[i].name == nullptr ? "" : packed.tensors[i].name;
    const EmittedTensor* emitted = FindEmitted(item, name);
    if (emitted == nullptr || emitted->tensor.data != packed.tensors[i].tensor.data) {
      return bad(absl::StrCat("the result lists a tensor '", name, "' of item ", item,
                              " that was not emitted in this call"));
    }
    if (weight.Find(name) != nullptr) return bad(absl::StrCat("'", name, "' is listed twice"));
    QM_ASSIGN_OR_RETURN(Tensor copy, ToHost(emitted->tensor));
    weight.tensors.push_back({name, std::move(copy)});
  }
  for (const EmittedTensor& e : emitted_) {
    if (e.item == item && weight.Find(e.name) == nullptr) {
      return bad(absl::StrCat("'", e.name, "' was emitted but the result does not list it"));
    }
  }
  return weight;
}

// ---- the public face ---------------------------------------------------------------------------

CheckedCall::CheckedCall(Subject& subject, CallSetup setup)
    : impl_(std::make_unique<Impl>(subject, std::move(setup))) {}
CheckedCall::~CheckedCall() = default;

qm_call* CheckedCall::get() { return impl_->call_; }

qm_tensor CheckedCall::InputBytes(const std::string& name, DType dtype, const Shape& shape,
                                  const void* data) {
  const uint64_t bytes = static_cast<uint64_t>(shape.elements() * ElementSize(dtype));
  const qm_device device = impl_->call_device();
  void* memory = impl_->NewMemory(name, FenceUse::kInput, device, bytes, data);
  return Tensor(nullptr, memory, dtype, shape, {device.kind, device.index}, true).View();
}

qm_tensor CheckedCall::Input(const std::string& name, const Tensor& host) {
  return InputBytes(name, host.dtype(), host.shape(), host.data());
}

qm_tensor CheckedCall::StridedInput(const std::string& name, int64_t rows, int64_t cols,
                                    int64_t row_stride, absl::Span<const float> values) {
  // The last row has nothing behind it.
  const int64_t elements = rows == 0 ? 0 : (rows - 1) * row_stride + cols;
  std::vector<float> spread(static_cast<size_t>(elements), __builtin_nanf(""));
  for (int64_t r = 0; r < rows; ++r) {
    std::copy_n(values.begin() + r * cols, cols, spread.begin() + r * row_stride);
  }
  qm_tensor tensor = InputBytes(name, DType::kF32, Shape({elements}), spread.data());
  tensor.rank = 2;
  tensor.shape[0] = rows;
  tensor.shape[1] = cols;
  tensor.stride[0] = row_stride;
  tensor.stride[1] = 1;
  return tensor;
}

qm_tensor CheckedCall::Output(const std::string& name, DType dtype, const Shape& shape) {
  const uint64_t bytes = static_cast<uint64_t>(shape.elements() * ElementSize(dtype));
  const qm_device device = impl_->call_device();
  void* memory = impl_->NewMemory(name, FenceUse::kOutput, device, bytes, nullptr);
  return Tensor(nullptr, memory, dtype, shape, {device.kind, device.index}).View();
}

void* CheckedCall::Memory(const std::string& name, uint64_t bytes) {
  if (bytes == 0) return nullptr;
  return impl_->NewMemory(name, FenceUse::kOutput, impl_->call_device(), bytes, nullptr);
}

void* CheckedCall::StructBytes(const std::string& name, const void* data, uint64_t bytes,
                               bool growable) {
  return impl_->NewStruct(name, data, bytes, growable);
}

const qm_packed* CheckedCall::InputPacked(const PackedWeight& weight) {
  std::vector<qm_named_tensor> tensors;
  const auto text = [&](const std::string& s) {
    return static_cast<const char*>(
        StructBytes(absl::StrCat("the text '", s, "'"), s.c_str(), s.size() + 1, false));
  };
  for (const NamedTensor& t : weight.tensors) {
    tensors.push_back(
        {text(t.name), Input(absl::StrCat("the packed tensor '", t.name, "'"), t.tensor)});
  }
  const qm_packed packed = {
      text(weight.format_id),
      text(weight.format_json),
      Array<qm_named_tensor>("the list of packed tensors", absl::MakeConstSpan(tensors)),
      tensors.size(),
      weight.out_features,
      weight.in_features};
  return Array<qm_packed>("the qm_packed", absl::MakeConstSpan(&packed, 1));
}

std::optional<Verdict> CheckedCall::Finish(qm_status code) { return impl_->Finish(code); }
qm_status CheckedCall::code() const { return impl_->code_; }
const std::string& CheckedCall::error() const { return impl_->error_; }
std::string CheckedCall::Outcome() const {
  if (impl_->code_ == QM_OK) return "OK";
  return absl::StrCat(CodeName(impl_->code_), " (", impl_->error_, ")");
}

int64_t CheckedCall::scratch_calls() const { return impl_->scratch_calls_; }
int64_t CheckedCall::emit_calls() const { return impl_->emit_calls_; }
int64_t CheckedCall::progress_calls() const { return impl_->progress_calls_; }
uint64_t CheckedCall::scratch_bytes() const { return impl_->scratch_bytes_; }
double CheckedCall::seconds_since_cancel() const { return impl_->seconds_since_cancel_; }

absl::StatusOr<std::vector<NamedTensor>> CheckedCall::Emitted(uint64_t item) {
  std::vector<NamedTensor> tensors;
  for (const EmittedTensor& e : impl_->emitted_) {
    if (e.item != item) continue;
    QM_ASSIGN_OR_RETURN(Tensor copy, impl_->ToHost(e.tensor));
    tensors.push_back({e.name, std::move(copy)});
  }
  return tensors;
}

absl::StatusOr<PackedWeight> CheckedCall::TakePacked(const qm_packed& packed, uint64_t item) {
  return impl_->TakePacked(packed, item);
}

absl::StatusOr<Tensor> CheckedCall::Read(const qm_tensor& tensor) { return impl_->ToHost(tensor); }

}  // namespace quantmill::check
