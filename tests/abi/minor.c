/* The sample plugin as it would come from the headers of another minor, by macro:
 *   NEWER       built for the next minor, content with this one: every table is longer
 *   OLDER       its table ends before run_group; what lies behind must not be called
 *   NEEDS_NEWER built for the next minor and in need of it
 *   NEXT_HEADERS uses what the next minor appended (headers made by CMakeLists.txt), if it is there
 */
#define qm_plugin_entry_v1 sample_entry
#include "tests/abi/sample.c"
#undef qm_plugin_entry_v1

#include <stddef.h>

/* Stands where a longer table has its newest function, or behind a shorter one. */
static qm_status never(qm_call* c) {
  return c->fail(c, QM_INTERNAL, "a function beyond the host's minor was called");
}

#ifdef NEXT_HEADERS
/* What the host lacks is done without: no such text may end the run. */
static qm_status plan_next(qm_call* c, const qm_linear_info* li, qm_quant_plan* out) {
  qm_status st = plan(c, li, out);
  if (st) return st;
  if (QM_HAS(c, next_service)) return c->next_service(c);
  if (li->struct_size >= offsetof(qm_linear_info, next_fact) + sizeof li->next_fact)
    return c->fail(c, QM_INTERNAL, "qm_linear_info is longer than the host's");
  if (out->struct_size >= offsetof(qm_quant_plan, next_wish) + sizeof out->next_wish)
    return c->fail(c, QM_INTERNAL, "qm_quant_plan is longer than the host's");
  return QM_OK;
}
static const qm_quantize_linear kNextTable = {sizeof kNextTable, plan_next, run, run_group, never};
#define TABLE kNextTable
#elif defined(OLDER)
static const struct older_table {
  uint64_t struct_size;
  qm_status (*plan)(qm_call*, const qm_linear_info*, qm_quant_plan*);
  qm_status (*run)(qm_call*, const qm_linear_info*, const qm_tensor*, const qm_stats*, qm_packed*);
  qm_status (*behind)(qm_call*);
} kOlderTable = {offsetof(struct older_table, behind), plan, run, never};
#define TABLE kOlderTable
#else
static const struct newer_table {
  qm_quantize_linear now;
  qm_status (*behind)(qm_call*);
} kNewerTable = {{sizeof(struct newer_table), plan, run, run_group}, never};
#define TABLE kNewerTable
#endif

static const void* ext_minor(const qm_method* m, const char* id) {
  (void)m;
  return strcmp(id, QM_EXT_QUANTIZE_LINEAR) == 0 ? &TABLE : NULL;
}
static const struct newer_method {
  qm_method now;
  void* behind[4];
} kMinorMethod = {{
#ifdef OLDER
                      sizeof(qm_method),
#else
                      sizeof(struct newer_method),
#endif
                      "org.example.sample", "1.0.0", "rounds rows", kOptions,
                      sizeof kOptions / sizeof *kOptions, QM_METHOD_DETERMINISTIC, ext_minor},
                  {(void*)1, (void*)1, (void*)1, (void*)1}};
static const qm_method* const kMinorMethods[] = {&kMinorMethod.now};
static const struct newer_plugin {
  qm_plugin now;
  void* behind[4];
} kMinorPlugin = {{
#ifdef OLDER
                      sizeof(qm_plugin), QM_ABI_MAJOR, 0,
#else
                      sizeof(struct newer_plugin), QM_ABI_MAJOR, QM_ABI_MINOR + 1,
#endif
#ifdef NEEDS_NEWER
                      QM_ABI_MINOR + 1,
#else
                      0,
#endif
                      1, kMinorMethods, "example", "Apache-2.0", "none"},
                  {(void*)1, (void*)1, (void*)1, (void*)1}};

QM_EXPORT const qm_plugin* qm_plugin_entry_v1(void);
const qm_plugin* qm_plugin_entry_v1(void) { return &kMinorPlugin.now; }
