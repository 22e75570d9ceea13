// The SDK's conversions of 16-bit floats as a kernel runs them; for halves_cuda_test.cc.
#ifndef QUANTMILL_SDK_TESTING_HALVES_CUDA_H_
#define QUANTMILL_SDK_TESTING_HALVES_CUDA_H_

#include <cstdint>
#include <vector>

namespace qm_halves {

bool HaveGpu();
// ToFloat(F16) of all 65536 halves, as bits.
std::vector<uint32_t> FloatsOfHalves();
// ToF16 of floats, as bits.
std::vector<uint16_t> HalvesOfFloats(const std::vector<float>& floats);

}  // namespace qm_halves

#endif  // QUANTMILL_SDK_TESTING_HALVES_CUDA_H_
