/* Scales every site by factors that follow from the seed, clips if asked, uses the block service,
 * and misbehaves as its option says. A second method rounds to int8 per row besides. */
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
  const int64_t bits = c->opt_i64(c, "expect_bits");
  for (uint64_t l = 0; l < b->linear_count && bits >= 0; ++l) {
    if (b->next_roundings[l].bits != bits) return c->fail(c, QM_INTERNAL, "other bits are next");
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

static qm_status round_plan(qm_call* c, const qm_linear_info* li, qm_quant_plan* out) {
  (void)c, (void)li;
  out->format_id = "qm.fmt.affine-int/1";
  return QM_OK;
}

static qm_status round_run(qm_call* c, const qm_linear_info* li, const qm_tensor* w,
                           const qm_stats* s, qm_packed* out) {
  (void)s;
  const int64_t n = li->out_features, k = li->in_features, words = (k + 3) / 4;
  qm_tensor codes, scale;
  qm_status st = c->emit(c, 0, "codes", w->device, QM_I32, 2, (int64_t[]){n, words}, &codes);
  if (st) return st;
  st = c->emit(c, 0, "scale", w->device, QM_F32, 2, (int64_t[]){n, 1}, &scale);
  if (st) return st;
  memset(codes.data, 0, (size_t)(n * words) * 4);
  for (int64_t i = 0; i < n; ++i) {
    const float* row = (const float*)w->data + i * w->stride[0];
    float top = 1e-6f;
    for (int64_t j = 0; j < k; ++j) top = fmaxf(top, fabsf(row[j]));
    ((float*)scale.data)[i] = top / 127.0f;
    uint8_t* bytes = (uint8_t*)codes.data + i * words * 4;
    for (int64_t j = 0; j < k; ++j) bytes[j] = (uint8_t)(lrintf(row[j] / top * 127.0f) + 128);
  }
  qm_named_tensor* t = c->scratch(c, w->device, 2 * sizeof *t);
  if (!t) return c->fail(c, QM_RESOURCE_EXHAUSTED, "no scratch");
  t[0].name = "codes", t[0].tensor = codes, t[1].name = "scale", t[1].tensor = scale;
  *out = (qm_packed){
      "qm.fmt.affine-int/1", "{\"bits\":8,\"group_size\":-1,\"zero\":\"none\"}", t, 2, n, k};
  return QM_OK;
}

static const qm_block_transform kTransform = {sizeof kTransform, plan, run};
static const qm_quantize_linear kQuantize = {sizeof kQuantize, round_plan, round_run, NULL};
static const void* ext(const qm_method* m, const char* id) {
  if (strcmp(id, QM_EXT_BLOCK_TRANSFORM) == 0) return &kTransform;
  const int rounds = strcmp(m->id, "org.example.transformer.rounding") == 0;
  return rounds && strcmp(id, QM_EXT_QUANTIZE_LINEAR) == 0 ? &kQuantize : NULL;
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
    {"service", "false", NULL, "run the block", QM_OPT_BOOL, 0},
    {"expect_bits", "-1", "-1..8", "of the rounding that comes next; -1 = any", QM_OPT_I64, 0},
    {"bits", "8", "8", "of the rounding method", QM_OPT_I64, 0}};
static const qm_method kMethod = {sizeof kMethod,
                                  "org.example.transformer",
                                  "0.1.0",
                                  "scales and clips",
                                  kOptions,
                                  8,
                                  QM_METHOD_DETERMINISTIC,
                                  ext};
static const qm_method kRounding = {sizeof kRounding,
                                    "org.example.transformer.rounding",
                                    "0.1.0",
                                    "scales, clips and rounds",
                                    kOptions,
                                    8,
                                    QM_METHOD_DETERMINISTIC,
                                    ext};
static const qm_method* const kMethods[] = {&kMethod, &kRounding};
static const qm_plugin kPlugin = {sizeof kPlugin, QM_ABI_MAJOR, QM_ABI_MINOR, 0,     2,
                                  kMethods,       "example",    "Apache-2.0", "none"};
QM_EXPORT const qm_plugin* qm_plugin_entry_v1(void);
const qm_plugin* qm_plugin_entry_v1(void) { return &kPlugin; }
