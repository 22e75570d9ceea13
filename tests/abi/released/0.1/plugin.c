/* The sample plugin that every release keeps (scripts/abi_capsule): round to nearest, per output
 * row, in pure C; into the affine format, or into one of its own with a kernel. It uses each part
 * of the ABI that a quantizing plugin may use, and nothing that is not documented. */
#include <math.h>
#include <string.h>

#include "quantmill/all.h"

/* Own format: codes I8 [out, in], scale F32 [out]; w = scale * code. */
static const char kRows[] = "org.example.fmt.rows/1";

static const qm_stat_request kStats[] = {{QM_STAT_ABSMAX, 0, QM_F32, QM_STAT_OPTIONAL}};

static qm_status plan(qm_call* c, const qm_linear_info* li, qm_quant_plan* out) {
  if (c->opt_i64(c, "bits") == 4 && li->in_features % 8 != 0)
    return c->fail(c, QM_INVALID_ARGUMENT, "4 bits want a multiple of 8 inputs; use bits: 8");
  if (c->opt_i64(c, "statistics")) out->stats = kStats, out->stat_count = 1;
  out->scratch_bytes = 2 * sizeof(qm_named_tensor) + 512;
  const int own = strcmp(c->opt_str(c, "format"), "rows") == 0;
  if (own && c->opt_i64(c, "bits") != 8)
    return c->fail(c, QM_INVALID_ARGUMENT, "format rows holds 8 bits only");
  out->format_id = own ? kRows : "qm.fmt.affine-int/1";
  out->flops = 4.0 * (double)li->out_features * (double)li->in_features;
  return QM_OK;
}

typedef struct job {
  qm_call* call;
  const qm_tensor* weight;
  qm_tensor codes, scale;
  int64_t in, bits;
  double clip;
  int down, own;
} job;

/* Rows [begin, end): scale = clip * max |w| / qmax; codes in a little-endian bit stream. */
static qm_status rows(void* arg, int64_t begin, int64_t end, int32_t worker) {
  const job* j = arg;
  (void)worker;
  const int64_t qmax = (1 << (j->bits - 1)) - 1, stride = j->codes.shape[1] * (j->own ? 1 : 4);
  for (int64_t i = begin; i < end; ++i) {
    if (j->call->progress(j->call, -1)) return QM_CANCELLED;
    const float* row = (const float*)j->weight->data + i * j->weight->stride[0];
    float top = 0;
    for (int64_t k = 0; k < j->in; ++k) {
      const float w = row[k * j->weight->stride[1]];
      if (!isfinite(w)) return j->call->fail(j->call, QM_INVALID_ARGUMENT, "weight not finite");
      top = fmaxf(top, fabsf(w));
    }
    const float step = top > 0 ? (float)j->clip * top / (float)qmax : 1.0f;
    ((float*)j->scale.data)[i] = step;
    uint8_t* bytes = (uint8_t*)j->codes.data + i * stride;
    memset(bytes, 0, (size_t)stride);
    for (int64_t k = 0; k < j->in; ++k) {
      const float x = row[k * j->weight->stride[1]] / step;
      long q = j->down ? (long)floorf(x) : lrintf(x);
      q = q < -qmax ? -qmax : q > qmax ? qmax : q;
      if (!j->own) q += qmax + 1;
      bytes[k * j->bits / 8] |= (uint8_t)((uint8_t)q << (k * j->bits % 8));
    }
  }
  return QM_OK;
}

static qm_status one(qm_call* c, uint64_t item, const qm_linear_info* li, const qm_tensor* w,
                     const qm_stats* stats, qm_packed* out) {
  if (w->device.kind != QM_CPU || w->dtype != QM_F32 || w->rank != 2)
    return c->fail(c, QM_INVALID_ARGUMENT, "this sample wants rank-2 f32 weights on the CPU");
  if (c->opt_i64(c, "statistics")) {
    if (stats->count != 1 || strcmp(stats->items[0].name, QM_STAT_ABSMAX) != 0 ||
        stats->items[0].tensor.shape[0] != li->in_features || stats->row_count < 1)
      return c->fail(c, QM_INTERNAL, "the statistic is not what was asked for");
  }
  const int64_t bits = c->opt_i64(c, "bits"), n = li->out_features, k = li->in_features;
  job j = {.call = c, .weight = w, .in = k, .bits = bits, .clip = c->opt_f64(c, "clip")};
  j.down = strcmp(c->opt_str(c, "rounding"), "down") == 0;
  j.own = strcmp(c->opt_str(c, "format"), "rows") == 0;
  qm_status st = c->emit(c, item, "codes", w->device, j.own ? QM_I8 : QM_I32, 2,
                         (int64_t[]){n, j.own ? k : (k * bits + 31) / 32}, &j.codes);
  if (st) return st;
  st = c->emit(c, item, "scale", w->device, QM_F32, j.own ? 1 : 2, (int64_t[]){n, 1}, &j.scale);
  if (st) return st;
  const qm_host_threads* threads = c->host_ext(c, QM_HOST_THREADS);
  st =
      QM_HAS(threads, parallel_for) ? threads->parallel_for(c, n, 16, rows, &j) : rows(&j, 0, n, 0);
  if (st) return st;
  if (*c->opt_str(c, "note")) c->log(c, 1, c->opt_str(c, "note"));
  qm_named_tensor* t = c->scratch(c, w->device, 2 * sizeof *t);
  if (!t) return c->fail(c, QM_RESOURCE_EXHAUSTED, "no scratch for two tensors");
  t[0].name = "codes", t[0].tensor = j.codes, t[1].name = "scale", t[1].tensor = j.scale;
  *out = (qm_packed){j.own ? kRows : "qm.fmt.affine-int/1",
                     j.own       ? "{}"
                     : bits == 4 ? "{\"bits\":4,\"group_size\":-1,\"zero\":\"none\"}"
                                 : "{\"bits\":8,\"group_size\":-1,\"zero\":\"none\"}",
                     t,
                     2,
                     n,
                     k};
  return QM_OK;
}

static qm_status run(qm_call* c, const qm_linear_info* li, const qm_tensor* w, const qm_stats* s,
                     qm_packed* out) {
  return one(c, 0, li, w, s, out);
}

static qm_status run_group(qm_call* c, uint64_t count, const qm_linear_info* const* li,
                           const qm_tensor* w, const qm_stats* const* s, qm_packed* out) {
  qm_status st = QM_OK;
  for (uint64_t i = 0; i < count && st == QM_OK; ++i) st = one(c, i, li[i], &w[i], s[i], &out[i]);
  return st;
}

static const qm_quantize_linear kQuantize = {
    .struct_size = sizeof kQuantize, .plan = plan, .run = run, .run_group = run_group};

static const qm_tensor* find(const qm_packed* p, const char* name) {
  for (uint64_t i = 0; i < p->tensor_count; ++i)
    if (strcmp(p->tensors[i].name, name) == 0) return &p->tensors[i].tensor;
  return NULL;
}

static int32_t accepts(const char* format_id, const char* json, qm_device_kind device, int32_t sm,
                       qm_dtype activation) {
  (void)json, (void)sm;
  return strcmp(format_id, kRows) == 0 && device == QM_CPU && activation == QM_F32;
}

static qm_status dequantize(qm_call* c, const qm_packed* p, qm_tensor* weight) {
  if (weight->dtype != QM_F32) return c->fail(c, QM_UNIMPLEMENTED, "only f32 is offered");
  const int8_t* codes = find(p, "codes")->data;
  const float* scale = find(p, "scale")->data;
  for (int64_t i = 0; i < p->out_features * p->in_features; ++i)
    ((float*)weight->data)[i] = scale[i / p->in_features] * (float)codes[i];
  return QM_OK;
}

static uint64_t workspace_bytes(const qm_packed* p, int64_t max_rows) {
  (void)max_rows;
  return (uint64_t)p->in_features * sizeof(float);
}

/* One row of W at a time in the workspace. */
static qm_status matmul(qm_call* c, const qm_packed* p, const qm_tensor* x, void* workspace,
                        qm_tensor* y) {
  (void)c;
  const int8_t* codes = find(p, "codes")->data;
  const float* scale = find(p, "scale")->data;
  float* w = workspace;
  for (int64_t o = 0; o < p->out_features; ++o) {
    for (int64_t k = 0; k < p->in_features; ++k)
      w[k] = scale[o] * (float)codes[o * p->in_features + k];
    for (int64_t r = 0; r < x->shape[0]; ++r) {
      const float* row = (const float*)x->data + r * x->stride[0];
      float sum = 0;
      for (int64_t k = 0; k < p->in_features; ++k) sum += w[k] * row[k];
      ((float*)y->data)[r * y->stride[0] + o * y->stride[1]] = sum;
    }
  }
  return QM_OK;
}

static qm_status check(qm_call* c, const qm_packed* p) {
  const qm_tensor *codes = find(p, "codes"), *scale = find(p, "scale");
  if (p->tensor_count != 2 || !codes || !scale || codes->dtype != QM_I8 || codes->rank != 2 ||
      codes->shape[0] != p->out_features || codes->shape[1] != p->in_features ||
      scale->dtype != QM_F32 || scale->rank != 1 || scale->shape[0] != p->out_features)
    return c->fail(c, QM_INVALID_ARGUMENT, "rows wants codes I8 [out, in] and scale F32 [out]");
  return QM_OK;
}
static qm_status can_store(qm_call* c, const char* target, const char* json, int64_t n, int64_t k) {
  (void)target, (void)json, (void)n, (void)k;
  return c->fail(c, QM_FAILED_PRECONDITION, "rows is stored by quantmill alone");
}
static qm_status to(qm_call* c, const char* target, const char* layer, const qm_packed* p,
                    const qm_named_tensor** out, uint64_t* count, const char** json) {
  (void)target, (void)layer, (void)p, (void)out, (void)count, (void)json;
  return c->fail(c, QM_UNIMPLEMENTED, "rows is stored by quantmill alone");
}
static qm_status from(qm_call* c, const char* target, const char* layer, const qm_named_tensor* in,
                      uint64_t count, const char* json, qm_packed* out) {
  (void)target, (void)layer, (void)in, (void)count, (void)json, (void)out;
  return c->fail(c, QM_UNIMPLEMENTED, "rows is stored by quantmill alone");
}

static const qm_linear_kernel kKernel = {.struct_size = sizeof kKernel,
                                         .accepts = accepts,
                                         .dequantize = dequantize,
                                         .workspace_bytes = workspace_bytes,
                                         .matmul = matmul};
static const qm_format kFormat = {.struct_size = sizeof kFormat,
                                  .format_id = kRows,
                                  .check = check,
                                  .can_store = can_store,
                                  .to_checkpoint = to,
                                  .from_checkpoint = from};

static const void* ext(const qm_method* m, const char* id) {
  (void)m;
  if (strcmp(id, QM_EXT_QUANTIZE_LINEAR) == 0) return &kQuantize;
  if (strcmp(id, QM_EXT_LINEAR_KERNEL) == 0) return &kKernel;
  return strcmp(id, QM_EXT_FORMAT) == 0 ? &kFormat : NULL;
}
static const qm_option kOptions[] = {
    {"bits", "8", "4|8", "bits per code", QM_OPT_I64, 0},
    {"clip", "1", "0.5..1", "share of the largest weight that is kept", QM_OPT_F64, 0},
    {"rounding", "nearest", "nearest|down", "where a weight goes", QM_OPT_ENUM, 0},
    {"statistics", "false", NULL, "ask for absmax and check it", QM_OPT_BOOL, 0},
    {"format", "affine", "affine|rows", "the built-in format, or this plugin's own", QM_OPT_ENUM,
     0},
    {"note", "", NULL, "text for the log", QM_OPT_STR, 0}};
static const qm_method kMethod = {sizeof kMethod,
                                  "org.example.sample",
                                  "1.0.0",
                                  "rounds rows",
                                  kOptions,
                                  sizeof kOptions / sizeof *kOptions,
                                  QM_METHOD_DETERMINISTIC,
                                  ext};
static const qm_method* const kMethods[] = {&kMethod};
static const qm_plugin kPlugin = {sizeof kPlugin, QM_ABI_MAJOR, QM_ABI_MINOR, 0,          1,
                                  kMethods,       "example",    "Apache-2.0", __VERSION__};
QM_EXPORT const qm_plugin* qm_plugin_entry_v1(void);
const qm_plugin* qm_plugin_entry_v1(void) { return &kPlugin; }
