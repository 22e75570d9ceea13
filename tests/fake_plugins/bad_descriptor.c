/* A descriptor with one thing wrong, chosen by a macro. */
#include <string.h>

#include "quantmill/all.h"

static qm_status plan(qm_call* c, const qm_linear_info* li, qm_quant_plan* out) {
  (void)c, (void)li, (void)out;
  return QM_UNIMPLEMENTED;
}
static const qm_quantize_linear kQuantize = {
#ifdef SHORT_TABLE
    16,
#else
    sizeof kQuantize,
#endif
    plan, NULL, NULL};

__attribute__((unused)) static const void* ext(const qm_method* m, const char* id) {
  (void)m;
#ifdef SHORT_TABLE
  if (strcmp(id, QM_EXT_QUANTIZE_LINEAR) == 0) return &kQuantize;
#else
  (void)kQuantize, (void)id;
#endif
  return NULL;
}
static const qm_option kOptions[] = {{"bits",
#ifdef BAD_DEFAULT
                                      "5",
#else
                                      "4",
#endif
                                      "2|3|4|8", "bits per code", QM_OPT_I64, 0}};
static const qm_method kMethod = {sizeof kMethod,
#if defined(NULL_ID)
                                  NULL,
#elif defined(BAD_ID)
                                  "Bad Id",
#else
    "bad",
#endif
                                  "1.0.0",
#ifdef BAD_TEXT
                                  "not UTF-8: \xff",
#elif defined OVERLONG_TEXT
                                  "two bytes written as three: \xe0\x92\x93",
#else
                                  "summary",
#endif
                                  kOptions,
#ifdef MANY_OPTIONS
                                  UINT64_C(0xffffffffffff),
#else
                                  1,
#endif
                                  0,
#ifdef NULL_EXT
                                  NULL
#else
                                  ext
#endif
};
__attribute__((unused)) static const qm_method* const kMethods[] = {&kMethod};
static const qm_plugin kPlugin = {
#ifdef SHORT_STRUCT
    24,
#else
    sizeof kPlugin,
#endif
#ifdef WRONG_MAJOR
    QM_ABI_MAJOR + 1,
#else
    QM_ABI_MAJOR,
#endif
    QM_ABI_MINOR + 7,
#ifdef NEWER_MINOR
    QM_ABI_MINOR + 7,
#else
    0,
#endif
#ifdef MANY_METHODS
    0x7fffffff,
#else
    1,
#endif
#ifdef NULL_METHODS
    NULL,
#else
    kMethods,
#endif
#ifdef NULL_VENDOR
    NULL,
#else
    "example",
#endif
    "Apache-2.0",
    "none"};
QM_EXPORT const qm_plugin* qm_plugin_entry_v1(void);
const qm_plugin* qm_plugin_entry_v1(void) {
#ifdef NULL_DESCRIPTOR
  (void)kPlugin;
  return NULL;
#else
  return &kPlugin;
#endif
}
