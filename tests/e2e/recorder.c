/* Writes the statistics it is given and the weights it makes to files, for a test to compare with
 * sums of its own. Rounds to seven levels per row, so that what is quantized moves what follows. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "quantmill/all.h"

static qm_status plan(qm_call* c, const qm_linear_info* li, qm_quant_plan* out) {
  (void)li;
  static const qm_stat_request kStats[] = {{QM_STAT_HESSIAN, 0, QM_F32, 0},
                                           {QM_STAT_CROSS, 0, QM_F32, 0}};
  out->stats = kStats;
  out->stat_count = c->opt_i64(c, "cross") ? 2 : 1;
  out->format_id = "qm.fmt.affine-int/1";
  return QM_OK;
}

/* DIRECTORY/LAYER.WHAT: plain f32 values. */
static qm_status record(qm_call* c, const char* layer, const char* what, const float* values,
                        int64_t count) {
  char path[4096];
  snprintf(path, sizeof path, "%s/%s.%s", c->opt_str(c, "directory"), layer, what);
  FILE* file = fopen(path, "wb");
  if (file == NULL) return c->fail(c, QM_INTERNAL, "cannot create a record; give a directory");
  const size_t written = fwrite(values, sizeof *values, (size_t)count, file);
  if (fclose(file) != 0 || written != (size_t)count) {
    return c->fail(c, QM_INTERNAL, "cannot write a record; is the disk full?");
  }
  return QM_OK;
}

static qm_status run(qm_call* c, const qm_linear_info* li, const qm_tensor* w, const qm_stats* s,
                     qm_packed* out) {
  const int64_t n = li->out_features, k = li->in_features, words = (k + 3) / 4;
  for (uint64_t i = 0; i < s->count; ++i) {
    const qm_status st =
        record(c, li->name, s->items[i].name, (const float*)s->items[i].tensor.data, k * k);
    if (st) return st;
  }
  qm_tensor codes, scale;
  qm_status st = c->emit(c, 0, "codes", w->device, QM_I32, 2, (int64_t[]){n, words}, &codes);
  if (st) return st;
  st = c->emit(c, 0, "scale", w->device, QM_F32, 2, (int64_t[]){n, 1}, &scale);
  if (st) return st;
  float* made = c->scratch(c, w->device, (uint64_t)(n * k) * sizeof *made);
  qm_named_tensor* t = c->scratch(c, w->device, 2 * sizeof *t);
  if (!made || !t) return c->fail(c, QM_RESOURCE_EXHAUSTED, "no scratch");
  memset(codes.data, 0, (size_t)(n * words) * 4);
  for (int64_t i = 0; i < n; ++i) {
    const float* row = (const float*)w->data + i * w->stride[0];
    float top = 0;
    for (int64_t j = 0; j < k; ++j) top = fmaxf(top, fabsf(row[j]));
    const float step = top > 0 ? top / 3.0f : 1.0f;
    ((float*)scale.data)[i] = step;
    uint8_t* bytes = (uint8_t*)codes.data + i * words * 4;
    for (int64_t j = 0; j < k; ++j) {
      const float level = rintf(row[j] / step);
      bytes[j] = (uint8_t)((int)level + 128);
      made[i * k + j] = level * step;
    }
  }
  st = record(c, li->name, "weight", made, n * k);
  if (st) return st;
  t[0].name = "codes", t[0].tensor = codes, t[1].name = "scale", t[1].tensor = scale;
  *out = (qm_packed){
      "qm.fmt.affine-int/1", "{\"bits\":8,\"group_size\":-1,\"zero\":\"none\"}", t, 2, n, k};
  return QM_OK;
}

static const qm_quantize_linear kQuantize = {sizeof kQuantize, plan, run, NULL};
static const void* ext(const qm_method* m, const char* id) {
  (void)m;
  return strcmp(id, QM_EXT_QUANTIZE_LINEAR) == 0 ? &kQuantize : NULL;
}
static const qm_option kOptions[] = {
    {"directory", ".", NULL, "where records go", QM_OPT_STR, 0},
    {"cross", "false", NULL, "ask for cross as well", QM_OPT_BOOL, 0},
    {"sequential", "false", NULL, "measure again after each group", QM_OPT_BOOL, 0},
    {"inputs", "run", "run|quantized|original", "whose inputs", QM_OPT_ENUM, 0}};
static const qm_method kMethod = {sizeof kMethod,
                                  "org.example.recorder",
                                  "0.1.0",
                                  "records what it is given",
                                  kOptions,
                                  4,
                                  QM_METHOD_DETERMINISTIC,
                                  ext};
static const qm_method* const kMethods[] = {&kMethod};
static const qm_plugin kPlugin = {sizeof kPlugin, QM_ABI_MAJOR, QM_ABI_MINOR, 0,     1,
                                  kMethods,       "example",    "Apache-2.0", "none"};
QM_EXPORT const qm_plugin* qm_plugin_entry_v1(void);
const qm_plugin* qm_plugin_entry_v1(void) { return &kPlugin; }
