// Routing of tokens to experts. CPU reference: RouteTopK of core/cpu.
#ifndef QUANTMILL_CORE_CUDA_ROUTE_CUH_
#define QUANTMILL_CORE_CUDA_ROUTE_CUH_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/tensor/dtype.h"

namespace quantmill::cuda {

// More experts than any published model has; a row must fit a warp's share of shared memory.
inline constexpr int kMaxExperts = 1024;

// Softmax over the experts in f32, the top_k largest (lowest index first on ties), divided by their
// sum if normalize. logits: [rows, experts]; experts_out I32, weights_out f32: [rows, top_k]; all
// on the device. 1 <= top_k <= experts <= kMaxExperts.
cudaError_t LaunchRouteTopK(const void* logits, DType dtype, int64_t rows, int experts, int top_k,
                            bool normalize, int32_t* experts_out, float* weights_out,
                            cudaStream_t stream);

}  // namespace quantmill::cuda

#endif  // QUANTMILL_CORE_CUDA_ROUTE_CUH_
