// A qm_call without a host, for unit tests of plugins: options, scratch with a limit, emitted
// results, threads, simple linear algebra, and failures on demand. Standard library only; with
// QM_HAVE_CUDA also on a GPU.
#ifndef QUANTMILL_TESTING_FAKE_CALL_HPP_
#define QUANTMILL_TESTING_FAKE_CALL_HPP_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "quantmill/plugin.h"
#include "quantmill/sdk/tensor.hpp"
#include "quantmill/testing/fake_services.hpp"

namespace qm::testing {

// Whether a FakeCall on {QM_CUDA, 0} can be made here.
inline bool HaveGpu() {
#if defined(QM_HAVE_CUDA)
  int devices = 0;
  return cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0;
#else
  return false;
#endif
}

// One open call on plain memory; see the top of the file.
class FakeCall {
 public:
  // For FailScratchAt and its like: at no call.
  static constexpr int64_t kNever = -1;

  // On CUDA (device.kind QM_CUDA) a stream is created; throws std::runtime_error without a GPU.
  explicit FakeCall(qm_device device = {QM_CPU, 0}) {
    call_.struct_size = sizeof call_;
    call_.host_data = this;
    call_.device = device;
    call_.seed = 1;
    call_.fail = &Fail;
    call_.log = &Log;
    call_.progress = &Progress;
    call_.scratch = &Scratch;
    call_.emit = &Emit;
    call_.opt_i64 = &OptI64;
    call_.opt_f64 = &OptF64;
    call_.opt_str = &OptStr;
    call_.host_ext = &HostExt;
    if (device.kind == QM_CUDA) call_.cuda_stream = CreateStream();
  }
  ~FakeCall() {
    for (const Block& block : blocks_) Free(block);
    if (call_.cuda_stream != nullptr) DestroyStream(call_.cuda_stream);
  }
  FakeCall(const FakeCall&) = delete;
  FakeCall& operator=(const FakeCall&) = delete;

  // What the plugin gets.
  qm_call* get() { return &call_; }

  // ---- what the plugin is given ----
  // All defaults of a method's option table.
  FakeCall& Defaults(const qm_method& method) {
    for (uint64_t i = 0; i < method.option_count; ++i) {
      const qm_option& option = method.options[i];
      if (option.default_value != nullptr) Set(option.name, option.default_value);
    }
    return *this;
  }
  // Text form, as in an option table: "4", "0.01", "true", "mse".
  FakeCall& Set(const std::string& name, const std::string& value) {
    options_[name] = value;
    return *this;
  }
  // call->seed; default 1.
  FakeCall& Seed(uint64_t seed) {
    call_.seed = seed;
    return *this;
  }
  // 0 = the service is not offered; default 1.
  FakeCall& Threads(int count) {
    threads_ = count;
    return *this;
  }
  // The host offers no linear algebra.
  FakeCall& WithoutLinalg() {
    linalg_ = false;
    return *this;
  }
  // scratch gives NULL beyond this many bytes; 0 = no limit.
  FakeCall& ScratchLimit(uint64_t bytes) {
    scratch_limit_ = bytes;
    return *this;
  }
  // The nth call from now (0 = the next) fails or, for progress, asks to stop.
  FakeCall& FailScratchAt(int64_t nth) {
    fail_scratch_at_ = nth;
    return *this;
  }
  // See FailScratchAt.
  FakeCall& FailEmitAt(int64_t nth) {
    fail_emit_at_ = nth;
    return *this;
  }
  // See FailScratchAt.
  FakeCall& CancelAt(int64_t nth) {
    cancel_at_ = nth;
    return *this;
  }
  // inverse_cholesky refuses unless damp >= this; for tests of recovery.
  FakeCall& CholeskyNeedsDamp(double damp) {
    cholesky_min_damp_ = damp;
    return *this;
  }

  // A row-major tensor on the call's device with a copy of `values`; lives as long as the call.
  template <class T>
  qm_tensor Tensor(const std::vector<T>& values, const std::vector<int64_t>& shape) {
    qm_tensor t = Allocate(call_.device, DTypeOf<T>::value, shape);
    if (t.data != nullptr) CopyIn(t, values.data(), values.size() * sizeof(T));
    t.flags = QM_TENSOR_READONLY;
    return t;
  }

  // ---- what the plugin did ----
  // Code of the last fail, QM_OK without one.
  qm_status code() const { return code_; }
  // Text of the last fail.
  const std::string& error() const { return error_; }
  // Severity and text of each line logged.
  const std::vector<std::pair<int32_t, std::string>>& logs() const { return logs_; }
  // How often progress was called.
  int64_t progress_calls() const { return progress_calls_; }
  // How often scratch was called.
  int64_t scratch_calls() const { return scratch_calls_; }
  // How often emit was called.
  int64_t emit_calls() const { return emit_calls_; }
  // How often inverse_cholesky was called.
  int64_t cholesky_calls() const { return cholesky_calls_; }
  // Sum of all requests, each rounded up to 256.
  uint64_t scratch_bytes() const { return scratch_bytes_; }
  // Whether linear `item` got a tensor of that name.
  bool Emitted(uint64_t item, const std::string& name) const {
    return emitted_.count({item, name}) != 0;
  }
  // That tensor; throws std::runtime_error if there is none.
  const qm_tensor& EmittedTensor(uint64_t item, const std::string& name) const {
    const auto found = emitted_.find({item, name});
    if (found == emitted_.end()) throw std::runtime_error("nothing was emitted as " + name);
    return found->second;
  }
  // Host copy of an emitted tensor; waits for the stream.
  template <class T>
  std::vector<T> Read(uint64_t item, const std::string& name) {
    return Read<T>(EmittedTensor(item, name));
  }
  // Host copy of any tensor of the call.
  template <class T>
  std::vector<T> Read(const qm_tensor& t) {
    if (t.dtype != DTypeOf<T>::value) throw std::runtime_error("read with the wrong type");
    std::vector<T> values(static_cast<size_t>(Elements(t)));
    CopyOut(t, values.data(), values.size() * sizeof(T));
    return values;
  }
  // True if no byte behind any scratch or emitted tensor was overwritten (host memory only).
  bool CanariesIntact() const {
    for (const Block& block : blocks_) {
      if (block.device.kind == QM_CUDA) continue;
      for (uint64_t i = 0; i < kCanaryBytes; ++i) {
        if (static_cast<const uint8_t*>(block.data)[block.bytes + i] != kCanary) return false;
      }
    }
    return true;
  }

 private:
  static constexpr uint64_t kAlign = 256;
  static constexpr uint64_t kCanaryBytes = 256;
  static constexpr uint8_t kCanary = 0xA5;

  struct Block {
    void* data;
    uint64_t bytes;
    qm_device device;
  };

  static FakeCall* Self(qm_call* call) { return static_cast<FakeCall*>(call->host_data); }
  static int64_t Elements(const qm_tensor& t) {
    int64_t n = 1;
    for (int d = 0; d < t.rank; ++d) n *= t.shape[d];
    return n;
  }

  void* NewBlock(qm_device device, uint64_t bytes) {
    const uint64_t padded = (bytes + kAlign - 1) / kAlign * kAlign;
    void* data = nullptr;
    if (device.kind == QM_CUDA) {
      data = AllocateDevice(padded);
    } else {
      data = std::aligned_alloc(kAlign, padded + kCanaryBytes);
      if (data != nullptr) {
        std::memset(data, 0xCD, padded);  // content is undefined: make use of it visible
        std::memset(static_cast<uint8_t*>(data) + bytes, kCanary, padded + kCanaryBytes - bytes);
      }
    }
    if (data != nullptr) {
      const std::lock_guard<std::mutex> lock(mutex_);
      blocks_.push_back({data, bytes, device});
    }
    return data;
  }

  qm_tensor Allocate(qm_device device, qm_dtype dtype, const std::vector<int64_t>& shape) {
    qm_tensor t = {};
    t.dtype = dtype;
    t.rank = static_cast<int32_t>(shape.size());
    t.device = device;
    int64_t elements = 1;
    for (int d = QM_MAX_RANK - 1; d >= 0; --d) {
      t.shape[d] = d < t.rank ? shape[d] : 1;
      t.stride[d] = d < t.rank ? elements : 0;
      elements *= t.shape[d];
    }
    if (elements > 0) {
      t.data = NewBlock(device, static_cast<uint64_t>(elements * ElementSize(dtype)));
    }
    return t;
  }

  static qm_status Fail(qm_call* call, qm_status code, const char* message) noexcept {
    FakeCall* self = Self(call);
    const std::lock_guard<std::mutex> lock(self->mutex_);
    self->code_ = code;
    self->error_ = message;
    return code;
  }
  static void Log(qm_call* call, int32_t severity, const char* message) noexcept {
    FakeCall* self = Self(call);
    const std::lock_guard<std::mutex> lock(self->mutex_);
    self->logs_.emplace_back(severity, message);
  }
  static int32_t Progress(qm_call* call, double) noexcept {
    FakeCall* self = Self(call);
    const int64_t nth = self->progress_calls_++;
    return self->cancel_at_ != kNever && nth >= self->cancel_at_ ? 1 : 0;
  }
  static void* Scratch(qm_call* call, qm_device device, uint64_t bytes) noexcept {
    FakeCall* self = Self(call);
    if (self->scratch_calls_++ == self->fail_scratch_at_) return nullptr;
    const uint64_t padded = (bytes + kAlign - 1) / kAlign * kAlign;
    if (self->scratch_limit_ != 0 && self->scratch_bytes_ + padded > self->scratch_limit_) {
      return nullptr;
    }
    self->scratch_bytes_ += padded;
    return self->NewBlock(device, std::max<uint64_t>(bytes, 1));
  }
  static qm_status Emit(qm_call* call, uint64_t item, const char* name, qm_device device,
                        qm_dtype dtype, int32_t rank, const int64_t* shape,
                        qm_tensor* out) noexcept {
    FakeCall* self = Self(call);
    if (self->emit_calls_++ == self->fail_emit_at_) {
      return Fail(call, QM_RESOURCE_EXHAUSTED, "no memory for the result");
    }
    if (self->Emitted(item, name)) {
      return Fail(call, QM_INVALID_ARGUMENT, "emitted twice under one name");
    }
    *out = self->Allocate(device, dtype, std::vector<int64_t>(shape, shape + rank));
    self->emitted_[{item, name}] = *out;
    return QM_OK;
  }
  const std::string& Option(const char* name) const {
    static const std::string kNone;
    const auto found = options_.find(name);
    return found == options_.end() ? kNone : found->second;
  }
  static int64_t OptI64(qm_call* call, const char* name) noexcept {
    const std::string& text = Self(call)->Option(name);
    return text == "true" ? 1 : std::atoll(text.c_str());
  }
  static double OptF64(qm_call* call, const char* name) noexcept {
    return std::atof(Self(call)->Option(name).c_str());
  }
  static const char* OptStr(qm_call* call, const char* name) noexcept {
    return Self(call)->Option(name).c_str();
  }

  // ---- services ----
  static const void* HostExt(qm_call* call, const char* id) noexcept {
    static constexpr qm_host_threads kThreads = {sizeof(qm_host_threads), &WorkerCount,
                                                 &ParallelFor};
    static constexpr qm_host_linalg kLinalg = {sizeof(qm_host_linalg), &Gemm, &InverseCholesky};
    FakeCall* self = Self(call);
    if (std::strcmp(id, QM_HOST_THREADS) == 0 && self->threads_ > 0) return &kThreads;
    if (std::strcmp(id, QM_HOST_LINALG) == 0 && self->linalg_) return &kLinalg;
    return nullptr;
  }
  static int32_t WorkerCount(qm_call* call) noexcept { return Self(call)->threads_; }
  static qm_status ParallelFor(qm_call* call, int64_t n, int64_t grain, qm_range_fn fn,
                               void* arg) noexcept {
    return FakeParallelFor(Self(call)->threads_, n, grain, fn, arg, call);
  }
  // On CUDA the operands travel to the host and back: right, and slow.
  static qm_status Gemm(qm_call* call, int32_t trans_a, int32_t trans_b, double alpha,
                        const qm_tensor* a, const qm_tensor* b, double beta,
                        qm_tensor* c) noexcept {
    FakeCall* self = Self(call);
    if (a->dtype != QM_F32 || b->dtype != QM_F32 || c->dtype != QM_F32) {
      return Fail(call, QM_UNIMPLEMENTED, "the fake gemm takes f32 only");
    }
    std::vector<float> ha = self->Dense(*a), hb = self->Dense(*b), hc = self->Dense(*c);
    FakeGemm(trans_a != 0, trans_b != 0, alpha, ha, a->shape[1], hb, b->shape[1], beta, &hc,
             c->shape[0], c->shape[1], trans_a ? a->shape[0] : a->shape[1]);
    self->Store(hc, c);
    return QM_OK;
  }
  static qm_status InverseCholesky(qm_call* call, const qm_tensor* h, double damp,
                                   qm_tensor* out) noexcept {
    FakeCall* self = Self(call);
    ++self->cholesky_calls_;
    std::vector<float> u;
    if (damp < self->cholesky_min_damp_ ||
        !FakeInverseCholesky(self->Dense(*h), h->shape[0], damp, &u)) {
      return Fail(call, QM_FAILED_PRECONDITION, "the damped matrix is not positive definite");
    }
    self->Store(u, out);
    return QM_OK;
  }
  std::vector<float> Dense(const qm_tensor& t) {
    std::vector<float> out(static_cast<size_t>(t.shape[0] * t.shape[1]));
    Move2d(out.data(), t.shape[1] * 4, t.data, t.stride[0] * 4, t.shape[1] * 4, t.shape[0]);
    return out;
  }
  void Store(const std::vector<float>& values, qm_tensor* t) {
    Move2d(t->data, t->stride[0] * 4, values.data(), t->shape[1] * 4, t->shape[1] * 4, t->shape[0]);
  }

  // ---- device memory ----
#if defined(QM_HAVE_CUDA)
  static void Check(cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
  }
  static void* CreateStream() {
    cudaStream_t stream = nullptr;
    Check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    return stream;
  }
  static void DestroyStream(void* stream) { cudaStreamDestroy(static_cast<cudaStream_t>(stream)); }
  static void* AllocateDevice(uint64_t bytes) {
    void* data = nullptr;
    return cudaMalloc(&data, bytes) == cudaSuccess ? data : nullptr;
  }
  static void Free(const Block& block) {
    if (block.device.kind == QM_CUDA) {
      cudaFree(block.data);
    } else {
      std::free(block.data);
    }
  }
  void Move2d(void* to, int64_t to_pitch, const void* from, int64_t from_pitch, int64_t width,
              int64_t rows) {
    if (call_.device.kind == QM_CUDA) {
      const cudaStream_t stream = static_cast<cudaStream_t>(call_.cuda_stream);
      Check(cudaMemcpy2DAsync(to, to_pitch, from, from_pitch, width, rows, cudaMemcpyDefault,
                              stream));
      Check(cudaStreamSynchronize(stream));
      return;
    }
    HostMove2d(to, to_pitch, from, from_pitch, width, rows);
  }
#else
  static void* CreateStream() { throw std::runtime_error("built without CUDA"); }
  static void DestroyStream(void*) {}
  static void* AllocateDevice(uint64_t) { return nullptr; }
  static void Free(const Block& block) { std::free(block.data); }
  void Move2d(void* to, int64_t to_pitch, const void* from, int64_t from_pitch, int64_t width,
              int64_t rows) {
    HostMove2d(to, to_pitch, from, from_pitch, width, rows);
  }
#endif
  static void HostMove2d(void* to, int64_t to_pitch, const void* from, int64_t from_pitch,
                         int64_t width, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) {
      std::memcpy(static_cast<char*>(to) + r * to_pitch,
                  static_cast<const char*>(from) + r * from_pitch, static_cast<size_t>(width));
    }
  }
  void CopyIn(const qm_tensor& t, const void* from, size_t bytes) {
    const int64_t n = static_cast<int64_t>(bytes);
    Move2d(t.data, n, from, n, n, 1);
  }
  void CopyOut(const qm_tensor& t, void* to, size_t bytes) {
    const int64_t n = static_cast<int64_t>(bytes);
    if (n > 0) Move2d(to, n, t.data, n, n, 1);
  }

  qm_call call_ = {};
  std::map<std::string, std::string> options_;
  int threads_ = 1;
  bool linalg_ = true;
  uint64_t scratch_limit_ = 0;
  int64_t fail_scratch_at_ = kNever;
  int64_t fail_emit_at_ = kNever;
  int64_t cancel_at_ = kNever;
  double cholesky_min_damp_ = 0.0;

  std::mutex mutex_;
  qm_status code_ = QM_OK;
  std::string error_;
  std::vector<std::pair<int32_t, std::string>> logs_;
  std::atomic<int64_t> progress_calls_{0};
  int64_t scratch_calls_ = 0;
  int64_t emit_calls_ = 0;
  int64_t cholesky_calls_ = 0;
  uint64_t scratch_bytes_ = 0;
  std::vector<Block> blocks_;
  std::map<std::pair<uint64_t, std::string>, qm_tensor> emitted_;
};

}  // namespace qm::testing

#endif  // QUANTMILL_TESTING_FAKE_CALL_HPP_
