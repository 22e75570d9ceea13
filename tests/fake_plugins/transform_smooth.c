/* Scales the channels behind every norm by the square root of their largest input, so that outliers
 * lie in the weights' columns less coarsely rounded. Right as it stands; a macro makes one thing
 * wrong. */
#include <math.h>
#include <string.h>

#include "quantmill/all.h"

static const qm_stat_request kStats[] = {{QM_STAT_ABSMAX, 0, QM_F32, 0}};

static qm_status plan(qm_call* c, const qm_block_info* info, qm_quant_plan* out) {
  (void)c, (void)info;
  out->stats = kStats;
  out->stat_count = 1;
  return QM_OK;
}

/* The linear of that name, or -1. */
static int64_t find(const qm_block_info* info, const char* name) {
  for (uint64_t i = 0; i < info->linear_count; ++i) {
    if (strcmp(info->linears[i]->name, name) == 0) return (int64_t)i;
  }
  return -1;
}

static float* value(qm_call* c, qm_edit* edit, int32_t rank, int64_t rows, int64_t cols) {
  qm_tensor* t = &edit->value;
  memset(t, 0, sizeof *t);
  t->data = c->scratch(c, (qm_device){QM_CPU, 0}, (uint64_t)(rows * cols) * sizeof(float));
  t->dtype = QM_F32;
  t->rank = rank;
  t->device = (qm_device){QM_CPU, 0};
  t->shape[0] = rows;
  t->shape[1] = cols;
  t->shape[2] = t->shape[3] = 1;
  t->stride[0] = cols;
  t->stride[1] = rank == 2 ? 1 : 0;
  return t->data;
}

static qm_status run(qm_call* c, const qm_block_info* info, const qm_stats* const* stats,
                     const qm_edit** edits, uint64_t* count) {
  qm_edit* list = c->scratch(c, (qm_device){QM_CPU, 0}, (info->site_count + 1) * sizeof *list);
  if (list == NULL) return c->fail(c, QM_RESOURCE_EXHAUSTED, "no scratch");
  memset(list, 0, (info->site_count + 1) * sizeof *list);
  *count = 0;
  for (uint64_t s = 0; s < info->site_count; ++s) {
    const qm_scale_site* site = &info->sites[s];
    const int64_t reader = find(info, site->consumers[0].name);
    if (find(info, site->producer) >= 0 || reader < 0) continue;
    qm_edit* edit = &list[(*count)++];
    const float* most = stats[reader]->items[0].tensor.data;
    float* scale = value(c, edit, 1, site->channels, 1);
    if (scale == NULL) return c->fail(c, QM_RESOURCE_EXHAUSTED, "no scratch");
    for (int64_t i = 0; i < site->channels; ++i) scale[i] = sqrtf(most[i] > 0.0f ? most[i] : 1.0f);
    edit->kind = QM_EDIT_SCALE;
    edit->target = site->id;
#ifdef UNKNOWN_TARGET
    edit->target = "model.layers.0.no_such_site";
#endif
#ifdef ZERO_SCALE
    scale[3] = 0.0f;
#endif
#ifdef TINY_SCALE
    scale[3] = 1e-39f;
#endif
#ifdef RESTLESS
    static int runs = 0;
    scale[3] *= 1.0f + 1e-3f * (float)++runs;
#endif
  }
#ifdef CLIPS_HARD
  qm_edit* edit = &list[(*count)++]; /* list holds one more than there are sites */
  const int64_t last = (int64_t)info->linear_count - 1;
  float* bound = value(c, edit, 2, info->linears[last]->out_features, 1);
  for (int64_t i = 0; i < info->linears[last]->out_features; ++i) bound[i] = 0.01f;
  edit->kind = QM_EDIT_CLIP;
  edit->target = info->linears[last]->name;
#endif
#if defined(ROTATES) || defined(SHEARS)
  for (uint64_t s = 0; s < info->site_count; ++s) {
    if ((info->sites[s].flags & QM_SITE_ROTATABLE) == 0) continue;
    qm_edit* edit = &list[(*count)++];
    const int64_t n = info->sites[s].channels;
    float* matrix = value(c, edit, 2, n, n);
    for (int64_t i = 0; i < n * n; ++i) matrix[i] = i % (n + 1) == 0 ? 1.0f : 0.0f;
#ifdef SHEARS
    matrix[1] = 0.5f;
#else
    matrix[0] = matrix[n + 1] = 0.6f;
    matrix[1] = 0.8f;
    matrix[n] = -0.8f;
#endif
    edit->kind = QM_EDIT_ROTATE;
    edit->target = info->sites[s].id;
  }
#endif
  *edits = list;
  return QM_OK;
}

static const qm_block_transform kTable = {sizeof kTable, plan, run};
static const void* ext(const qm_method* m, const char* id) {
  (void)m;
  return strcmp(id, QM_EXT_BLOCK_TRANSFORM) == 0 ? &kTable : NULL;
}
static const qm_method kMethod = {sizeof kMethod,
                                  "org.example.smooth",
                                  "1.0.0",
                                  "scales outlier channels",
                                  NULL,
                                  0,
                                  QM_METHOD_DETERMINISTIC,
                                  ext};
static const qm_method* const kMethods[] = {&kMethod};
static const qm_plugin kPlugin = {sizeof kPlugin, QM_ABI_MAJOR, QM_ABI_MINOR, 0,     1,
                                  kMethods,       "example",    "Apache-2.0", "none"};
QM_EXPORT const qm_plugin* qm_plugin_entry_v1(void);
const qm_plugin* qm_plugin_entry_v1(void) { return &kPlugin; }
