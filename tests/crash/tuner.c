/* Rounds to seven levels per row, kept as 8-bit codes, and tunes the scales and the norms of a
 * block by gradient descent through the host's vjp; misbehaves as its option says. The macro
 * MISBEHAVE is that option's default; with HALF_TABLE the table for tuning lacks run, with ALONE
 * there is no quantizer beside it. */
#include <math.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "quantmill/all.h"

#ifndef MISBEHAVE
#define MISBEHAVE "none"
#endif
#ifndef HALF_TABLE
#define HALF_TABLE 0
#endif
#ifndef ALONE
#define ALONE 0
#endif

enum { kMostLinears = 7, kMostOthers = 16, kLevels = 3, kCenter = 128 };

static int is(qm_call* c, const char* what) {
  return strcmp(c->opt_str(c, "misbehave"), what) == 0;
}
static const qm_device kCpu = {QM_CPU, 0};

/* ---- rounding ---- */

static qm_status round_plan(qm_call* c, const qm_linear_info* li, qm_quant_plan* out) {
  (void)c, (void)li;
  out->format_id = "qm.fmt.affine-int/1";
  return QM_OK;
}

static qm_status round_run(qm_call* c, const qm_linear_info* li, const qm_tensor* w,
                           const qm_stats* s, qm_packed* out) {
  (void)s;
  const int64_t n = li->out_features, k = li->in_features, words = (k + 3) / 4;
  if (is(c, "fail-down") && strstr(li->name, "down_proj")) {
    return c->fail(c, QM_FAILED_PRECONDITION, "not this linear");
  }
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
    ((float*)scale.data)[i] = top / kLevels;
    uint8_t* bytes = (uint8_t*)codes.data + i * words * 4;
    for (int64_t j = 0; j < k; ++j) {
      bytes[j] = (uint8_t)(lrintf(row[j] / top * kLevels) + kCenter);
    }
  }
  qm_named_tensor* t = c->scratch(c, w->device, 2 * sizeof *t);
  if (!t) return c->fail(c, QM_RESOURCE_EXHAUSTED, "no scratch");
  t[0].name = "codes", t[0].tensor = codes, t[1].name = "scale", t[1].tensor = scale;
  *out = (qm_packed){
      "qm.fmt.affine-int/1", "{\"bits\":8,\"group_size\":-1,\"zero\":\"none\"}", t, 2, n, k};
  return QM_OK;
}

/* ---- tuning ---- */

static qm_tensor f32(qm_call* c, int32_t rank, int64_t rows, int64_t columns) {
  qm_tensor t = {NULL, QM_F32, rank, {QM_CPU, 0}, {1, 1, 1, 1}, {0, 0, 0, 0}, 0, {0, 0}};
  t.data = c->scratch(c, kCpu, (uint64_t)(rows * columns) * 4);
  t.shape[0] = rows;
  t.stride[0] = rank > 1 ? columns : 1;
  if (rank > 1) t.shape[1] = columns, t.stride[1] = 1;
  if (t.data) memset(t.data, 0, (size_t)(rows * columns) * 4);
  return t;
}
static int64_t size(const qm_tensor* t) {
  int64_t n = 1;
  for (int32_t i = 0; i < t->rank; ++i) n *= t->shape[i];
  return n;
}

/* One tensor that is trained: a packed weight's scales, or a norm. */
typedef struct part {
  char name[200];       /* of the weight or the norm */
  const uint8_t* codes; /* NULL: a norm */
  int64_t item, stride; /* of codes: index of the linear, bytes per row */
  qm_tensor value;      /* scales or norm */
  qm_tensor dense;      /* what it stands for: the override */
  qm_tensor gradient;   /* of dense */
  qm_tensor slope;      /* of value */
  qm_tensor best;       /* the value with the smallest loss so far */
} part;

static void fill_dense(part* p) {
  const float* v = p->value.data;
  float* out = p->dense.data;
  const int64_t columns = p->dense.shape[1];
  for (int64_t i = 0; i < size(&p->dense); ++i) {
    out[i] = p->codes ? v[i / columns] *
                            (float)(p->codes[i / columns * p->stride + i % columns] - kCenter)
                      : v[i];
  }
}

static void add_slope(part* p) {
  const float* g = p->gradient.data;
  float* out = p->slope.data;
  const int64_t columns = p->dense.shape[1];
  for (int64_t i = 0; i < size(&p->dense); ++i) {
    if (p->codes) {
      out[i / columns] += g[i] * (float)(p->codes[i / columns * p->stride + i % columns] - kCenter);
    } else {
      out[i] += g[i];
    }
  }
}

static int make_part(qm_call* c, part* p, const qm_tensor* value, int32_t rank, int64_t rows,
                     int64_t columns) {
  p->value = f32(c, rank, value->shape[0], rank > 1 ? value->shape[1] : 1);
  p->slope = f32(c, rank, value->shape[0], rank > 1 ? value->shape[1] : 1);
  p->best = f32(c, rank, value->shape[0], rank > 1 ? value->shape[1] : 1);
  p->dense = f32(c, rank, rows, columns);
  p->gradient = f32(c, rank, rows, columns);
  if (!p->value.data || !p->best.data || !p->slope.data || !p->dense.data || !p->gradient.data)
    return 0;
  memcpy(p->value.data, value->data, (size_t)size(value) * 4);
  return 1;
}

/* Mean squared error over all windows; slopes of it. */
static qm_status measure(qm_call* c, const qm_host_block* host, part* parts, uint64_t count,
                         double* loss) {
  qm_override overrides[kMostLinears + kMostOthers];
  qm_named_tensor gradients[kMostLinears + kMostOthers];
  for (uint64_t i = 0; i < count; ++i) {
    fill_dense(&parts[i]);
    memset(parts[i].gradient.data, 0, (size_t)size(&parts[i].gradient) * 4);
    memset(parts[i].slope.data, 0, (size_t)size(&parts[i].slope) * 4);
    overrides[i] = (qm_override){parts[i].name, parts[i].dense};
    gradients[i] = (qm_named_tensor){parts[i].name, parts[i].gradient};
  }
  *loss = 0;
  qm_tensor error = {0};
  const int64_t windows = host->sample_count(c);
  for (int64_t w = 0; w < windows; ++w) {
    qm_tensor out;
    qm_status status = host->forward(c, w, NULL, 0, &out);
    if (status) return status;
    if (!error.data) error = f32(c, 2, out.shape[0], out.shape[1]);
    if (!error.data) return c->fail(c, QM_RESOURCE_EXHAUSTED, "no scratch");
    float* e = error.data;
    for (int64_t i = 0; i < size(&out); ++i) e[i] = -((const float*)out.data)[i];
    status = host->forward(c, w, overrides, count, &out);
    if (status) return status;
    for (int64_t i = 0; i < size(&out); ++i) {
      e[i] += ((const float*)out.data)[i];
      *loss += (double)e[i] * e[i] / (double)(size(&out) * windows);
      e[i] *= 2.0f / (float)(size(&out) * windows);
    }
    status = host->vjp(c, w, overrides, count, &error, gradients, count);
    if (status) return status;
  }
  for (uint64_t i = 0; i < count; ++i) add_slope(&parts[i]);
  return QM_OK;
}

/* Steps along the slope, shorter after each that did not help; ends at the best values seen. */
static qm_status descend(qm_call* c, const qm_host_block* host, part* parts, uint64_t count) {
  const int64_t steps = c->opt_i64(c, "tune");
  double best = INFINITY, length = is(c, "worse") ? -5.0 : 0.1;
  for (int64_t step = 0; step <= steps; ++step) {
    if (c->progress(c, (double)step / (double)steps) && !is(c, "stay")) return QM_CANCELLED;
    double loss, square = 0;
    const qm_status status = measure(c, host, parts, count, &loss);
    if (status) return status;
    const int better = loss < best;
    for (uint64_t i = 0; i < count && !is(c, "worse"); ++i) {
      qm_tensor* from = better ? &parts[i].value : &parts[i].best;
      qm_tensor* to = better ? &parts[i].best : &parts[i].value;
      memcpy(to->data, from->data, (size_t)size(from) * 4);
    }
    if (better) best = loss;
    if (!better) length *= 0.3;
    if (step == steps) return QM_OK;
    for (uint64_t i = 0; i < count; ++i) {
      for (int64_t j = 0; j < size(&parts[i].slope); ++j) {
        square += pow(((float*)parts[i].slope.data)[j], 2);
      }
    }
    const double rate = length * loss / (square + 1e-30); /* 1: to 0, if the loss were linear */
    for (uint64_t i = 0; i < count; ++i) {
      for (int64_t j = 0; j < size(&parts[i].slope); ++j) {
        float* value = (float*)parts[i].value.data + j;
        const float moved = *value - (float)rate * ((float*)parts[i].slope.data)[j];
        *value = parts[i].codes ? fmaxf(moved, 0.1f * *value) : moved; /* scales stay positive */
      }
    }
  }
  return QM_OK;
}

static qm_status tune_plan(qm_call* c, const qm_block_info* b, qm_quant_plan* out) {
  if (!c->opt_i64(c, "tune")) return c->fail(c, QM_UNIMPLEMENTED, "tune is 0");
  if (is(c, "crash-plan")) raise(SIGSEGV);
  if (is(c, "refuse")) return c->fail(c, QM_INVALID_ARGUMENT, "not this block; use another");
  if (b->weights || b->site_count) return c->fail(c, QM_INTERNAL, "too much is told");
  out->scratch_bytes = is(c, "greedy") ? 1024 : 1 << 26;
  out->flops = 1e9;
  return QM_OK;
}

static qm_status tune_block(qm_call* c, const qm_block_info* b, const qm_packed* packed,
                            const qm_edit** edits, uint64_t* edit_count) {
  if (is(c, "crash")) raise(SIGSEGV);
  while (is(c, "hang")) pause();
  if (is(c, "fail")) return c->fail(c, QM_FAILED_PRECONDITION, "the tide is out; wait six hours");
  if (is(c, "slow")) nanosleep(&(struct timespec){0, 100 * 1000 * 1000}, NULL);
  const qm_host_block* host = c->host_ext(c, QM_HOST_BLOCK);
  if (!host || !QM_HAS(host, vjp)) {
    return c->fail(c, is(c, "excuse") ? QM_INTERNAL : QM_FAILED_PRECONDITION, "no vjp");
  }
  if (is(c, "all-packed") && !packed[0].format_id) {
    return c->fail(c, QM_INVALID_ARGUMENT, "not packed");
  }
  part parts[kMostLinears + kMostOthers];
  memset(parts, 0, sizeof parts);
  uint64_t count = 0;
  for (uint64_t l = 0; l < b->linear_count && l < kMostLinears; ++l) {
    if (!packed[l].format_id) continue;
    part* p = &parts[count++];
    snprintf(p->name, sizeof p->name, "%s.weight", b->linears[l]->name);
    p->codes = packed[l].tensors[0].tensor.data;
    p->stride = packed[l].tensors[0].tensor.shape[1] * 4;
    p->item = (int64_t)l;
    if (is(c, "overwrite")) ((float*)packed[l].tensors[1].tensor.data)[0] = 1.0f;
    if (!make_part(c, p, &packed[l].tensors[1].tensor, 2, packed[l].out_features,
                   packed[l].in_features)) {
      return c->fail(c, QM_RESOURCE_EXHAUSTED, "no scratch");
    }
  }
  const uint64_t scales = count;
  const qm_packed* others = &packed[b->linear_count];
  for (uint64_t i = 0; i < others->tensor_count && i < kMostOthers; ++i) {
    part* p = &parts[count++];
    snprintf(p->name, sizeof p->name, "%s", others->tensors[i].name);
    const qm_tensor* value = &others->tensors[i].tensor;
    if (!make_part(c, p, value, 1, value->shape[0], 1)) {
      return c->fail(c, QM_RESOURCE_EXHAUSTED, "no scratch");
    }
  }
  const qm_status status = descend(c, host, parts, count);
  if (status) return status;
  for (uint64_t i = 0; i < scales; ++i) {
    qm_tensor out;
    const qm_tensor* v = &parts[i].value;
    const int64_t shape[2] = {v->shape[0] + (is(c, "short") ? -1 : 0), v->shape[1]};
    const uint64_t item = (uint64_t)parts[i].item + (is(c, "beyond") ? b->linear_count : 0);
    const qm_status st =
        c->emit(c, item, is(c, "unknown-name") ? "scales" : "scale", kCpu, QM_F32, 2, shape, &out);
    if (st) return st;
    memcpy(out.data, v->data, (size_t)(shape[0] * shape[1]) * 4);
    if (is(c, "nan")) ((float*)out.data)[0] = NAN;
    if (is(c, "restless")) {
      static int runs = 0;
      ((float*)out.data)[0] *= 1.0f + 1e-3f * (float)++runs;
    }
  }
  qm_edit* list = c->scratch(c, kCpu, (count - scales + 1) * sizeof *list);
  char* names = c->scratch(c, kCpu, (count - scales + 1) * sizeof parts[0].name);
  if (!list || !names) return c->fail(c, QM_RESOURCE_EXHAUSTED, "no scratch");
  memset(list, 0, (count - scales + 1) * sizeof *list);
  for (uint64_t i = scales; i < count; ++i) {
    char* name = names + (i - scales) * sizeof parts[0].name;
    strcpy(name, is(c, "edit-weight") ? parts[0].name : parts[i].name);
    list[i - scales].target = name;
    list[i - scales].value = is(c, "edit-weight") ? parts[0].dense : parts[i].value;
    list[i - scales].kind = QM_EDIT_REPLACE;
  }
  *edits = list;
  *edit_count = count - scales;
  return QM_OK;
}

static qm_status tune_run(qm_call* c, const qm_block_info* b, const qm_packed* packed,
                          const qm_edit** edits, uint64_t* edit_count) {
  const qm_status status = tune_block(c, b, packed, edits, edit_count);
  if (!is(c, "forgets-why") || status == QM_OK) return status;
  return c->fail(c, QM_INTERNAL, "something went wrong");
}

static const qm_quantize_linear kQuantize = {sizeof kQuantize, round_plan, round_run, NULL};
static const qm_block_tune kTune = {sizeof kTune, tune_plan, HALF_TABLE ? NULL : tune_run};
static const void* ext(const qm_method* m, const char* id) {
  (void)m;
  if (strcmp(id, QM_EXT_QUANTIZE_LINEAR) == 0) return ALONE ? NULL : &kQuantize;
  return strcmp(id, QM_EXT_BLOCK_TUNE) == 0 ? &kTune : NULL;
}
static const qm_option kOptions[] = {
    {"misbehave", MISBEHAVE,
     "none|refuse|crash|hang|fail|slow|worse|short|unknown-name|nan|edit-weight|fail-down|stay|"
     "greedy|"
     "restless|overwrite|beyond|excuse|all-packed|crash-plan|forgets-why",
     "what to do wrong", QM_OPT_ENUM, 0},
    {"tune", "0", "0..100", "steps of tuning; 0 = none", QM_OPT_I64, 0},
    {"bits", "8", "8", "of the codes", QM_OPT_I64, 0}};
static const qm_method kMethod = {sizeof kMethod,
                                  "org.example.tuner",
                                  "0.1.0",
                                  "seven levels, tuned",
                                  kOptions,
                                  3,
                                  QM_METHOD_DETERMINISTIC,
                                  ext};
static const qm_method* const kMethods[] = {&kMethod};
static const qm_plugin kPlugin = {sizeof kPlugin, QM_ABI_MAJOR, QM_ABI_MINOR, 0,     1,
                                  kMethods,       "example",    "Apache-2.0", "none"};
QM_EXPORT const qm_plugin* qm_plugin_entry_v1(void);
const qm_plugin* qm_plugin_entry_v1(void) { return &kPlugin; }
