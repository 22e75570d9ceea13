/* Scales every site by powers of two that follow from the seed, clips if asked, uses the block
 * service, and misbehaves as its option says. */
#include <math.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "quantmill/all.h"

static int is(qm_call* c, const char* what) {
  return strcmp(c->opt_str(c, "misbehave"), what) == 0;
}

static qm_status plan(qm_call* c, const qm_block_info* b, qm_quant_plan* out) {
  (void)b;
  static const qm_stat_request kStats[] = {{QM_STAT_ABSMEAN, 0, QM_F32, 0}};
  static const qm_stat_request kOriginal[] = {{QM_STAT_ABSMEAN, 0, QM_F32, QM_STAT_FROM_ORIGINAL}};
  if (is(c, "refuse")) return c->fail(c, QM_INVALID_ARGUMENT, "not this block; use another");
  if (is(c, "crash-in-plan")) raise(SIGSEGV);
  if (c->opt_i64(c, "statistics")) out->stats = kStats, out->stat_count = 1;
  if (c->opt_i64(c, "original")) out->stats = kOriginal, out->stat_count = 1;
  return QM_OK;
}

static qm_tensor host_tensor(void* data, int32_t rank, int64_t rows, int64_t columns) {
  qm_tensor t = {data, QM_F32, rank, {QM_CPU, 0}, {1, 1, 1, 1}, {0, 0, 0, 0}, 0, {0, 0}};
  t.shape[0] = rows;
  t.stride[0] = rank > 1 ? columns : 1;
  if (rank > 1) t.shape[1] = columns, t.stride[1] = 1;
  return t;
}

/* The loss of a trial with one weight replaced by itself must be 0. */
static qm_status use_service(qm_call* c, const qm_block_info* b) {
  const qm_host_block* host = c->host_ext(c, QM_HOST_BLOCK);
  if (!host) return c->fail(c, QM_FAILED_PRECONDITION, "no qm.host.block/1");
  char name[256];
  snprintf(name, sizeof name, "%s.weight", b->linears[0]->name);
  const qm_override same = {name, b->weights[0]};
  double loss = -1;
  qm_status status =
      host->loss(c, "", 0, host->sample_count(c), is(c, "bad-override") ? NULL : &same, 1, &loss);
  if (status) return status;
  if (loss != 0) return c->fail(c, QM_INTERNAL, "the block differs from itself");
  if (is(c, "bad-window")) return host->loss(c, "mlp", 99999, 1, NULL, 0, &loss);
  qm_tensor out;
  status = host->forward(c, 0, NULL, 0, &out);
  if (status) return status;
  return out.rank == 2 ? QM_OK : c->fail(c, QM_INTERNAL, "no output");
}

static qm_status run(qm_call* c, const qm_block_info* b, const qm_stats* const* stats,
                     const qm_edit** edits, uint64_t* count) {
  const int64_t clip = c->opt_i64(c, "clip");
  if (is(c, "crash")) raise(SIGSEGV);
  if (is(c, "fail")) return c->fail(c, QM_FAILED_PRECONDITION, "the tide is out; wait six hours");
  if (is(c, "slow")) {
    const struct timespec pause_time = {0, 150 * 1000 * 1000};
    nanosleep(&pause_time, NULL);
  }
  if ((c->opt_i64(c, "statistics") || c->opt_i64(c, "original")) && stats[0]->count != 1) {
    return c->fail(c, QM_INTERNAL, "the statistics are missing");
  }
  if (c->opt_i64(c, "service")) {
    const qm_status status = use_service(c, b);
    if (status) return status;
  }
  qm_edit* list =
      c->scratch(c, (qm_device){QM_CPU, 0}, (b->site_count + b->linear_count) * sizeof *list);
  if (!list) return c->fail(c, QM_RESOURCE_EXHAUSTED, "no scratch");
  memset(list, 0, (b->site_count + b->linear_count) * sizeof *list);
  uint64_t n = 0, random = c->seed;
  for (uint64_t s = 0; s < b->site_count && c->opt_i64(c, "scale"); ++s) {
    const int64_t channels = b->sites[s].channels;
    float* scale = c->scratch(c, (qm_device){QM_CPU, 0}, (uint64_t)channels * 4);
    for (int64_t i = 0; i < channels; ++i) {
      random = random * UINT64_C(6364136223846793005) + 1;
      scale[i] = ldexpf(1.0f + 0.4f * (float)(random >> 60) / 16.0f, (int)(random >> 62) - 1);
      if (is(c, "nan")) scale[i] = NAN;
      if (is(c, "zero")) scale[i] = 0;
      if (is(c, "huge")) scale[i] = i % 2 ? 1e38f : 1e-38f;
    }
    list[n].target = is(c, "unknown-site") ? "model.nowhere" : b->sites[s].id;
    list[n].value = host_tensor(scale, 1, is(c, "short") ? channels - 1 : channels, 1);
    list[n++].kind = is(c, "unknown-kind") ? 9 : is(c, "rotate") ? QM_EDIT_ROTATE : QM_EDIT_SCALE;
  }
  for (uint64_t l = 0; l < b->linear_count && clip; ++l) {
    const int64_t rows = b->linears[l]->out_features;
    float* limit = c->scratch(c, (qm_device){QM_CPU, 0}, (uint64_t)rows * 4);
    for (int64_t i = 0; i < rows; ++i) limit[i] = is(c, "negative") ? -1.0f : 0.05f;
    list[n].target = is(c, "foreign") ? "model.layers.0.mlp.down_proj" : b->linears[l]->name;
    list[n].value = host_tensor(limit, 2, rows, 1);
    list[n++].kind = QM_EDIT_CLIP;
  }
  if (is(c, "null-target")) list[0].target = NULL;
  if (is(c, "null-value")) list[0].value.data = NULL;
  *edits = is(c, "null-edits") ? NULL : list;
  *count = n;
  return QM_OK;
}

static const qm_block_transform kTransform = {sizeof kTransform, plan, run};
static const void* ext(const qm_method* m, const char* id) {
  (void)m;
  return strcmp(id, QM_EXT_BLOCK_TRANSFORM) == 0 ? &kTransform : NULL;
}
static const qm_option kOptions[] = {
    {"misbehave", "none",
     "none|refuse|crash-in-plan|crash|fail|slow|nan|zero|huge|unknown-site|short|unknown-kind|"
     "rotate|negative|foreign|null-target|null-value|null-edits|bad-override|bad-window",
     "what to do wrong", QM_OPT_ENUM, 0},
    {"scale", "true", NULL, "scale every site", QM_OPT_BOOL, 0},
    {"clip", "false", NULL, "clip every linear at 0.05", QM_OPT_BOOL, 0},
    {"statistics", "false", NULL, "ask for absmean", QM_OPT_BOOL, 0},
    {"original", "false", NULL, "ask for absmean of the untouched model", QM_OPT_BOOL, 0},
    {"service", "false", NULL, "run the block", QM_OPT_BOOL, 0}};
static const qm_method kMethod = {sizeof kMethod,
                                  "org.example.transformer",
                                  "0.1.0",
                                  "scales and clips",
                                  kOptions,
                                  6,
                                  QM_METHOD_DETERMINISTIC,
                                  ext};
static const qm_method* const kMethods[] = {&kMethod};
static const qm_plugin kPlugin = {sizeof kPlugin, QM_ABI_MAJOR, QM_ABI_MINOR, 0,     1,
                                  kMethods,       "example",    "Apache-2.0", "none"};
QM_EXPORT const qm_plugin* qm_plugin_entry_v1(void);
const qm_plugin* qm_plugin_entry_v1(void) { return &kPlugin; }
