/* A gain per input channel: y = (x * g) W^T (KIND_WEIGHT: W_eff = W * g), g = 1 at first. Right as
 * it stands; a macro makes one thing wrong. */
#include <string.h>

#include "quantmill/all.h"

static qm_status plan(qm_call* c, const qm_reparam_info* info, qm_reparam_plan* out) {
  qm_param* param = c->scratch(c, (qm_device){QM_CPU, 0}, sizeof *param);
  if (param == NULL) return c->fail(c, QM_RESOURCE_EXHAUSTED, "no scratch");
  const char* name = "gain";
#ifdef BAD_NAME
  name = "gain.of.inputs";
#endif
#ifdef OTHER_PHASE
  if (info->phase == QM_PHASE_END_TO_END) name = "factor";
#endif
  *param =
      (qm_param){name, {info->linear->in_features, 1, 1, 1}, 1.0, QM_F32, 1, QM_PARAM_TRAINABLE};
  out->params = param;
  out->param_count = 1;
  out->saved_bytes_per_row = 4;
#ifdef KIND_WEIGHT
  out->kind = QM_REPARAM_WEIGHT;
#else
  out->kind = QM_REPARAM_INPUT;
#endif
  return QM_OK;
}

static qm_status init(qm_call* c, const qm_reparam_info* info, const qm_tensor* weight,
                      const qm_stats* stats, qm_named_tensor* params, uint64_t n) {
  float* gain = params[0].tensor.data;
  (void)c, (void)weight, (void)stats, (void)n;
  for (int64_t i = 0; i < info->linear->in_features; ++i) {
#ifdef NOT_IDENTITY
    gain[i] = 1.5f;
#else
    gain[i] = 1.0f;
#endif
  }
#ifdef RESTLESS_INIT
  static float inits = 0.0f;
  gain[0] += 1e-7f * inits++;
#endif
#ifdef NEEDS_WEIGHT
  if (weight == NULL) return c->fail(c, QM_INVALID_ARGUMENT, "no weight; hand one over");
#endif
  return QM_OK;
}

static qm_status forward(qm_call* c, const qm_reparam_info* info, const qm_tensor* in,
                         const qm_named_tensor* params, uint64_t n, void* saved, qm_tensor* out) {
  const int64_t rows = in->shape[0], cols = info->linear->in_features;
  const float *x = in->data, *gain = params[0].tensor.data;
  float *y = out->data, *kept = saved;
  float extra = 0.0f;
  (void)c, (void)n;
#ifdef IMPURE
  static float calls = 0.0f;
  extra = 1e-3f * calls++;
#endif
  for (int64_t r = 0; r < rows; ++r) {
#ifdef NEEDS_SAVED
    if (kept == NULL) return c->fail(c, QM_INTERNAL, "no room for what vjp needs");
#endif
    if (kept != NULL) kept[r] = x[r * cols];
    for (int64_t i = 0; i < cols; ++i) y[r * cols + i] = x[r * cols + i] * gain[i] + extra;
  }
#ifdef SAVES_TOO_MUCH
  kept[rows] = 1.0f;
#endif
  return QM_OK;
}

static qm_status vjp(qm_call* c, const qm_reparam_info* info, const qm_tensor* in,
                     const qm_named_tensor* params, uint64_t n, const void* saved,
                     const qm_tensor* d_out, qm_tensor* d_in, qm_named_tensor* d_params) {
  const int64_t rows = in->shape[0], cols = info->linear->in_features;
  const float *x = in->data, *gain = params[0].tensor.data, *above = d_out->data;
  float* d_gain = d_params[0].tensor.data;
  (void)c, (void)n, (void)saved;
#ifdef ALL_OR_NOTHING
  if (d_gain == NULL) return QM_OK;
#endif
#ifdef OVERWRITES
  memset(d_gain, 0, (size_t)cols * sizeof *d_gain);
#endif
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < cols; ++i) {
      const float d = above[r * cols + i];
#if defined(NEEDS_GRADIENT)
      d_gain[i] += d * x[r * cols + i];
#elif defined(WRONG_VJP)
      if (d_gain != NULL) d_gain[i] += 0.5f * d * x[r * cols + i];
#else
      if (d_gain != NULL) d_gain[i] += d * x[r * cols + i];
#endif
      if (d_in != NULL) ((float*)d_in->data)[r * cols + i] += d * gain[i];
    }
  }
  return QM_OK;
}

static qm_status finalize(qm_call* c, const qm_reparam_info* info, const qm_tensor* weight,
                          const qm_named_tensor* params, uint64_t n, qm_packed* out) {
  const int64_t rows = info->linear->out_features, cols = info->linear->in_features;
  const float *w = weight->data, *gain = params[0].tensor.data;
  qm_tensor merged;
  qm_status status = c->emit(c, 0, "weight", weight->device, QM_F32, 2, weight->shape, &merged);
  (void)n, (void)out;
  if (status != QM_OK) return status;
  for (int64_t i = 0; i < rows * cols; ++i) {
#ifdef WRONG_FINALIZE
    ((float*)merged.data)[i] = w[i] / gain[i % cols];
#else
    ((float*)merged.data)[i] = w[i] * gain[i % cols];
#endif
  }
  return QM_OK;
}

static const qm_reparametrize kTable = {sizeof kTable, plan,     init, forward,
                                        vjp,           finalize, NULL, NULL};
static const void* ext(const qm_method* m, const char* id) {
  (void)m;
  return strcmp(id, QM_EXT_REPARAMETRIZE) == 0 ? &kTable : NULL;
}
static const qm_method kMethod = {sizeof kMethod,
                                  "org.example.gain",
                                  "1.0.0",
                                  "a gain per input channel",
                                  NULL,
                                  0,
                                  QM_METHOD_DETERMINISTIC,
                                  ext};
static const qm_method* const kMethods[] = {&kMethod};
static const qm_plugin kPlugin = {sizeof kPlugin, QM_ABI_MAJOR, QM_ABI_MINOR, 0,     1,
                                  kMethods,       "example",    "Apache-2.0", "none"};
QM_EXPORT const qm_plugin* qm_plugin_entry_v1(void);
const qm_plugin* qm_plugin_entry_v1(void) { return &kPlugin; }
