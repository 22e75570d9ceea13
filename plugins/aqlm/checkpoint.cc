// Checkpoints of the aqlm package (Vahe1994/AQLM: inference_lib/src/aqlm/inference.py, utils.py).
// Codes and codebooks are ours with other extents of 1: codebooks [M, 2^B, 1, d], scales
// [out, 1, 1, 1].
#include "codebook_format.h"

namespace quantmill::aqlm {
namespace {

qm_status CheckTarget(qm_call* call, const char* target) {
  if (std::strcmp(target, kTargets[0]) == 0) return QM_OK;
  return qm::Fail(call, QM_FAILED_PRECONDITION,
                  "codebooks can be stored as aqlm or quantmill, not ", "as ", target,
                  "; choose one of these formats");
}

// Emits a copy of `source` (host memory) with another shape.
qm_status EmitCopy(qm_call* call, const char* name, const qm_tensor& source,
                   std::initializer_list<int64_t> shape, qm_named_tensor* out) {
  int64_t count = qm::ElementSize(source.dtype);
  for (int d = 0; d < source.rank; ++d) count *= source.shape[d];
  out->name = name;
  QM_TRY(call->emit(call, 0, name, kHost, source.dtype, static_cast<int32_t>(shape.size()),
                    shape.begin(), &out->tensor));
  if (count > 0) std::memcpy(out->tensor.data, source.data, static_cast<size_t>(count));
  return QM_OK;
}

qm_status Need(qm_call* call, const char* layer, const qm_named_tensor* tensors, uint64_t count,
               const char* name, int32_t rank, const qm_tensor** out) {
  const qm_tensor* tensor = FindTensor(tensors, count, name);
  if (tensor == nullptr) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "layer ", layer, " has no tensor '", name, "'");
  }
  if (tensor->rank != rank || !IsContiguous(*tensor)) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "tensor '", name, "' of layer ", layer, " has ",
                    tensor->rank, " dimensions; expected ", rank);
  }
  *out = tensor;
  return QM_OK;
}

}  // namespace

qm_status CanStore(qm_call* call, const char* target, const char* format_json, int64_t out,
                   int64_t in) {
  QM_TRY(CheckTarget(call, target));
  Params params;
  std::string why;
  if (!ParseParams(format_json, &params, &why)) {
    return qm::Fail(call, QM_FAILED_PRECONDITION, why);
  }
  if (out < 1 || in < 1 || in % params.group_size != 0) {
    return qm::Fail(call, QM_FAILED_PRECONDITION, "group_size ", params.group_size,
                    " does not divide in_features ", in);
  }
  return QM_OK;
}

qm_status ToCheckpoint(qm_call* call, const char* target, const char* layer,
                       const qm_packed& packed, const qm_named_tensor** out, uint64_t* count,
                       const char** config_json) {
  (void)layer;
  QM_TRY(CheckTarget(call, target));
  Weight w;
  QM_TRY(ReadWeight(call, packed, &w));
  qm_named_tensor* named = nullptr;
  QM_TRY(qm::Scratch(call, kHost, 3, "the result", &named));
  const auto find = [&](const char* name) {
    return *FindTensor(packed.tensors, packed.tensor_count, name);
  };
  const Params& p = w.params;
  QM_TRY(EmitCopy(call, "codes", find("codes"), {w.out, w.groups(), p.codebooks}, &named[0]));
  QM_TRY(EmitCopy(call, "codebooks", find("codebooks"), {p.codebooks, p.length(), 1, p.group_size},
                  &named[1]));
  QM_TRY(EmitCopy(call, "scales", find("scales"), {w.out, 1, 1, 1}, &named[2]));
  *out = named;
  *count = 3;
  return qm::ScratchString(call, ParamsJson(p), "the configuration", config_json);
}

qm_status FromCheckpoint(qm_call* call, const char* target, const char* layer,
                         const qm_named_tensor* tensors, uint64_t count, const char* config_json,
                         qm_packed* out) {
  QM_TRY(CheckTarget(call, target));
  Params p;
  std::string why;
  if (!ParseParams(config_json, &p, &why)) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "layer ", layer, ": ", why);
  }
  const qm_tensor *codes, *codebooks, *scales;
  QM_TRY(Need(call, layer, tensors, count, "codes", 3, &codes));
  QM_TRY(Need(call, layer, tensors, count, "codebooks", 4, &codebooks));
  QM_TRY(Need(call, layer, tensors, count, "scales", 4, &scales));
  // The length of the codebooks is what readers go by; the shapes must agree with the config.
  if (codebooks->shape[0] != p.codebooks || codebooks->shape[1] != p.length() ||
      codebooks->shape[2] != 1 || codebooks->shape[3] != p.group_size ||
      codes->shape[2] != p.codebooks || codes->dtype != p.code_dtype() ||
      scales->shape[0] != codes->shape[0] || scales->shape[1] * scales->shape[2] != 1 ||
      scales->shape[3] != 1 || !IsFloat(codebooks->dtype) || !IsFloat(scales->dtype)) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "codes, codebooks and scales of layer ", layer,
                    " have shapes or dtypes that do not fit the parameters ", config_json);
  }
  qm_named_tensor* named = nullptr;
  QM_TRY(qm::Scratch(call, kHost, 3, "the result", &named));
  const int64_t rows = codes->shape[0], groups = codes->shape[1];
  QM_TRY(EmitCopy(call, "codes", *codes, {rows, groups, p.codebooks}, &named[0]));
  QM_TRY(
      EmitCopy(call, "codebooks", *codebooks, {p.codebooks, p.length(), p.group_size}, &named[1]));
  QM_TRY(EmitCopy(call, "scales", *scales, {rows}, &named[2]));
  const char* json = nullptr;
  QM_TRY(qm::ScratchString(call, ParamsJson(p), "the parameters", &json));
  *out = {kFormatName, json, named, 3, rows, groups * p.group_size};
  return QM_OK;
}

}  // namespace quantmill::aqlm
