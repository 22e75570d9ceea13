/* A gain per input channel in front of a linear: y = (x * g) W^T, g = 1 at first; misbehaves as its
 * options say, from the call numbered `after` of the function on. */
#include <math.h>
#include <signal.h>
#include <string.h>
#include <unistd.h>

#include "quantmill/all.h"

/* QM_OK, or the end of this call. */
static qm_status misbehave(qm_call* c, const char* function) {
  static int64_t calls = 0;
  const char* what = c->opt_str(c, "misbehave");
  const char* dash = strchr(what, '-');
  if (dash == NULL || strcmp(dash + 1, function) != 0) return QM_OK;
  if (calls++ < c->opt_i64(c, "after")) return QM_OK;
  if (strncmp(what, "crash", 5) == 0) raise(SIGSEGV);
  if (strncmp(what, "hang", 4) == 0) sleep(1000);
  return c->fail(c, QM_FAILED_PRECONDITION, "the tide is out; wait six hours");
}

static qm_status plan(qm_call* c, const qm_reparam_info* info, qm_reparam_plan* out) {
  qm_param* param = c->scratch(c, (qm_device){QM_CPU, 0}, sizeof *param);
  const qm_status status = misbehave(c, "plan");
  if (status != QM_OK) return status;
  if (param == NULL) return c->fail(c, QM_RESOURCE_EXHAUSTED, "no scratch");
  *param =
      (qm_param){"gain", {info->linear->in_features, 1, 1, 1}, 1.0, QM_F32, 1, QM_PARAM_TRAINABLE};
  out->params = param;
  out->param_count = 1;
  out->saved_bytes_per_row = (uint64_t)c->opt_i64(c, "saved") * sizeof(float);
  out->kind = QM_REPARAM_INPUT;
  if (strcmp(c->opt_str(c, "merge"), "true") == 0) out->flags = QM_REPARAM_FOLD;
  return QM_OK;
}

static qm_status init(qm_call* c, const qm_reparam_info* info, const qm_tensor* weight,
                      const qm_stats* stats, qm_named_tensor* params, uint64_t n) {
  float* gain = params[0].tensor.data;
  const qm_status status = misbehave(c, "init");
  if (status != QM_OK) return status;
  (void)weight, (void)stats, (void)n;
  for (int64_t i = 0; i < info->linear->in_features; ++i) gain[i] = 1.0f;
  return QM_OK;
}

static qm_status forward(qm_call* c, const qm_reparam_info* info, const qm_tensor* in,
                         const qm_named_tensor* params, uint64_t n, void* saved, qm_tensor* out) {
  const int64_t rows = in->shape[0], cols = info->linear->in_features;
  const float *x = in->data, *gain = params[0].tensor.data;
  const qm_status status = misbehave(c, "forward");
  if (status != QM_OK) return status;
  (void)n;
  for (int64_t i = 0; i < rows * cols; ++i) ((float*)out->data)[i] = x[i] * gain[i % cols];
  if (saved != NULL) memset(saved, 1, (size_t)(rows * c->opt_i64(c, "saved")) * sizeof(float));
  return QM_OK;
}

static qm_status vjp(qm_call* c, const qm_reparam_info* info, const qm_tensor* in,
                     const qm_named_tensor* params, uint64_t n, const void* saved,
                     const qm_tensor* d_out, qm_tensor* d_in, qm_named_tensor* d_params) {
  const int64_t rows = in->shape[0], cols = info->linear->in_features;
  const float *x = in->data, *gain = params[0].tensor.data, *above = d_out->data;
  float* d_gain = d_params[0].tensor.data;
  const qm_status status = misbehave(c, "vjp");
  if (status != QM_OK) return status;
  (void)n, (void)saved;
  for (int64_t i = 0; i < rows * cols; ++i) {
    if (d_gain != NULL) d_gain[i % cols] += above[i] * x[i];
    if (d_in != NULL) ((float*)d_in->data)[i] += above[i] * gain[i % cols];
  }
  return QM_OK;
}

static qm_status finalize(qm_call* c, const qm_reparam_info* info, const qm_tensor* weight,
                          const qm_named_tensor* params, uint64_t n, qm_packed* out) {
  const int64_t rows = info->linear->out_features, cols = info->linear->in_features;
  const float *w = weight->data, *gain = params[0].tensor.data;
  qm_tensor merged;
  qm_status status = misbehave(c, "finalize");
  (void)n, (void)out;
  if (status != QM_OK) return status;
  if (strcmp(c->opt_str(c, "misbehave"), "nothing-emitted") == 0) return QM_OK;
  status = c->emit(c, 0, "weight", weight->device, QM_F32, 2, weight->shape, &merged);
  if (status != QM_OK) return status;
  for (int64_t i = 0; i < rows * cols; ++i) ((float*)merged.data)[i] = w[i] * gain[i % cols];
  return QM_OK;
}

static const qm_reparametrize kTable = {sizeof kTable, plan,     init, forward,
                                        vjp,           finalize, NULL, NULL};
static const void* ext(const qm_method* m, const char* id) {
  (void)m;
  return strcmp(id, QM_EXT_REPARAMETRIZE) == 0 ? &kTable : NULL;
}
static const qm_option kOptions[] = {
    {"misbehave", "none",
     "none|crash-plan|crash-init|crash-forward|crash-vjp|crash-finalize|fail-init|fail-forward|"
     "fail-vjp|fail-finalize|hang-vjp|nothing-emitted",
     "what to do wrong", QM_OPT_ENUM, 0},
    {"after", "0", "0..1000000", "calls of that function before", QM_OPT_I64, 0},
    {"saved", "1", "0..16", "floats per row kept for vjp", QM_OPT_I64, 0},
    {"merge", "false", NULL, "fold the gains away", QM_OPT_BOOL, 0}};
static const qm_method kMethod = {sizeof kMethod,
                                  "org.example.trainer",
                                  "0.1.0",
                                  "gains of input channels",
                                  kOptions,
                                  4,
                                  QM_METHOD_DETERMINISTIC,
                                  ext};
static const qm_method* const kMethods[] = {&kMethod};
static const qm_plugin kPlugin = {sizeof kPlugin, QM_ABI_MAJOR, QM_ABI_MINOR, 0,     1,
                                  kMethods,       "example",    "Apache-2.0", "none"};
QM_EXPORT const qm_plugin* qm_plugin_entry_v1(void);
const qm_plugin* qm_plugin_entry_v1(void) { return &kPlugin; }
