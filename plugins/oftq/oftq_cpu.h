// The operations of oftq.h on the CPU, and rows of any float type as f32. Results do not depend on
// the number of threads.
#ifndef QUANTMILL_PLUGINS_OFTQ_OFTQ_CPU_H_
#define QUANTMILL_PLUGINS_OFTQ_OFTQ_CPU_H_

#include <cstdint>

#include "oftq.h"
#include "quantmill/sdk/tensor.hpp"

namespace quantmill::oftq {

// values[i] = data[at + i]
inline void LoadFloats(const void* data, qm_dtype dtype, int64_t at, int64_t count, float* values) {
  if (dtype == QM_F16) {
    const auto* from = static_cast<const qm::F16*>(data) + at;
    for (int64_t i = 0; i < count; ++i) values[i] = qm::ToFloat(from[i]);
  } else if (dtype == QM_BF16) {
    const auto* from = static_cast<const qm::BF16*>(data) + at;
    for (int64_t i = 0; i < count; ++i) values[i] = qm::ToFloat(from[i]);
  } else {
    const auto* from = static_cast<const float*>(data) + at;
    for (int64_t i = 0; i < count; ++i) values[i] = from[i];
  }
}

// data[at + i] = values[i], rounded
inline void StoreFloats(const float* values, qm_dtype dtype, int64_t at, int64_t count,
                        void* data) {
  if (dtype == QM_F16) {
    auto* to = static_cast<qm::F16*>(data) + at;
    for (int64_t i = 0; i < count; ++i) to[i] = qm::ToF16(values[i]);
  } else if (dtype == QM_BF16) {
    auto* to = static_cast<qm::BF16*>(data) + at;
    for (int64_t i = 0; i < count; ++i) to[i] = qm::ToBF16(values[i]);
  } else {
    auto* to = static_cast<float*>(data) + at;
    for (int64_t i = 0; i < count; ++i) to[i] = values[i];
  }
}

qm_status BuildRotationCpu(qm_call* call, const Rotation& rotation, const float* q, float* r);
// scratch: rotation.elements() floats.
qm_status RotateCpu(qm_call* call, const Rotation& rotation, const float* r, bool transposed,
                    const Rows& in, bool accumulate, const Rows& out, float* scratch);
qm_status RotationGradientCpu(qm_call* call, const Rotation& rotation, const float* q,
                              const float* r, const Rows& in, const float* d_out, float* d_q);
// scratch: product.n * product.k floats if b has strided rows.
qm_status MultiplyCpu(qm_call* call, const Product& product, float* scratch);

}  // namespace quantmill::oftq

#endif  // QUANTMILL_PLUGINS_OFTQ_OFTQ_CPU_H_
