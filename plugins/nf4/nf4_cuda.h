// The CUDA side of the plugin. Present only in a CUDA build (QM_HAVE_CUDA).
#ifndef QUANTMILL_PLUGINS_NF4_NF4_CUDA_H_
#define QUANTMILL_PLUGINS_NF4_NF4_CUDA_H_

#include "nf4.h"

namespace quantmill::nf4 {

// Rows of x for which products are served; above, the host dequantizes.
inline constexpr int64_t kCudaMaxRows = 16;

// What kernels need of a weight; passed by value.
struct DeviceWeight {
  const uint8_t* codes;
  const float* absmax;  // null when nested
  const uint8_t* absmax_byte;
  const float* codebook;
  const float* nested_absmax;
  const float* nested_codebook;
  const float* absmax_offset;
  const uint8_t* tiles;  // null unless prepacked; then codes and factors are null
  const float* tile_absmax;
  const uint8_t* tile_absmax_byte;
  int64_t out, in;
  int block_shift;  // log2 of the block size
  int nested_block_size;
  int nested_shift;  // its log2, rounded up
};

inline DeviceWeight ToDeviceWeight(const Weight& w) {
  int shift = 0, nested_shift = 0;
  while ((int64_t{1} << shift) < w.params.block_size) ++shift;
  while ((int64_t{1} << nested_shift) < w.params.nested_block_size) ++nested_shift;
  return {w.codes,         w.absmax,
          w.absmax_byte,   w.codebook,
          w.nested_absmax, w.nested_codebook,
          w.absmax_offset, w.tiles,
          w.tile_absmax,   w.tile_absmax_byte,
          w.out,           w.in,
          shift,           static_cast<int>(w.params.nested_block_size),
          nested_shift};
}

qm_status CudaPrepack(qm_call* call, const Weight& weight, qm_packed* out);
qm_status CudaDequantize(qm_call* call, const Weight& weight, qm_tensor* out);
qm_status CudaMatmul(qm_call* call, const Weight& weight, const qm_tensor& x, qm_tensor* y);
// Of one activation type each (nf4_matmul_*.cu); m <= kCudaMaxRows.
qm_status MatmulF32(qm_call* call, const DeviceWeight& w, const void* x, int m, void* y);
qm_status MatmulF16(qm_call* call, const DeviceWeight& w, const void* x, int m, void* y);
qm_status MatmulBF16(qm_call* call, const DeviceWeight& w, const void* x, int m, void* y);

}  // namespace quantmill::nf4

#endif  // QUANTMILL_PLUGINS_NF4_NF4_CUDA_H_
