#include "codebook_format.h"

#include <cmath>
#include <cstdio>

namespace quantmill::aqlm {
namespace {

qm_status CheckTensor(qm_call* call, const qm_packed& packed, const char* name,
                      std::initializer_list<int64_t> shape, std::initializer_list<qm_dtype> dtypes,
                      const qm_tensor** out) {
  const qm_tensor* tensor = FindTensor(packed.tensors, packed.tensor_count, name);
  if (tensor == nullptr) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "additive-codebook weight has no tensor '", name,
                    "'");
  }
  bool known = false;
  for (const qm_dtype dtype : dtypes) known = known || tensor->dtype == dtype;
  bool same = tensor->rank == static_cast<int32_t>(shape.size()) && IsContiguous(*tensor);
  std::string text;
  int axis = 0;
  for (const int64_t extent : shape) {
    same = same && tensor->shape[axis++] == extent;
    text += qm::StrCat(text.empty() ? "[" : ", ", extent);
  }
  if (!known || !same) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "tensor '", name, "' of an additive-codebook ",
                    "weight with parameters ", packed.format_json, " must be contiguous, ", text,
                    "], and of a dtype the format allows there (this one has code ", tensor->dtype,
                    ")");
  }
  *out = tensor;
  return QM_OK;
}

qm_status CheckNames(qm_call* call, const qm_packed& packed) {
  for (uint64_t i = 0; i < packed.tensor_count; ++i) {
    const std::string_view name = packed.tensors[i].name;
    if (name != "codes" && name != "codebooks" && name != "scales") {
      return qm::Fail(call, QM_INVALID_ARGUMENT, "additive-codebook weight has a tensor '", name,
                      "'");
    }
    for (uint64_t j = 0; j < i; ++j) {
      if (name != packed.tensors[j].name) continue;
      return qm::Fail(call, QM_INVALID_ARGUMENT, "additive-codebook weight has two tensors '", name,
                      "'");
    }
  }
  return QM_OK;
}

}  // namespace

bool ParseParams(const char* json, Params* out, std::string* why) {
  Params p;
  char tail = 0;
  const int read = std::sscanf(json, "{\"codebooks\":%d,\"group_size\":%d,\"index_bits\":%d%c",
                               &p.codebooks, &p.group_size, &p.index_bits, &tail);
  if (read != 4 || ParamsJson(p) != json) {
    *why = "not in canonical form";
  } else if (p.codebooks < 1 || p.codebooks > 16) {
    *why = "codebooks must be 1..16";
  } else if (p.group_size < 1 || p.group_size > 1024) {
    *why = "group_size must be 1..1024";
  } else if (p.index_bits < 1 || p.index_bits > 16) {
    *why = "index_bits must be 1..16";
  } else {
    *out = p;
    return true;
  }
  *why = qm::StrCat("additive-codebook parameters '", json, "': ", *why,
                    "; expected e.g. {\"codebooks\":2,\"group_size\":8,\"index_bits\":8}");
  return false;
}

std::string ParamsJson(const Params& params) {
  return qm::StrCat("{\"codebooks\":", params.codebooks, ",\"group_size\":", params.group_size,
                    ",\"index_bits\":", params.index_bits, "}");
}

double BitsPerWeight(const Params& params, int64_t out, int64_t in, qm_dtype value_dtype) {
  const double code_bits = 8.0 * static_cast<double>(qm::ElementSize(params.code_dtype()));
  const double value_bits = 8.0 * static_cast<double>(qm::ElementSize(value_dtype));
  const double weights = static_cast<double>(out) * static_cast<double>(in);
  return code_bits * params.codebooks / params.group_size +
         value_bits * static_cast<double>(params.values() + out) / weights;
}

const qm_tensor* FindTensor(const qm_named_tensor* tensors, uint64_t count, const char* name) {
  for (uint64_t i = 0; i < count; ++i) {
    if (std::strcmp(tensors[i].name, name) == 0) return &tensors[i].tensor;
  }
  return nullptr;
}

bool IsContiguous(const qm_tensor& tensor) {
  int64_t expected = 1;
  for (int d = tensor.rank - 1; d >= 0; --d) {
    if (tensor.shape[d] != 1 && tensor.stride[d] != expected) return false;
    expected *= tensor.shape[d];
  }
  return true;
}

qm_status ReadWeight(qm_call* call, const qm_packed& packed, Weight* out) {
  if (std::strcmp(packed.format_id, kFormatName) != 0) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "weight has format '", packed.format_id,
                    "'; this plugin knows ", kFormatName);
  }
  std::string why;
  if (!ParseParams(packed.format_json, &out->params, &why)) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, why);
  }
  const Params& p = out->params;
  out->out = packed.out_features;
  out->in = packed.in_features;
  if (out->out < 1 || out->in < 1 || out->in % p.group_size != 0) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "additive-codebook weight has features [", out->out,
                    ", ", out->in, "]; both must be positive, the second a multiple of group_size ",
                    p.group_size);
  }
  QM_TRY(CheckNames(call, packed));
  const qm_tensor *codes, *codebooks, *scales;
  QM_TRY(CheckTensor(call, packed, "codes", {out->out, out->groups(), p.codebooks},
                     {p.code_dtype()}, &codes));
  QM_TRY(CheckTensor(call, packed, "codebooks", {p.codebooks, p.length(), p.group_size},
                     {QM_F16, QM_BF16, QM_F32}, &codebooks));
  QM_TRY(CheckTensor(call, packed, "scales", {out->out}, {QM_F16, QM_BF16, QM_F32}, &scales));
  out->codes = codes->data;
  out->codebooks = codebooks->data;
  out->scales = scales->data;
  out->codebook_dtype = codebooks->dtype;
  out->scale_dtype = scales->dtype;
  return QM_OK;
}

qm_status CheckValues(qm_call* call, const Weight& w) {
  const Params& p = w.params;
  const int64_t codes = w.out * w.groups() * p.codebooks;
  for (int64_t i = 0; i < codes && p.index_bits != 8 && p.index_bits != 16; ++i) {
    const int32_t code = p.index_bits <= 8 ? static_cast<const int8_t*>(w.codes)[i]
                                           : static_cast<const int16_t*>(w.codes)[i];
    if (code >= -p.length() / 2 && code < p.length() / 2) continue;
    return qm::Fail(call, QM_INVALID_ARGUMENT, "code ", i, " is ", code, "; with ", p.index_bits,
                    " bits codes are ", -p.length() / 2, "..", p.length() / 2 - 1);
  }
  for (int64_t i = 0; i < p.values(); ++i) {
    if (std::isfinite(LoadValue(w.codebooks, w.codebook_dtype, i))) continue;
    return qm::Fail(call, QM_INVALID_ARGUMENT, "value ", i, " of 'codebooks' is not finite");
  }
  for (int64_t i = 0; i < w.out; ++i) {
    if (std::isfinite(LoadValue(w.scales, w.scale_dtype, i))) continue;
    return qm::Fail(call, QM_INVALID_ARGUMENT, "value ", i, " of 'scales' is not finite");
  }
  return QM_OK;
}

float RoundToDType(float value, qm_dtype dtype) {
  if (dtype == QM_F16) {
    constexpr float kLargest = 65504.0f;
    value = value > kLargest ? kLargest : value < -kLargest ? -kLargest : value;
    return qm::ToFloat(qm::ToF16(value));
  }
  if (dtype == QM_BF16) {
    constexpr float kLargest = 0x1.fep127f;
    value = value > kLargest ? kLargest : value < -kLargest ? -kLargest : value;
    return qm::ToFloat(qm::ToBF16(value));
  }
  return value;
}

}  // namespace quantmill::aqlm
