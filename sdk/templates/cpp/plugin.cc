// my-method: round to nearest with a scale and a zero point per group, on all cores.
// Begin with ChooseGroup: it decides which values the weights of a group can take.
#include "quantmill/sdk/plugin.hpp"

#include <algorithm>

#include "quantmill/sdk/affine_int.h"
#include "quantmill/sdk/affine_int.hpp"
#include "quantmill/sdk/tensor.hpp"

namespace my_method_plugin {
namespace {

// Scale and zero point for the n weights of a group: code q stands for scale * (q - zero).
qm::AffineGroup ChooseGroup(const float* w, int64_t n, const qm::AffineRule& rule) {
  float low = *std::min_element(w, w + n);
  float high = *std::max_element(w, w + n);
  qm::WidenRange(rule.symmetric, &low, &high);
  return qm::GroupForRange(low, high, rule);
}

void QuantizeRow(const float* w, int64_t row, const qm::AffineShape& shape,
                 const qm::AffineTensors& out) {
  const int64_t width = shape.group_width(), groups = shape.groups();
  const int64_t words = qm::AffineWordsPerRow(shape.in_features, shape.rule.bits);
  int32_t* codes = static_cast<int32_t*>(out.codes.data) + row * words;
  uint8_t* zeros = static_cast<uint8_t*>(out.zero.data);  // null when symmetric
  std::fill(codes, codes + words, 0);
  for (int64_t g = 0; g < groups; ++g) {
    const qm::AffineGroup group = ChooseGroup(w + g * width, width, shape.rule);
    qm::StoreScale(out.scale.data, shape.rule.scale_dtype, row * groups + g, group.scale);
    if (zeros != nullptr) zeros[row * groups + g] = static_cast<uint8_t>(group.zero);
    for (int64_t i = g * width; i < (g + 1) * width; ++i) {
      const float code = qm::EncodeAffine(w[i], group, shape.rule.max_code());
      qm_put_code(codes, shape.rule.bits, i, static_cast<uint32_t>(code));
    }
  }
}

struct MyMethod {
  static constexpr char kId[] = "org.example.my-method", kVersion[] = "0.1.0";
  static constexpr char kSummary[] = "Round to nearest";
  static constexpr qm_option kOptions[] = {qm::kAffineBitsOption, qm::kAffineGroupSizeOption,
                                           qm::kAffineSymmetricOption};

  static qm_status Plan(qm_call* call, const qm_linear_info& info, qm_quant_plan* out) {
    if (call->device.kind != QM_CPU) {
      return qm::Fail(call, QM_FAILED_PRECONDITION, "my-method has no GPU code; use device cpu");
    }
    qm::AffineShape shape;
    qm::FillPlan(out, qm::kAffineIntFormat, /*scratch_bytes=*/4096);
    QM_TRY(qm::ReadAffineShape(call, info, &shape));
    return qm::PlanAffineInt(call, shape, /*with_group_index=*/false, out);
  }

  static qm_status Run(qm_call* call, const qm_linear_info& info, const qm_tensor& weight,
                       const qm_stats*, qm_packed* out) {
    qm::AffineShape shape;
    qm::TensorView<const float> view;
    qm::AffineTensors tensors;
    QM_TRY(qm::ReadAffineShape(call, info, &shape));
    const int64_t rows = shape.out_features, cols = shape.in_features;
    QM_TRY(qm::ViewMatrix<float>(call, weight, "the weight", call->device, rows, cols, &view));
    QM_TRY(qm::EmitAffineInt(call, 0, shape, /*with_group_index=*/false, &tensors));
    QM_TRY(qm::ParallelFor(call, rows, /*grain=*/8, [&](int64_t begin, int64_t end, int32_t) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t bad = qm::FirstNotFinite(view.row(row), cols);
        if (bad >= 0) return qm::NotFinite(call, row, bad);
        QuantizeRow(view.row(row), row, shape, tensors);
      }
      return qm::Progress(call, static_cast<double>(end) / static_cast<double>(rows));
    }));
    return qm::DescribeAffineInt(call, shape, tensors, out);
  }
};

}  // namespace
}  // namespace my_method_plugin

QM_QUANTIZE_LINEAR_PLUGIN(my_method_plugin::MyMethod, "example", "Apache-2.0")
