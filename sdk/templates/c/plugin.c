/* my-method: round to nearest with a scale and a zero point per group.  A whole plugin in C.
 * Begin with find_range: it decides which values the weights of a group can take. */
#include <math.h>
#include <string.h>

#include "quantmill/quantize_linear.h"
#include "quantmill/sdk/affine_int.h"

static const qm_option kOptions[] = {
    {"bits", "4", "2|3|4|8", "Width of a code in bits.", QM_OPT_I64, 0},
    {"group_size", "128", "-1..1048576", "Inputs that share a scale; -1 = all.", QM_OPT_I64, 0}};

/* The range that the codes of a group cover; 0 lies inside. */
static void find_range(const float* w, int64_t n, float* low, float* high) {
  *low = *high = 0;
  for (int64_t i = 0; i < n; ++i) *low = fminf(*low, w[i]), *high = fmaxf(*high, w[i]);
  if (*low == *high) *low = -1, *high = 1;
}

static qm_status plan(qm_call* c, const qm_linear_info* info, qm_quant_plan* out) {
  if (c->device.kind != QM_CPU)
    return c->fail(c, QM_FAILED_PRECONDITION, "my-method has no GPU code; use device cpu");
  return qm_affine_plan(c, info, c->opt_i64(c, "bits"), c->opt_i64(c, "group_size"), out);
}

static qm_status run(qm_call* c, const qm_linear_info* info, const qm_tensor* weight,
                     const qm_stats* stats, qm_packed* out) {
  (void)stats; /* none were asked for */
  if (weight->stride[1] != 1) return c->fail(c, QM_INVALID_ARGUMENT, "rows must be contiguous");
  const int64_t bits = c->opt_i64(c, "bits"), size = c->opt_i64(c, "group_size");
  qm_status status = qm_affine_check(c, info, size);
  if (status == QM_OK) status = qm_affine_emit(c, info, bits, size, out);
  if (status != QM_OK) return status;
  const int64_t rows = info->out_features, cols = info->in_features;
  const int64_t n = size < 0 ? cols : size, words = qm_words_per_row(cols, bits);
  int32_t* codes = out->tensors[0].tensor.data;
  uint8_t* zeros = out->tensors[2].tensor.data;
  const float top = (float)((1 << bits) - 1);
  for (int64_t g = 0; g < rows * cols / n; ++g) {
    const int64_t row = g * n / cols, first = g * n % cols; /* group g begins there */
    const float* w = (const float*)weight->data + row * weight->stride[0] + first;
    for (int64_t i = 0; i < n; ++i)
      if (!isfinite(w[i])) return c->fail(c, QM_INVALID_ARGUMENT, "a weight is NaN or infinite");
    float low, high;
    find_range(w, n, &low, &high);
    const float scale =
        qm_store_scale(out->tensors[1].tensor.data, info->scale_dtype, g, (high - low) / top);
    const float zero = fminf(rintf(-low / scale), top);
    zeros[g] = (uint8_t)zero;
    for (int64_t i = 0; i < n; ++i) {
      const float code = fminf(fmaxf(rintf(w[i] / scale) + zero, 0), top);
      qm_put_code(codes + row * words, bits, first + i, (uint32_t)code);
    }
    if (first == 0 && c->progress(c, (double)row / (double)rows)) return QM_CANCELLED;
  }
  return QM_OK;
}

static const qm_quantize_linear kQuantize = {sizeof kQuantize, plan, run, NULL};
static const void* ext(const qm_method* m, const char* id) {
  return (void)m, strcmp(id, QM_EXT_QUANTIZE_LINEAR) == 0 ? &kQuantize : NULL;
}
static const qm_method kMethod = {sizeof kMethod,
                                  "org.example.my-method",
                                  "0.1.0",
                                  "Round to nearest",
                                  kOptions,
                                  2,
                                  QM_METHOD_DETERMINISTIC,
                                  ext};
static const qm_method* const kMethods[] = {&kMethod};
static const qm_plugin kPlugin = {sizeof kPlugin, QM_ABI_MAJOR, QM_ABI_MINOR, 0,          1,
                                  kMethods,       "example",    "Apache-2.0", __VERSION__};
QM_EXPORT const qm_plugin* qm_plugin_entry_v1(void);
const qm_plugin* qm_plugin_entry_v1(void) { return &kPlugin; }
