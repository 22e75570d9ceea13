/* y = x W^T + (x A^T) B^T with A [4, in], B [out, 4], B = 0 at first: a low-rank adapter. */
#include <string.h>

#include "quantmill/all.h"

enum { kRank = 4 };

static qm_status plan(qm_call* c, const qm_reparam_info* info, qm_reparam_plan* out) {
  qm_param* params = c->scratch(c, (qm_device){QM_CPU, 0}, 2 * sizeof *params);
  if (params == NULL) return c->fail(c, QM_RESOURCE_EXHAUSTED, "no scratch");
  params[0] =
      (qm_param){"a", {kRank, info->linear->in_features, 1, 1}, 1.0, QM_F32, 2, QM_PARAM_TRAINABLE};
  params[1] = (qm_param){
      "b", {info->linear->out_features, kRank, 1, 1}, 1.0, QM_F32, 2, QM_PARAM_TRAINABLE};
  out->params = params;
  out->param_count = 2;
  out->saved_bytes_per_row = kRank * sizeof(float);
  out->kind = QM_REPARAM_DELTA;
  return QM_OK;
}

static qm_status init(qm_call* c, const qm_reparam_info* info, const qm_tensor* weight,
                      const qm_stats* stats, qm_named_tensor* params, uint64_t n) {
  float* a = params[0].tensor.data;
  uint64_t state = c->seed;
  (void)weight, (void)stats, (void)n;
  for (int64_t i = 0; i < kRank * info->linear->in_features; ++i) {
    state = state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    a[i] = (float)(int32_t)(state >> 32) * 0x1p-34f;
  }
  memset(params[1].tensor.data, 0, (size_t)(info->linear->out_features * kRank) * sizeof(float));
  return QM_OK;
}

static qm_status forward(qm_call* c, const qm_reparam_info* info, const qm_tensor* in,
                         const qm_named_tensor* params, uint64_t n, void* saved, qm_tensor* out) {
  const int64_t rows = in->shape[0], k = info->linear->in_features, m = info->linear->out_features;
  const float *x = in->data, *a = params[0].tensor.data, *b = params[1].tensor.data;
  float *y = out->data, middle[kRank];
  (void)c, (void)n;
  for (int64_t r = 0; r < rows; ++r) {
    for (int j = 0; j < kRank; ++j) {
      float sum = 0.0f;
      for (int64_t i = 0; i < k; ++i) sum += x[r * k + i] * a[j * k + i];
      middle[j] = sum;
    }
    if (saved != NULL) memcpy((float*)saved + r * kRank, middle, sizeof middle);
    for (int64_t o = 0; o < m; ++o) {
      float sum = 0.0f;
      for (int j = 0; j < kRank; ++j) sum += middle[j] * b[o * kRank + j];
      y[r * m + o] = sum;
    }
  }
  return QM_OK;
}

static qm_status vjp(qm_call* c, const qm_reparam_info* info, const qm_tensor* in,
                     const qm_named_tensor* params, uint64_t n, const void* saved,
                     const qm_tensor* d_out, qm_tensor* d_in, qm_named_tensor* d_params) {
  const int64_t rows = in->shape[0], k = info->linear->in_features, m = info->linear->out_features;
  const float *x = in->data, *a = params[0].tensor.data, *b = params[1].tensor.data;
  const float *above = d_out->data, *middle = saved;
  float *d_a = d_params[0].tensor.data, *d_b = d_params[1].tensor.data;
  (void)c, (void)n;
  for (int64_t r = 0; r < rows; ++r) {
    for (int j = 0; j < kRank; ++j) {
      float d_middle = 0.0f;
      for (int64_t o = 0; o < m; ++o) {
        d_middle += above[r * m + o] * b[o * kRank + j];
        if (d_b != NULL) d_b[o * kRank + j] += above[r * m + o] * middle[r * kRank + j];
      }
      for (int64_t i = 0; i < k; ++i) {
        if (d_a != NULL) d_a[j * k + i] += d_middle * x[r * k + i];
        if (d_in != NULL) ((float*)d_in->data)[r * k + i] += d_middle * a[j * k + i];
      }
    }
  }
  return QM_OK;
}

static qm_status finalize(qm_call* c, const qm_reparam_info* info, const qm_tensor* weight,
                          const qm_named_tensor* params, uint64_t n, qm_packed* out) {
  const int64_t k = info->linear->in_features, m = info->linear->out_features;
  const float *w = weight->data, *a = params[0].tensor.data, *b = params[1].tensor.data;
  qm_tensor merged;
  qm_status status = c->emit(c, 0, "weight", weight->device, QM_F32, 2, weight->shape, &merged);
  (void)n, (void)out;
  if (status != QM_OK) return status;
  for (int64_t o = 0; o < m; ++o) {
    for (int64_t i = 0; i < k; ++i) {
      float sum = w[o * k + i];
      for (int j = 0; j < kRank; ++j) sum += b[o * kRank + j] * a[j * k + i];
      ((float*)merged.data)[o * k + i] = sum;
    }
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
                                  "org.example.low-rank",
                                  "1.0.0",
                                  "a low-rank adapter",
                                  NULL,
                                  0,
                                  QM_METHOD_DETERMINISTIC,
                                  ext};
static const qm_method* const kMethods[] = {&kMethod};
static const qm_plugin kPlugin = {sizeof kPlugin, QM_ABI_MAJOR, QM_ABI_MINOR, 0,     1,
                                  kMethods,       "example",    "Apache-2.0", "none"};
QM_EXPORT const qm_plugin* qm_plugin_entry_v1(void);
const qm_plugin* qm_plugin_entry_v1(void) { return &kPlugin; }
