// The order in which EETQ files hold the INT8 codes of a linear, for GPUs of compute capability 7.5
// to 8.9 (eetq: csrc/cutlass_kernels/cutlass_preprocessors.cc and csrc/cutlass_extensions/include/
// cutlass_extensions/gemm/kernel/mixed_gemm_B_layout.h).
//
// The code of input channel k and output n, K inputs in all, lies at
//
//   (n/2) 2K + (k/64) 128 + (n mod 2) 64 + ((k mod 64)/16) 16 + 2 (k mod 8) + (k/8 mod 2)
//
// (whole divisions) with its sign bit flipped: two outputs take turns every 64 input channels, and
// in every 16 channels the halves are interleaved.
#ifndef QUANTMILL_PLUGINS_EETQ_EETQ_LAYOUT_H_
#define QUANTMILL_PLUGINS_EETQ_EETQ_LAYOUT_H_

#include <cstdint>

namespace eetq {

// Features must be multiples of this.
inline constexpr int64_t kEetqMultiple = 64;

// codes: [out, in] -> stored: the bytes of a tensor declared [in, out]. They must not overlap.
void ToEetqLayout(const uint8_t* codes, int64_t out, int64_t in, uint8_t* stored);
// The inverse.
void FromEetqLayout(const uint8_t* stored, int64_t out, int64_t in, uint8_t* codes);

}  // namespace eetq

#endif  // QUANTMILL_PLUGINS_EETQ_EETQ_LAYOUT_H_
