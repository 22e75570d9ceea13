// Linear for a few rows. CPU reference: Linear of core/cpu.
#ifndef QUANTMILL_CORE_CUDA_GEMV_CUH_
#define QUANTMILL_CORE_CUDA_GEMV_CUH_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/tensor/dtype.h"

namespace quantmill::cuda {

// Most rows LaunchGemv takes; from more on the tensor cores of a matrix product win.
inline constexpr int64_t kGemvRows = 4;

struct GemvArguments {
  const void* x;                                       // [rows, k]
  const void* weight;                                  // [n, k]
  const void* bias;                                    // [n] or null
  void* out;                                           // [rows, n]
  DType x_dtype, weight_dtype, bias_dtype, out_dtype;  // any of F32, F16, BF16
  int64_t rows, n, k;
};

// True when rows, alignment (16 bytes) and k (a multiple of 8) suit LaunchGemv.
bool GemvSuits(const GemvArguments& arguments);

// out[r, j] = sum_i x[r, i] weight[j, i] + bias[j], in f32, rounded once to out_dtype.
cudaError_t LaunchGemv(const GemvArguments& arguments, cudaStream_t stream);

}  // namespace quantmill::cuda

#endif  // QUANTMILL_CORE_CUDA_GEMV_CUH_
