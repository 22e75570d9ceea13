/* Writing qm.fmt.affine-int/1 from C: the result tensors, a scale in its storage type, a code into
 * the bit stream.  For C++ and CUDA see affine_int.hpp, which gives the same bits. */
#ifndef QUANTMILL_SDK_AFFINE_INT_H_
#define QUANTMILL_SDK_AFFINE_INT_H_

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "quantmill/plugin.h"
#include "quantmill/quantize_linear.h"

/* Writes `scale` (>= 0) as element `index` of a tensor of type F16, BF16 or F32, rounded to
 * nearest, ties to even, but neither to 0 nor to infinity.  Returns the value written: choose codes
 * with it. */
static inline float qm_store_scale(void* data, qm_dtype dtype, int64_t index, float scale) {
  const int f16 = dtype == QM_F16;
  const float least = f16 ? 0x1p-24f : dtype == QM_BF16 ? 0x1p-133f : 0x1p-149f;
  const float most = f16 ? 65504.0f : dtype == QM_BF16 ? 0x1.fep127f : 0x1.fffffep127f;
  scale = fminf(fmaxf(scale, least), most);
  if (dtype != QM_F32) { /* steps of the type: 11 or 8 significant bits, none below `least` */
    int exponent;
    frexpf(scale, &exponent);
    const float step = fmaxf(ldexpf(1.0f, exponent - (f16 ? 11 : 8)), least);
    scale = rintf(scale / step) * step;
  }
  uint32_t bits;
  memcpy(&bits, &scale, sizeof bits);
  if (dtype == QM_F32) {
    ((float*)data)[index] = scale;
  } else if (dtype == QM_BF16) {
    ((uint16_t*)data)[index] = (uint16_t)(bits >> 16);
  } else if (scale < 0x1p-14f) { /* below the normal numbers of F16 */
    ((uint16_t*)data)[index] = (uint16_t)(scale * 0x1p24f);
  } else { /* the exponent is offset by 15 instead of 127 */
    ((uint16_t*)data)[index] = (uint16_t)((bits >> 13) - (112u << 10));
  }
  return scale;
}

/* Words of a row of `codes`. */
static inline int64_t qm_words_per_row(int64_t in_features, int64_t bits) {
  return (in_features * bits + 31) / 32;
}

/* Puts the code (< 2^bits) of input channel i into a row of `codes` that was 0 there. */
static inline void qm_put_code(int32_t* row, int64_t bits, int64_t i, uint32_t code) {
  const int64_t word = i * bits / 32, shift = i * bits % 32;
  row[word] = (int32_t)((uint32_t)row[word] | code << shift);
  if (shift + bits > 32) row[word + 1] = (int32_t)((uint32_t)row[word + 1] | code >> (32 - shift));
}

/* "{"bits":4,"group_size":128,"zero":"int"}" into `text`. */
static inline void qm_affine_json(int64_t bits, int64_t group_size, char* text, size_t size) {
  snprintf(text, size, "{\"bits\":%lld,\"group_size\":%lld,\"zero\":\"int\"}", (long long)bits,
           (long long)group_size);
}

/* Can `info` be cut into groups of `group_size` input channels (-1 = one group a row)?  QM_OK, or
 * an error that says what would do. */
static inline qm_status qm_affine_check(qm_call* call, const qm_linear_info* info,
                                        int64_t group_size) {
  char text[200];
  if (group_size == -1 || (group_size > 0 && info->in_features % group_size == 0)) return QM_OK;
  snprintf(
      text, sizeof text,
      "group_size %lld does not divide in_features %lld; use a divisor, or -1 for one group a row",
      (long long)group_size, (long long)info->in_features);
  return call->fail(call, QM_INVALID_ARGUMENT, text);
}

/* Emits codes (all 0), scale and zero of one linear on the CPU and describes them in *out, in this
 * order; zero points are whole numbers, one byte each.  Takes less than 1 kB of scratch. */
static inline qm_status qm_affine_emit(qm_call* call, const qm_linear_info* info, int64_t bits,
                                       int64_t group_size, qm_packed* out) {
  const int64_t rows = info->out_features, cols = info->in_features;
  const int64_t groups = group_size < 0 ? 1 : cols / group_size;
  const int64_t shapes[3][2] = {
      {rows, qm_words_per_row(cols, bits)}, {rows, groups}, {rows, groups}};
  const qm_dtype dtypes[3] = {QM_I32, info->scale_dtype, QM_U8};
  static const char* const kNames[3] = {"codes", "scale", "zero"};
  const qm_device host = {QM_CPU, 0};
  const size_t bytes = 3 * sizeof(qm_named_tensor), text_bytes = 96;
  qm_named_tensor* named = (qm_named_tensor*)call->scratch(call, host, bytes + text_bytes);
  if (named == NULL) {
    return call->fail(call, QM_RESOURCE_EXHAUSTED,
                      "no scratch memory for the result; raise run.memory");
  }
  for (int i = 0; i < 3; ++i) {
    named[i].name = kNames[i];
    const qm_status status =
        call->emit(call, 0, kNames[i], host, dtypes[i], 2, shapes[i], &named[i].tensor);
    if (status != QM_OK) return status;
  }
  memset(named[0].tensor.data, 0, (size_t)(shapes[0][0] * shapes[0][1]) * sizeof(int32_t));
  char* json = (char*)(named + 3);
  qm_affine_json(bits, group_size, json, text_bytes);
  out->format_id = "qm.fmt.affine-int/1";
  out->format_json = json;
  out->tensors = named;
  out->tensor_count = 3;
  out->out_features = rows;
  out->in_features = cols;
  return QM_OK;
}

/* Fills a plan that asks for no statistics and emits with qm_affine_emit; refuses a group size that
 * does not divide.  Takes 96 bytes of scratch. */
static inline qm_status qm_affine_plan(qm_call* call, const qm_linear_info* info, int64_t bits,
                                       int64_t group_size, qm_quant_plan* out) {
  const qm_device host = {QM_CPU, 0};
  const size_t text_bytes = 96;
  const double groups = group_size < 0 ? 1.0 : (double)info->in_features / (double)group_size;
  const double scale_bits = info->scale_dtype == QM_F32 ? 32.0 : 16.0;
  out->stats = NULL;
  out->stat_count = 0;
  out->scratch_bytes = 1024;
  out->scratch_bytes_shared = 0;
  out->format_id = "qm.fmt.affine-int/1";
  out->flops = 0;
  const qm_status status = qm_affine_check(call, info, group_size);
  if (status != QM_OK) return status;
  if (out->struct_size < offsetof(qm_quant_plan, bits_per_weight) + sizeof(double)) return QM_OK;
  char* json = (char*)call->scratch(call, host, text_bytes);
  if (json == NULL)
    return call->fail(call, QM_RESOURCE_EXHAUSTED, "no scratch memory for the plan");
  qm_affine_json(bits, group_size, json, text_bytes);
  out->format_json = json;
  out->bits_per_weight =
      (32.0 * (double)qm_words_per_row(info->in_features, bits) + (scale_bits + 8.0) * groups) /
      (double)info->in_features;
  return QM_OK;
}

#endif /* QUANTMILL_SDK_AFFINE_INT_H_ */
