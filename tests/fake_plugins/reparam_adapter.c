/* y = (x * (1 + alpha * gain)) W^T with gain = 0 at first, described to other tools as an adapter
 * of type GAIN. Right as it stands; a macro makes one thing of the description wrong. */
#include <stdio.h>
#include <string.h>

#include "quantmill/all.h"

static qm_status plan(qm_call* c, const qm_reparam_info* info, qm_reparam_plan* out) {
  qm_param* param = c->scratch(c, (qm_device){QM_CPU, 0}, sizeof *param);
  if (param == NULL) return c->fail(c, QM_RESOURCE_EXHAUSTED, "no scratch");
  *param =
      (qm_param){"gain", {info->linear->in_features, 1, 1, 1}, 1.0, QM_F32, 1, QM_PARAM_TRAINABLE};
  out->params = param;
  out->param_count = 1;
  out->kind = QM_REPARAM_INPUT;
  return QM_OK;
}

static qm_status init(qm_call* c, const qm_reparam_info* info, const qm_tensor* weight,
                      const qm_stats* stats, qm_named_tensor* params, uint64_t n) {
  (void)c, (void)weight, (void)stats, (void)n;
  memset(params[0].tensor.data, 0, (size_t)info->linear->in_features * sizeof(float));
  return QM_OK;
}

static qm_status forward(qm_call* c, const qm_reparam_info* info, const qm_tensor* in,
                         const qm_named_tensor* params, uint64_t n, void* saved, qm_tensor* out) {
  const float *x = in->data, *gain = params[0].tensor.data;
  const float alpha = (float)c->opt_f64(c, "alpha");
  const int64_t cols = info->linear->in_features;
  (void)n, (void)saved;
  for (int64_t i = 0; i < in->shape[0] * cols; ++i) {
    ((float*)out->data)[i] = x[i] * (1.0f + alpha * gain[i % cols]);
  }
  return QM_OK;
}

static qm_status vjp(qm_call* c, const qm_reparam_info* info, const qm_tensor* in,
                     const qm_named_tensor* params, uint64_t n, const void* saved,
                     const qm_tensor* d_out, qm_tensor* d_in, qm_named_tensor* d_params) {
  const float *x = in->data, *gain = params[0].tensor.data, *above = d_out->data;
  const float alpha = (float)c->opt_f64(c, "alpha");
  const int64_t cols = info->linear->in_features;
  float* d_gain = d_params[0].tensor.data;
  (void)n, (void)saved;
  for (int64_t i = 0; i < in->shape[0] * cols; ++i) {
    if (d_gain != NULL) d_gain[i % cols] += above[i] * alpha * x[i];
    if (d_in != NULL) ((float*)d_in->data)[i] += above[i] * (1.0f + alpha * gain[i % cols]);
  }
  return QM_OK;
}

static qm_status to_adapter(qm_call* c, const char* target, const char** config_json) {
  double alpha = c->opt_f64(c, "alpha");
  char* text = c->scratch(c, (qm_device){QM_CPU, 0}, 128);
  if (text == NULL) return c->fail(c, QM_RESOURCE_EXHAUSTED, "no scratch");
  if (strcmp(target, "peft") != 0) return c->fail(c, QM_UNIMPLEMENTED, "no such target; use peft");
#ifdef FORGETS_ALPHA
  alpha = 2.0;
#endif
#if defined(NOT_JSON)
  snprintf(text, 128, "alpha = %.17g", alpha);
#elif defined(NO_TYPE)
  snprintf(text, 128, "{\"alpha\":%.17g}", alpha);
#else
  snprintf(text, 128, "{\"alpha\":%.17g,\"peft_type\":\"GAIN\"}", alpha);
#endif
  *config_json = text;
  return QM_OK;
}

static qm_status from_adapter(qm_call* c, const char* target, const char* config_json,
                              const char** options_json) {
  const size_t length = strlen(config_json);
  double alpha = 2.0;
  const char* name = "alpha";
  char* text = c->scratch(c, (qm_device){QM_CPU, 0}, 128);
  if (text == NULL) return c->fail(c, QM_RESOURCE_EXHAUSTED, "no scratch");
  if (strcmp(target, "peft") != 0) return c->fail(c, QM_UNIMPLEMENTED, "no such target; use peft");
#ifndef TAKES_BROKEN
  if (length < 2 || config_json[0] != '{' || config_json[length - 1] != '}') {
    return c->fail(c, QM_INVALID_ARGUMENT, "no JSON object; name a directory of an adapter");
  }
#endif
#ifndef TAKES_ALL
  if (length > 2 && strstr(config_json, "\"GAIN\"") == NULL) {
    return c->fail(c, QM_UNIMPLEMENTED, "no adapter of type GAIN");
  }
#endif
  const char* found = strstr(config_json, "\"alpha\":");
  if (found != NULL && sscanf(found, "\"alpha\":%lf", &alpha) != 1) {
#ifdef TAKES_TYPES
    *options_json = "{\"alpha\":\"null\"}";
    return QM_OK;
#endif
    return c->fail(c, QM_INVALID_ARGUMENT, "alpha is no number; write one");
  }
#ifdef DROPS_ALPHA
  alpha = 2.0;
#endif
#ifdef UNKNOWN_OPTION
  name = "alfa";
#endif
  snprintf(text, 128, "{\"%s\":\"%.17g\"}", name, alpha);
  *options_json = text;
  return QM_OK;
}

static const qm_reparametrize kTable = {sizeof kTable, plan, init,       forward,
                                        vjp,           NULL, to_adapter, from_adapter};
static const void* ext(const qm_method* m, const char* id) {
  (void)m;
  return strcmp(id, QM_EXT_REPARAMETRIZE) == 0 ? &kTable : NULL;
}
static const qm_option kOptions[] = {
    {"alpha", "2", NULL, "factor on the trained gains", QM_OPT_F64, 0}};
static const qm_method kMethod = {sizeof kMethod,
                                  "org.example.adapter",
                                  "1.0.0",
                                  "a gain per input channel, as an adapter",
                                  kOptions,
                                  1,
                                  QM_METHOD_DETERMINISTIC,
                                  ext};
static const qm_method* const kMethods[] = {&kMethod};
static const qm_plugin kPlugin = {sizeof kPlugin, QM_ABI_MAJOR, QM_ABI_MINOR, 0,     1,
                                  kMethods,       "example",    "Apache-2.0", "none"};
QM_EXPORT const qm_plugin* qm_plugin_entry_v1(void);
const qm_plugin* qm_plugin_entry_v1(void) { return &kPlugin; }
