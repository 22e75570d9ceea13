// Rounds to nearest on the GPU, int8 per row, as offender.c does on the CPU; with its option
// `fault` a kernel writes to an address where nothing is, and the call returns as if all were well.
#include <cuda_runtime.h>

#include <cstring>

#include "quantmill/all.h"

namespace {

__global__ void FaultKernel(int* address) { *address = 1; }

// One block per row; codes[row, col] = round(weight / scale) + 128, scale = max |weight| / 127.
__global__ void RoundKernel(const float* weight, int64_t cols, int64_t stride, int64_t code_stride,
                            unsigned char* codes, float* scale) {
  __shared__ float largest;
  const float* row = weight + blockIdx.x * stride;
  if (threadIdx.x == 0) {
    float top = 0.0f;
    for (int64_t j = 0; j < cols; ++j) top = fmaxf(top, fabsf(row[j]));
    largest = top > 0.0f ? top / 127.0f : 1.0f;
    scale[blockIdx.x] = largest;
  }
  __syncthreads();
  unsigned char* out = codes + blockIdx.x * code_stride;
  for (int64_t j = threadIdx.x; j < code_stride; j += blockDim.x) {
    out[j] = j < cols ? static_cast<unsigned char>(lrintf(row[j] / largest) + 128) : 0;
  }
}

qm_status Plan(qm_call*, const qm_linear_info*, qm_quant_plan* out) noexcept {
  out->format_id = "qm.fmt.affine-int/1";
  return QM_OK;
}

qm_status Run(qm_call* c, const qm_linear_info* li, const qm_tensor* w, const qm_stats*,
              qm_packed* out) noexcept {
  if (w->device.kind != QM_CUDA) return c->fail(c, QM_INVALID_ARGUMENT, "wants a GPU");
  auto* stream = static_cast<cudaStream_t>(c->cuda_stream);
  const int64_t n = li->out_features, k = li->in_features, words = (k + 3) / 4;
  const int64_t code_shape[] = {n, words}, scale_shape[] = {n, 1};
  qm_tensor codes, scale;
  qm_status status = c->emit(c, 0, "codes", w->device, QM_I32, 2, code_shape, &codes);
  if (status != QM_OK) return status;
  status = c->emit(c, 0, "scale", w->device, QM_F32, 2, scale_shape, &scale);
  if (status != QM_OK) return status;
  RoundKernel<<<static_cast<unsigned>(n), 128, 0, stream>>>(
      static_cast<const float*>(w->data), k, w->stride[0], words * 4,
      static_cast<unsigned char*>(codes.data), static_cast<float*>(scale.data));
  if (c->opt_i64(c, "fault") != 0) {
    FaultKernel<<<1, 1, 0, stream>>>(reinterpret_cast<int*>(uintptr_t{64}));
  }
  auto* tensors = static_cast<qm_named_tensor*>(
      c->scratch(c, qm_device{QM_CPU, 0}, 2 * sizeof(qm_named_tensor)));
  if (tensors == nullptr) return c->fail(c, QM_RESOURCE_EXHAUSTED, "no scratch");
  tensors[0] = {"codes", codes};
  tensors[1] = {"scale", scale};
  *out = {
      "qm.fmt.affine-int/1", "{\"bits\":8,\"group_size\":-1,\"zero\":\"none\"}", tensors, 2, n, k};
  return QM_OK;
}

const qm_quantize_linear kQuantize = {sizeof kQuantize, Plan, Run, nullptr};

const void* Ext(const qm_method*, const char* id) noexcept {
  return std::strcmp(id, QM_EXT_QUANTIZE_LINEAR) == 0 ? &kQuantize : nullptr;
}

const qm_option kOptions[] = {
    {"fault", "false", nullptr, "write to an illegal address", QM_OPT_BOOL, 0}};
const qm_method kMethod = {sizeof kMethod,
                           "org.example.cuda-offender",
                           "0.1.0",
                           "takes the GPU down on demand",
                           kOptions,
                           1,
                           QM_METHOD_DETERMINISTIC,
                           Ext};
const qm_method* const kMethods[] = {&kMethod};
const qm_plugin kPlugin = {sizeof kPlugin, QM_ABI_MAJOR, QM_ABI_MINOR, 0,     1,
                           kMethods,       "example",    "Apache-2.0", "none"};

}  // namespace

extern "C" QM_EXPORT const qm_plugin* qm_plugin_entry_v1(void) { return &kPlugin; }
