// The formats' parameters and checks.
#include <cmath>
#include <cstring>

#include "row8.h"

namespace eetq {
namespace {

qm_status ReadTensor(qm_call* call, const qm_packed& packed, const char* name,
                     const qm_tensor** out) {
  for (uint64_t i = 0; i < packed.tensor_count; ++i) {
    if (std::strcmp(packed.tensors[i].name, name) != 0) continue;
    *out = &packed.tensors[i].tensor;
    if (IsContiguous(**out)) return QM_OK;
    return qm::Fail(call, QM_INVALID_ARGUMENT, "tensor '", name, "' must be contiguous");
  }
  return qm::Fail(call, QM_INVALID_ARGUMENT, "a weight of ", packed.format_id, " has no tensor '",
                  name, "'");
}

}  // namespace

const char* FormatId(const Params& params) {
  return params.code == Code::kInt8 ? qm::kInt8RowFormat : qm::kFloat8Format;
}

std::string ParamsJson(const Params& params) {
  if (params.code == Code::kInt8) return params.activations ? "{\"activations\":\"int8\"}" : "{}";
  return qm::StrCat("{", params.activations ? "\"activations\":\"fp8\"," : "", "\"dtype\":\"",
                    params.code == Code::kE4M3 ? "e4m3" : "e5m2", "\",\"scale\":\"",
                    params.per_tensor ? "tensor" : "channel", "\"}");
}

qm_dtype CodeDType(Code code) {
  return code == Code::kInt8 ? QM_I8 : code == Code::kE4M3 ? QM_F8_E4M3 : QM_F8_E5M2;
}

bool ParseParams(const char* format_id, const char* json, Params* out) {
  for (const Code code : {Code::kInt8, Code::kE4M3, Code::kE5M2}) {
    for (const bool per_tensor : {false, true}) {
      for (const bool activations : {false, true}) {
        const Params params = {code, per_tensor, activations};
        if ((code == Code::kInt8 && per_tensor) || (code == Code::kE5M2 && activations)) continue;
        if (std::strcmp(FormatId(params), format_id) != 0 || ParamsJson(params) != json) continue;
        *out = params;
        return true;
      }
    }
  }
  return false;
}

qm_status ReadWeight(qm_call* call, const qm_packed& packed, Weight* out) {
  Weight w;
  if (!ParseParams(packed.format_id, packed.format_json, &w.params)) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "format '", packed.format_id, "' with parameters '",
                    packed.format_json, "' is not known here; expected ", qm::kInt8RowFormat,
                    " with {} or {\"activations\":\"int8\"}, or ", qm::kFloat8Format,
                    " with e.g. {\"dtype\":\"e4m3\",\"scale\":\"channel\"}");
  }
  w.out = packed.out_features;
  w.in = packed.in_features;
  if (w.out < 1 || w.in < 1) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "features [", w.out, ", ", w.in,
                    "] must be positive");
  }
  const qm_tensor *codes, *scale;
  QM_TRY(ReadTensor(call, packed, "codes", &codes));
  QM_TRY(ReadTensor(call, packed, "scale", &scale));
  if (packed.tensor_count != 2) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "a weight of ", packed.format_id, " has ",
                    packed.tensor_count, " tensors instead of codes and scale");
  }
  if (codes->dtype != CodeDType(w.params.code) || codes->rank != 2 || codes->shape[0] != w.out ||
      codes->shape[1] != w.in) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "tensor 'codes' of a weight of ", packed.format_id,
                    " must be [", w.out, ", ", w.in, "] of dtype code ", CodeDType(w.params.code));
  }
  const int64_t scales = w.params.per_tensor ? 1 : w.out;
  const bool is_float = scale->dtype == QM_F16 || scale->dtype == QM_BF16 || scale->dtype == QM_F32;
  if (!is_float || scale->rank != 1 || scale->shape[0] != scales) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "tensor 'scale' of a weight of ", packed.format_id,
                    " must be [", scales, "] of F16, BF16 or F32");
  }
  w.codes = static_cast<const uint8_t*>(codes->data);
  w.scale = scale->data;
  w.scale_dtype = scale->dtype;
  *out = w;
  return QM_OK;
}

qm_status CheckValues(qm_call* call, const Weight& w) {
  for (int64_t i = 0; i < (w.params.per_tensor ? 1 : w.out); ++i) {
    const float scale = qm::LoadScale(w.scale, w.scale_dtype, i);
    if (!std::isfinite(scale) || scale <= 0) {
      return qm::Fail(call, QM_INVALID_ARGUMENT, "scale ", i, " is ", scale,
                      "; scales must be positive and finite");
    }
  }
  if (w.params.code == Code::kInt8) return QM_OK;
  const int largest = w.params.code == Code::kE4M3 ? 0x7E : 0x7B;
  for (int64_t i = 0; i < w.out * w.in; ++i) {
    if ((w.codes[i] & 0x7F) > largest) {
      return qm::Fail(call, QM_INVALID_ARGUMENT, "the code of row ", i / w.in, ", column ",
                      i % w.in, " is ", static_cast<int>(w.codes[i]),
                      ", which stands for no finite number");
    }
  }
  return QM_OK;
}

bool IsContiguous(const qm_tensor& tensor) {
  int64_t expected = 1;
  for (int d = tensor.rank - 1; d >= 0; --d) {
    if (tensor.shape[d] > 1 && tensor.stride[d] != expected) return false;
    expected *= tensor.shape[d];
  }
  return true;
}

}  // namespace eetq
