/* A plugin with nothing wrong in its descriptor; its functions are never called. */
#include <string.h>

#include "quantmill/all.h"

static qm_status plan(qm_call* c, const qm_linear_info* li, qm_quant_plan* out) {
  (void)li, (void)out;
  return c->fail(c, QM_UNIMPLEMENTED, "this plugin only describes itself");
}
static qm_status run(qm_call* c, const qm_linear_info* li, const qm_tensor* w, const qm_stats* s,
                     qm_packed* out) {
  (void)li, (void)w, (void)s, (void)out;
  return c->fail(c, QM_UNIMPLEMENTED, "this plugin only describes itself");
}
static const qm_quantize_linear kQuantize = {sizeof kQuantize, plan, run, NULL};

static qm_status check(qm_call* c, const qm_packed* packed) {
  (void)packed;
  return c->fail(c, QM_UNIMPLEMENTED, "this plugin only describes itself");
}
static qm_status can_store(qm_call* c, const char* target, const char* json, int64_t n, int64_t k) {
  (void)target, (void)json, (void)n, (void)k;
  return c->fail(c, QM_UNIMPLEMENTED, "this plugin only describes itself");
}
static qm_status to(qm_call* c, const char* target, const char* layer, const qm_packed* packed,
                    const qm_named_tensor** out, uint64_t* count, const char** json) {
  (void)target, (void)layer, (void)packed, (void)out, (void)count, (void)json;
  return c->fail(c, QM_UNIMPLEMENTED, "this plugin only describes itself");
}
static qm_status from(qm_call* c, const char* target, const char* layer, const qm_named_tensor* in,
                      uint64_t count, const char* json, qm_packed* out) {
  (void)target, (void)layer, (void)in, (void)count, (void)json, (void)out;
  return c->fail(c, QM_UNIMPLEMENTED, "this plugin only describes itself");
}
static const char* const kTargets[] = {"good-target"};
static const qm_format kFormat = {
    sizeof kFormat, "org.example.fmt.good/1", kTargets, 1, 0, check, can_store, to, from};

static const void* ext(const qm_method* m, const char* id) {
  (void)m;
  if (strcmp(id, QM_EXT_QUANTIZE_LINEAR) == 0) return &kQuantize;
  if (strcmp(id, QM_EXT_FORMAT) == 0) return &kFormat;
  return NULL;
}
static const qm_option kOptions[] = {
    {"bits", "4", "2|3|4|8", "bits per code", QM_OPT_I64, 0},
    {"damp", "0.01", "0..1", "share of the mean diagonal", QM_OPT_F64, 0},
    {"mode", "fast", "fast|slow", "how to search", QM_OPT_ENUM, 0},
    {"note", NULL, NULL, "free text", QM_OPT_STR, 0}};
static const qm_method kMethod = {sizeof kMethod,
                                  "org.example.good",
                                  "1.2.3",
                                  "does nothing",
                                  kOptions,
                                  4,
                                  QM_METHOD_DETERMINISTIC,
                                  ext};
static const qm_method* const kMethods[] = {&kMethod};
static const qm_plugin kPlugin = {sizeof kPlugin, QM_ABI_MAJOR, QM_ABI_MINOR, 0,     1,
                                  kMethods,       "example",    "Apache-2.0", "none"};
QM_EXPORT const qm_plugin* qm_plugin_entry_v1(void);
const qm_plugin* qm_plugin_entry_v1(void) { return &kPlugin; }
