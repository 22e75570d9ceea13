#include "options.h"

#include <algorithm>
#include <cstdio>

namespace quantmill::aqlm {
namespace {

qm_status ReadScheme(qm_call* call, Params* out) {
  const std::string scheme(qm::OptionStr(call, "scheme"));
  char tail = 0;
  const int read = std::sscanf(scheme.c_str(), "%dx%d%c", &out->codebooks, &out->index_bits, &tail);
  if (read != 2 || qm::StrCat(out->codebooks, "x", out->index_bits) != scheme ||
      out->codebooks < 1 || out->codebooks > 16 || out->index_bits < 1 || out->index_bits > 16) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "scheme '", scheme,
                    "' is not MxB with 1 to 16 codebooks and indices of 1 to 16 bits; use 2x8, ",
                    "1x16 or 1x8");
  }
  return QM_OK;
}

}  // namespace

qm_status ReadOptions(qm_call* call, const qm_linear_info& info, Options* out) {
  QM_TRY(ReadScheme(call, &out->params));
  const int64_t group = qm::OptionI64(call, "group_size");
  if (group < 1 || group > kMaxGroup || info.in_features < 1 || info.out_features < 1 ||
      info.in_features % group != 0) {
    std::string sizes;
    for (int64_t size = 4; size <= 32; size *= 2) {
      if (info.in_features % size == 0) sizes += qm::StrCat(sizes.empty() ? "" : ", ", size);
    }
    return qm::Fail(call, QM_INVALID_ARGUMENT, "group_size ", group,
                    " does not divide in_features ", info.in_features, "; use ",
                    sizes.empty() ? "1" : sizes, ", or leave the layer dense");
  }
  out->params.group_size = static_cast<int32_t>(group);
  out->out = info.out_features;
  out->in = info.in_features;
  out->tolerance = qm::OptionF64(call, "tolerance");
  const int64_t beam = qm::OptionI64(call, "beam"), steps = qm::OptionI64(call, "steps");
  if (!(out->tolerance >= 0 && out->tolerance <= 0.5)) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "tolerance ", out->tolerance,
                    " is outside 0 .. 0.5");
  }
  if (beam < 1 || beam > kMaxBeam) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "beam ", beam, " is outside 1 .. ", kMaxBeam);
  }
  if (steps < 0 || steps > 10000) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "steps ", steps, " is outside 0 .. 10000");
  }
  const int64_t panel_codes = out->panel_groups() * out->params.codebooks;
  if (beam > 1 && beam * panel_codes > kMaxBeamCodes) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "beam ", beam, " with ", out->params.codebooks,
                    " codebooks and groups of ", group, " is too large; use a beam of at most ",
                    std::max<int64_t>(1, kMaxBeamCodes / panel_codes));
  }
  out->beam = static_cast<int32_t>(beam);
  out->steps = static_cast<int32_t>(steps);
  if (!IsFloat(info.scale_dtype)) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "scale dtype code ", info.scale_dtype,
                    " cannot hold codebooks; use F16, BF16 or F32");
  }
  out->value_dtype = info.scale_dtype;
  return QM_OK;
}

qm_status MakeKernels(qm_call* call, const Options& options, std::unique_ptr<Kernels>* out) {
  if (call->device.kind == QM_CPU) {
    *out = MakeCpuKernels(call, options);
    return QM_OK;
  }
#if defined(QM_HAVE_CUDA)
  if (call->device.kind == QM_CUDA) {
    *out = MakeCudaKernels(call, options);
    return QM_OK;
  }
#endif
  return qm::Fail(call, QM_FAILED_PRECONDITION,
                  "this build of aqlm has no CUDA kernels; use device cpu");
}

}  // namespace quantmill::aqlm
