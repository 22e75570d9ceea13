// The qm_call a case hands to the plugin. Every buffer is fenced: on the CPU it ends at most 255
// bytes before a page that cannot be touched, inputs are mapped read-only, and everything becomes
// untouchable when the call is over; on a GPU inputs are compared before and after, and a pattern
// lies behind every buffer. What a plugin may never do, in whatever call, is found by Finish().
#ifndef QUANTMILL_SDK_CHECK_CHECKED_CALL_H_
#define QUANTMILL_SDK_CHECK_CHECKED_CALL_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "core/formats/packed.h"
#include "core/tensor/tensor.h"
#include "sdk/check/case.h"

namespace quantmill::check {

// Text form, as in an option table.
using OptionValues = std::map<std::string, std::string>;

// The table's defaults; for a required option its first choice, its least number or "x".
OptionValues DefaultOptions(const qm_method& method);

struct CallSetup {
  OptionValues options;  // of the whole table: start from DefaultOptions()
  uint64_t seed = 1;
  uint64_t scratch_limit = 0;    // bytes; 0 = none
  int64_t fail_scratch_at = -1;  // the nth request fails, from 0
  int64_t fail_emit_at = -1;     // likewise
  int64_t cancel_at = -1;        // progress() asks to stop from the nth time on
  bool services = true;          // false: every host extension is NULL
  // A host of a later minor: every growable struct is longer than the headers say, and what is
  // behind the known fields is poison. Without it structs end where the headers end.
  bool newer_host = false;
  uint8_t fill = 0xFF;  // what memory for the plugin to fill holds at first
};
// The defaults of the subject's method, and its seed.
CallSetup DefaultSetup(const Subject& subject);

class CheckedCall {
 public:
  // `subject` must outlive the call.
  CheckedCall(Subject& subject, CallSetup setup);
  ~CheckedCall();  // after this nothing the plugin was given can be touched
  CheckedCall(const CheckedCall&) = delete;
  CheckedCall& operator=(const CheckedCall&) = delete;

  qm_call* get();

  // ---- what the plugin is given, on the device of the call; alive as long as the call ----
  // A read-only tensor with a copy of `values`, which must fill `shape`. `name` is for messages.
  template <typename T>
  qm_tensor Input(const std::string& name, const Shape& shape, absl::Span<const T> values) {
    return InputBytes(name, DTypeOf(static_cast<T*>(nullptr)), shape, values.data());
  }
  // The same from a host tensor.
  qm_tensor Input(const std::string& name, const Tensor& host);
  // A matrix whose rows lie `row_stride` >= cols elements apart; what is between them is NaN.
  qm_tensor StridedInput(const std::string& name, int64_t rows, int64_t cols, int64_t row_stride,
                         absl::Span<const float> values);
  // Memory of the host for the plugin to fill (dequantized weights, y, parameters), contents NaN
  // or 0xFF.
  qm_tensor Output(const std::string& name, DType dtype, const Shape& shape);
  // Plain memory of that kind; null for 0 bytes.
  void* Memory(const std::string& name, uint64_t bytes);
  // A GROWABLE struct of the host (a qm_linear_info, a qm_quant_plan), in memory of its own.
  template <typename T>
  T* Struct(const std::string& name, const T& value) {
    T* copy = static_cast<T*>(StructBytes(name, &value, sizeof(T), true));
    return copy;
  }
  // A FROZEN struct or array of them, likewise.
  template <typename T>
  T* Array(const std::string& name, absl::Span<const T> values) {
    return static_cast<T*>(StructBytes(name, values.data(), values.size() * sizeof(T), false));
  }
  // A read-only view of a packed weight, moved to the device of the call.
  const qm_packed* InputPacked(const PackedWeight& weight);

  // ---- after the plugin has returned `code` ----
  // What it did wrong whatever the call: wrote to an input (QM-P-004), beside a buffer (QM-P-014),
  // returned an error without text (QM-P-005), left another device current (QM-P-006). Waits for
  // the stream. Call it once, before anything below.
  std::optional<Verdict> Finish(qm_status code);
  qm_status code() const;
  // The text of the last fail(), "" if there was none; and the code that went with it.
  const std::string& error() const;
  // "RESOURCE_EXHAUSTED (no scratch memory ...)": code and text, for messages.
  std::string Outcome() const;

  int64_t scratch_calls() const;
  int64_t emit_calls() const;
  int64_t progress_calls() const;
  uint64_t scratch_bytes() const;       // sum of all requests
  double seconds_since_cancel() const;  // from the first "stop" to Finish(); 0 when never asked

  // Tensors emitted under `item`, copied to ordinary host memory.
  absl::StatusOr<std::vector<NamedTensor>> Emitted(uint64_t item = 0);
  // The packed weight the plugin described, all tensors having been emitted in this call; on the
  // host. An error says what is wrong with the description (QM-P-009).
  absl::StatusOr<PackedWeight> TakePacked(const qm_packed& packed, uint64_t item = 0);
  // A host copy of a tensor made by Output or given in a result.
  absl::StatusOr<Tensor> Read(const qm_tensor& tensor);

 private:
  static DType DTypeOf(const float*) { return DType::kF32; }
  static DType DTypeOf(const double*) { return DType::kF64; }
  static DType DTypeOf(const int8_t*) { return DType::kI8; }
  static DType DTypeOf(const uint8_t*) { return DType::kU8; }
  static DType DTypeOf(const int32_t*) { return DType::kI32; }
  static DType DTypeOf(const int64_t*) { return DType::kI64; }
  qm_tensor InputBytes(const std::string& name, DType dtype, const Shape& shape, const void* data);

  void* StructBytes(const std::string& name, const void* data, uint64_t bytes, bool growable);

  class Impl;
  std::unique_ptr<Impl> impl_;
};

// Calls a function of a plugin's table. An exception that leaves it is turned into
// kThrewException, which Finish() reports as QM-P-007.
inline constexpr qm_status kThrewException = -1;
template <typename... P>
qm_status Invoke(CheckedCall& call, qm_status (*function)(qm_call*, P...),
                 std::type_identity_t<P>... arguments) {
  try {
    return function(call.get(), arguments...);
  } catch (...) {
    return kThrewException;
  }
}

}  // namespace quantmill::check

#endif  // QUANTMILL_SDK_CHECK_CHECKED_CALL_H_
