#include "linear.h"

#include <algorithm>
#include <cmath>

#include "quantmill/sdk/plugin.hpp"

namespace quantmill::oftq {
namespace {

// x A^T is kept for this many rows at a time, so that the scratch of a call has a bound (4 MiB, or
// 4096 rows); more rows at a time cost a GPU fewer launches.
int64_t RowChunk(int64_t rank) { return std::clamp<int64_t>((1 << 20) / rank, 4096, 16384); }

uint64_t Padded(int64_t floats) { return (static_cast<uint64_t>(floats) * 4 + 255) / 256 * 256; }

// Rows [first, first + count) of a matrix with `columns` columns.
Rows Part(const Rows& rows, int64_t columns, int64_t first, int64_t count) {
  const int64_t bytes = rows.dtype == QM_F32 ? 4 : 2;
  return {static_cast<char*>(rows.data) + first * columns * bytes, rows.dtype, count};
}

}  // namespace

// ---- orthogonal --------------------------------------------------------------------------------

qm_status RotatedLinear::Start(qm_call* call, const Params& params) const {
  return FillZero(call, params.data[0], rotation.blocks() * rotation.numbers());
}

// Keeps R, so that the derivative need not build it again.
qm_status RotatedLinear::Forward(qm_call* call, const Params& params, const Rows& x, void* saved,
                                 const Rows& out) const {
  float* r = static_cast<float*>(saved);
  if (r == nullptr) {
    QM_TRY(qm::Scratch(call, call->device, rotation.elements(), "the rotation", &r));
  }
  QM_TRY(BuildRotation(call, rotation, params.data[0], r));
  return Rotate(call, rotation, r, /*transposed=*/false, x, /*accumulate=*/false, out, nullptr);
}

qm_status RotatedLinear::Vjp(qm_call* call, const Params& params, const Rows& x, const void* saved,
                             const float* d_out, float* d_x, const Params& d_params) const {
  const float* r = static_cast<const float*>(saved);
  float* scratch = nullptr;
  if (d_x != nullptr) {
    QM_TRY(qm::Scratch(call, call->device, RotateScratch(call->device.kind, rotation),
                       "the transposed rotation", &scratch));
    const Rows above = {const_cast<float*>(d_out), QM_F32, x.rows};
    QM_TRY(Rotate(call, rotation, r, /*transposed=*/true, above, /*accumulate=*/true,
                  {d_x, QM_F32, x.rows}, scratch));
  }
  if (d_params.data[0] == nullptr) return QM_OK;
  QM_TRY(qm::Scratch(call, call->device, GradientScratch(call->device.kind, rotation),
                     "partial gradients", &scratch));
  return RotationGradient(call, rotation, params.data[0], r, x, d_out, d_params.data[0], scratch);
}

qm_status RotatedLinear::Fold(qm_call* call, const Params& params, const float* weight,
                              float* merged) const {
  float *r = nullptr, *scratch = nullptr;
  QM_TRY(qm::Scratch(call, call->device, rotation.elements(), "the rotation", &r));
  QM_TRY(qm::Scratch(call, call->device, RotateScratch(call->device.kind, rotation),
                     "the transposed rotation", &scratch));
  QM_TRY(BuildRotation(call, rotation, params.data[0], r));
  const Rows from = {const_cast<float*>(weight), QM_F32, out_features};
  return Rotate(call, rotation, r, /*transposed=*/true, from, /*accumulate=*/false,
                {merged, QM_F32, out_features}, scratch);
}

uint64_t RotatedLinear::ScratchBytes(qm_device_kind device) const {
  return Padded(rotation.elements()) + Padded(RotateScratch(device, rotation)) +
         Padded(GradientScratch(device, rotation));
}

// ---- low rank ----------------------------------------------------------------------------------

// A as torch's kaiming_uniform_(a = sqrt 5) draws it, within 1 / sqrt(in_features); B = 0.
qm_status LowRankLinear::Start(qm_call* call, const Params& params) const {
  const float bound = static_cast<float>(1.0 / std::sqrt(static_cast<double>(in_features)));
  QM_TRY(FillUniform(call, call->seed, bound, params.data[0], rank * in_features));
  return FillZero(call, params.data[1], out_features * rank);
}

// Keeps x A^T.
qm_status LowRankLinear::Forward(qm_call* call, const Params& params, const Rows& x, void* saved,
                                 const Rows& out) const {
  float *scratch = nullptr, *narrow = nullptr;
  QM_TRY(qm::Scratch(call, call->device,
                     ProductScratch(call->device.kind, rank * std::max(in_features, out_features)),
                     "a product", &scratch));
  const int64_t chunk = RowChunk(rank);
  if (saved == nullptr) {
    QM_TRY(qm::Scratch(call, call->device, std::min(x.rows, chunk) * rank, "x A^T", &narrow));
  }
  const Operand a = RowMajor(params.data[0], QM_F32, in_features);
  const Operand b = RowMajor(params.data[1], QM_F32, rank);
  for (int64_t first = 0; first < x.rows; first += chunk) {
    const int64_t count = std::min(chunk, x.rows - first);
    const Rows x_part = Part(x, in_features, first, count);
    const Rows out_part = Part(out, out_features, first, count);
    if (saved != nullptr) narrow = static_cast<float*>(saved) + first * rank;
    QM_TRY(Multiply(call,
                    {count, rank, in_features, RowMajor(x_part.data, x_part.dtype, in_features),
                     Transposed(a), 1.0f, narrow, QM_F32, false},
                    scratch));
    QM_TRY(Multiply(call,
                    {count, out_features, rank, RowMajor(narrow, QM_F32, rank), Transposed(b),
                     scale, out_part.data, out_part.dtype, false},
                    scratch));
  }
  return QM_OK;
}

qm_status LowRankLinear::Vjp(qm_call* call, const Params& params, const Rows& x, const void* saved,
                             const float* d_out, float* d_x, const Params& d_params) const {
  float *scratch = nullptr, *d_narrow = nullptr;
  QM_TRY(qm::Scratch(call, call->device,
                     ProductScratch(call->device.kind, rank * std::max(in_features, out_features)),
                     "a product", &scratch));
  const int64_t chunk = RowChunk(rank);
  QM_TRY(qm::Scratch(call, call->device, std::min(x.rows, chunk) * rank, "a gradient", &d_narrow));
  const Operand a = RowMajor(params.data[0], QM_F32, in_features);
  const Operand b = RowMajor(params.data[1], QM_F32, rank);
  for (int64_t first = 0; first < x.rows; first += chunk) {
    const int64_t count = std::min(chunk, x.rows - first);
    const Rows x_part = Part(x, in_features, first, count);
    const Operand above = RowMajor(d_out + first * out_features, QM_F32, out_features);
    const Operand narrow = RowMajor(static_cast<const float*>(saved) + first * rank, QM_F32, rank);
    const Operand d_middle = RowMajor(d_narrow, QM_F32, rank);
    QM_TRY(Multiply(call, {count, rank, out_features, above, b, scale, d_narrow, QM_F32, false},
                    scratch));
    if (d_x != nullptr) {
      QM_TRY(Multiply(
          call,
          {count, in_features, rank, d_middle, a, 1.0f, d_x + first * in_features, QM_F32, true},
          scratch));
    }
    if (d_params.data[0] != nullptr) {
      QM_TRY(Multiply(
          call,
          {rank, in_features, count, Transposed(d_middle),
           RowMajor(x_part.data, x_part.dtype, in_features), 1.0f, d_params.data[0], QM_F32, true},
          scratch));
    }
    if (d_params.data[1] != nullptr) {
      QM_TRY(Multiply(call,
                      {out_features, rank, count, Transposed(above), narrow, scale,
                       d_params.data[1], QM_F32, true},
                      scratch));
    }
  }
  return QM_OK;
}

qm_status LowRankLinear::Fold(qm_call* call, const Params& params, const float* weight,
                              float* merged) const {
  float* scratch = nullptr;
  QM_TRY(
      qm::Scratch(call, call->device, ProductScratch(call->device.kind, 0), "a product", &scratch));
  QM_TRY(Copy(call, weight, merged, out_features * in_features));
  return Multiply(call,
                  {out_features, in_features, rank, RowMajor(params.data[1], QM_F32, rank),
                   RowMajor(params.data[0], QM_F32, in_features), scale, merged, QM_F32, true},
                  scratch);
}

uint64_t LowRankLinear::ScratchBytes(qm_device_kind device) const {
  return Padded(ProductScratch(device, rank * std::max(in_features, out_features))) +
         Padded(RowChunk(rank) * rank);
}

}  // namespace quantmill::oftq
