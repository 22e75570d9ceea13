// qm.fmt.int8-row/1 and qm.fmt.float8/1 (plugin_api/FORMATS.md) inside this plugin: a checked view
// of their tensors, and the entry points of the files beside this one.
#ifndef QUANTMILL_PLUGINS_EETQ_ROW8_H_
#define QUANTMILL_PLUGINS_EETQ_ROW8_H_

#include <cstdint>
#include <string>

#include "quantmill/format.h"
#include "quantmill/linear_kernel.h"
#include "quantmill/sdk/plugin.hpp"
#include "quantmill/sdk/row8.hpp"
#include "quantmill/sdk/tensor.hpp"

namespace eetq {

// For tensors in host memory.
inline constexpr qm_device kHost = {QM_CPU, 0};

// What a byte stands for.
enum class Code : int32_t { kInt8 = 0, kE4M3 = 1, kE5M2 = 2 };

struct Params {
  Code code = Code::kInt8;
  bool per_tensor = false;   // one scale instead of one per row
  bool activations = false;  // products quantize x: to int8 for kInt8, to E4M3 for kE4M3
};

// A packed weight as pointers.
struct Weight {
  Params params;
  int64_t out = 0, in = 0;
  const uint8_t* codes = nullptr;  // [out, in]
  const void* scale = nullptr;     // [out], or [1] if per_tensor
  qm_dtype scale_dtype = QM_F16;
};

// Parameters of a format id and its canonical JSON; false if either is none of ours.
bool ParseParams(const char* format_id, const char* json, Params* out);
const char* FormatId(const Params& params);
std::string ParamsJson(const Params& params);
qm_dtype CodeDType(Code code);

// Structure only: names, dtypes, shapes, parameters.
qm_status ReadWeight(qm_call* call, const qm_packed& packed, Weight* out);
// Scales positive and finite, codes finite numbers. Host memory.
qm_status CheckValues(qm_call* call, const Weight& weight);
bool IsContiguous(const qm_tensor& tensor);

// ---- CPU (row8_cpu.cc) --------------------------------------------------------------------------
qm_status CpuDequantize(qm_call* call, const Weight& weight, qm_tensor* out);
// Weights with params.activations: any number of rows; others up to kCpuMaxRows.
qm_status CpuMatmul(qm_call* call, const Weight& weight, const qm_tensor& x, qm_tensor* y);
// Rows at most for which the fused products pay; above, the host dequantizes.
inline constexpr int64_t kCpuMaxRows = 8;
// Without vector instructions beyond the baseline from now on (tests compare both ways).
void UsePortableLoops(bool portable);

// ---- CUDA (row8_*.cu) ---------------------------------------------------------------------------
qm_status CudaDequantize(qm_call* call, const Weight& weight, qm_tensor* out);
uint64_t CudaWorkspaceBytes(const Weight& weight, int64_t max_rows);
qm_status CudaMatmul(qm_call* call, const Weight& weight, const qm_tensor& x, void* workspace,
                     qm_tensor* y);

// ---- checkpoint targets (row8_checkpoint.cc) ----------------------------------------------------
// Of int8-row, and of float8 the last.
inline constexpr const char* kTargets[2] = {"eetq", "compressed-tensors"};
qm_status CanStore(qm_call* call, const char* target, const Params& params, int64_t out,
                   int64_t in);
qm_status ToCheckpoint(qm_call* call, const char* target, const char* layer, const Weight& weight,
                       const qm_named_tensor** out, uint64_t* count, const char** config_json);
// `format_id`: the format asked. UNIMPLEMENTED for tensors that are of another format.
qm_status FromCheckpoint(qm_call* call, const char* format_id, const char* target,
                         const char* layer, const qm_named_tensor* tensors, uint64_t count,
                         const char* config_json, qm_packed* out);

}  // namespace eetq

#endif  // QUANTMILL_PLUGINS_EETQ_ROW8_H_
