// my-method: round to nearest with a scale and a zero point per group, on the CPU and the GPU.
// Begin with ChooseGroup in my_method.h: it decides which values the weights of a group can take.
#include "quantmill/sdk/plugin.hpp"

#include "my_method.h"

namespace my_method_plugin {
#if !defined(QM_HAVE_CUDA)
qm_status QuantizeCuda(qm_call* call, const Job&) {
  return qm::Fail(call, QM_FAILED_PRECONDITION, "built without CUDA; use device cpu");
}
#endif
qm_status QuantizeCpu(qm_call* call, const Job& job) {
  const int64_t rows = job.shape.out_features, cols = job.shape.in_features;
  return qm::ParallelFor(call, rows, /*grain=*/8, [&](int64_t begin, int64_t end, int32_t) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t bad = qm::FirstNotFinite(job.weight.row(row), cols);
      if (bad >= 0) return qm::NotFinite(call, row, bad);
      for (int64_t g = 0; g < job.shape.groups(); ++g) QuantizeGroup(job, row, g);
      for (int64_t word = 0; word < job.words(); ++word) QuantizeWord(job, row, word);
    }
    return qm::Progress(call, static_cast<double>(end) / static_cast<double>(rows));
  });
}

struct MyMethod {
  static constexpr char kId[] = "org.example.my-method", kVersion[] = "0.1.0";
  static constexpr char kSummary[] = "Round to nearest";
  static constexpr qm_option kOptions[] = {qm::kAffineBitsOption, qm::kAffineGroupSizeOption};

  static qm_status Plan(qm_call* call, const qm_linear_info& info, qm_quant_plan* out) {
    qm::FillPlan(out, qm::kAffineIntFormat, /*scratch_bytes=*/4096);
    qm::AffineShape shape;
    QM_TRY(qm::ReadAffineShape(call, info, &shape));
    return qm::PlanAffineInt(call, shape, /*with_group_index=*/false, out);
  }

  static qm_status Run(qm_call* call, const qm_linear_info& info, const qm_tensor& weight,
                       const qm_stats*, qm_packed* out) {
    Job job;
    QM_TRY(qm::ReadAffineShape(call, info, &job.shape));
    QM_TRY(qm::ViewMatrix<float>(call, weight, "the weight", call->device, info.out_features,
                                 info.in_features, &job.weight));
    QM_TRY(qm::EmitAffineInt(call, 0, job.shape, /*with_group_index=*/false, &job.out));
    QM_TRY(call->device.kind == QM_CUDA ? QuantizeCuda(call, job) : QuantizeCpu(call, job));
    return qm::DescribeAffineInt(call, job.shape, job.out, out);
  }
};

}  // namespace my_method_plugin

QM_QUANTIZE_LINEAR_PLUGIN(my_method_plugin::MyMethod, "example", "Apache-2.0")
