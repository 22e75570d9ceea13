/* Rounds rows to 8 bits with the Hessian at hand, into a format of its own with a kernel and a
 * checkpoint target. Right as it stands; OFFENCE makes one thing wrong. Compiled once per offence.
 */
#include <math.h>
#include <string.h>
#include <time.h>

#include "quantmill/all.h"
#include "quantmill/sdk/affine_int.h"

enum {
  NONE,
  /* rounding */
  COUNTS_THREADS,
  DIVIDES_BY_CHANNELS,
  DIVIDES_BY_RANGE,
  GROUP_DIFFERS,
  IGNORES_STRIDES,
  NEEDS_FULL_RANK,
  NEEDS_RANGE,
  NEEDS_ROWS,
  NO_DOC,
  OVERFLOWS,
  PASSES_NAN_ON,
  REFUSES_CHOICE,
  REFUSES_WIDTHS,
  STOPS_LATE,
  /* kernel */
  DEQUANTIZES_COARSELY,
  DROPS_ROW_17,
  PREPACK_CHANGES,
  TRANSPOSES_WRONGLY,
  /* format */
  ANY_PARAMETERS,
  ANY_TARGET,
  CHECK_PASSES_ALL,
  CHECK_REFUSES_ALL,
  LOSES_A_BIT
};
#ifndef OFFENCE
#define OFFENCE NONE
#endif

/* Codes I8 [out, in], scale BF16 [out]; w = scale * code. No parameters. */
static const char kRows[] = "org.example.fmt.rows/1";
static const char kTarget[] = "org.example.rows";
static const qm_device kCpu = {QM_CPU, 0};

/* With AT_WILL, functions of the kernel and the format do what the environment says: QM_TEST_IN
 * names one, QM_TEST_HOW is crash, hang or fail. */
#ifdef AT_WILL
#include <signal.h>
#include <stdlib.h>
#include <unistd.h>
static qm_status misbehave(qm_call* c, const char* function) {
  const char *in = getenv("QM_TEST_IN"), *how = getenv("QM_TEST_HOW");
  if (in == NULL || how == NULL || strcmp(in, function) != 0) return QM_OK;
  if (strcmp(how, "crash") == 0) raise(SIGSEGV);
  while (strcmp(how, "hang") == 0) pause();
  return c->fail(c, QM_FAILED_PRECONDITION, "the moon is full; wait a week");
}
#else
#define misbehave(call, function) QM_OK
#endif

/* ---- rounding ---- */

static const qm_stat_request kStats[] = {{QM_STAT_HESSIAN, 0, QM_F32, 0}};

static qm_status plan(qm_call* c, const qm_linear_info* info, qm_quant_plan* out) {
  (void)c, (void)info;
  out->stats = kStats;
  out->stat_count = 1;
  out->scratch_bytes = 2 * sizeof(qm_named_tensor) + 256;
  out->format_id = kRows;
  return QM_OK;
}

/* 1, or what becomes of it by an author's trust in the statistics. */
static float factor_of(const qm_stats* stats, int64_t in) {
  float factor = 1.0f;
  const float* h = stats->items[0].tensor.data;
  if (OFFENCE == NEEDS_FULL_RANK && stats->row_count < in) factor = NAN; /* a pivot of 0 */
  for (int64_t i = 0; i < in; ++i) {
    if (OFFENCE == DIVIDES_BY_CHANNELS) factor *= h[i * (in + 1)] / h[i * (in + 1)];
    if (OFFENCE == PASSES_NAN_ON) factor += 0.0f * h[i * (in + 1)];
  }
  return factor;
}

/* Returns what is stored. */
static float store_scale(uint16_t* scale, float value) {
  if (!isnan(value)) return qm_store_scale(scale, QM_BF16, 0, value);
  *scale = 0x7fc0;
  return value;
}

static qm_status round_row(qm_call* c, const qm_linear_info* info, const float* w, float factor,
                           int8_t* codes, uint16_t* stored) {
  float low = INFINITY, high = -INFINITY, square = 0.0f;
  for (int64_t k = 0; k < info->in_features; ++k) {
    if (!isfinite(w[k]) && OFFENCE != IGNORES_STRIDES) {
      return c->fail(c, QM_INVALID_ARGUMENT, "a weight is NaN or infinite");
    }
    low = fminf(low, w[k]);
    high = fmaxf(high, w[k]);
    square += w[k] * w[k];
  }
  if (OFFENCE == NEEDS_RANGE && low == high) {
    return c->fail(c, QM_FAILED_PRECONDITION, "a row has no range");
  }
  const float top = fmaxf(-low, high);
  if (OFFENCE == DIVIDES_BY_RANGE) factor *= top / top;
  if (OFFENCE == OVERFLOWS && square > 0.0f) factor *= square / square;
  const float scale = store_scale(stored, factor * (top > 0.0f ? top / 127.0f : 1.0f));
  const int down = strcmp(c->opt_str(c, "rounding"), "down") == 0;
  for (int64_t k = 0; k < info->in_features; ++k) {
    const float code = down ? floorf(w[k] / scale) : rintf(w[k] / scale);
    codes[k] = (int8_t)(code == code ? fminf(fmaxf(code, -127.0f), 127.0f) : 0.0f);
  }
  return QM_OK;
}

static void stop_late(void) {
  const struct timespec nap = {2, 300 * 1000 * 1000};
  if (OFFENCE == STOPS_LATE) nanosleep(&nap, NULL);
}

/* What run refuses though plan did not. */
static qm_status refuse(qm_call* c, const qm_linear_info* info, const qm_stats* stats) {
  if (OFFENCE == REFUSES_WIDTHS && info->in_features % 128 != 0) {
    return c->fail(c, QM_INVALID_ARGUMENT, "128 does not divide the inputs");
  }
  if (OFFENCE == REFUSES_CHOICE && strcmp(c->opt_str(c, "rounding"), "down") == 0) {
    return c->fail(c, QM_INVALID_ARGUMENT, "rounding down is not written yet");
  }
  if (OFFENCE == NEEDS_ROWS && stats->row_count == 0) {
    return c->fail(c, QM_INTERNAL, "something went wrong");
  }
  return QM_OK;
}

/* Lists codes and scale as a result; their tensors are emitted. */
static qm_status list(qm_call* c, uint64_t item, int64_t n, int64_t k, qm_packed* out) {
  qm_named_tensor* t = c->scratch(c, kCpu, 2 * sizeof *t);
  if (t == NULL) return c->fail(c, QM_RESOURCE_EXHAUSTED, "no scratch");
  t[0].name = "codes";
  t[1].name = "scale";
  *out = (qm_packed){kRows, "{}", t, 2, n, k};
  qm_status status = c->emit(c, item, "codes", kCpu, QM_I8, 2, (int64_t[]){n, k}, &t[0].tensor);
  if (status) return status;
  return c->emit(c, item, "scale", kCpu, QM_BF16, 1, (int64_t[]){n}, &t[1].tensor);
}

static qm_status one(qm_call* c, uint64_t item, const qm_linear_info* info, const qm_tensor* weight,
                     const qm_stats* stats, float factor, qm_packed* out) {
  const int64_t n = info->out_features, k = info->in_features;
  if (weight->stride[1] != 1) return c->fail(c, QM_INVALID_ARGUMENT, "rows must be contiguous");
  qm_status status = refuse(c, info, stats);
  if (status == QM_OK) status = list(c, item, n, k, out);
  if (status) return status;
  const int64_t stride = OFFENCE == IGNORES_STRIDES ? k : weight->stride[0];
  factor *= factor_of(stats, k);
  for (int64_t i = 0; i < n; ++i) {
    if (c->progress(c, (double)i / (double)n)) return stop_late(), QM_CANCELLED;
    status = round_row(c, info, (const float*)weight->data + i * stride, factor,
                       (int8_t*)out->tensors[0].tensor.data + i * k,
                       (uint16_t*)out->tensors[1].tensor.data + i);
    if (status) return status;
  }
  const qm_host_threads* threads = c->host_ext(c, QM_HOST_THREADS);
  if (OFFENCE == COUNTS_THREADS && QM_HAS(threads, worker_count)) {
    *(int8_t*)out->tensors[0].tensor.data = (int8_t)threads->worker_count(c);
  }
  return QM_OK;
}

static qm_status run(qm_call* c, const qm_linear_info* info, const qm_tensor* weight,
                     const qm_stats* stats, qm_packed* out) {
  return one(c, 0, info, weight, stats, 1.0f, out);
}

static qm_status run_group(qm_call* c, uint64_t count, const qm_linear_info* const* infos,
                           const qm_tensor* weights, const qm_stats* const* stats, qm_packed* out) {
  const float factor = OFFENCE == GROUP_DIFFERS ? 1.01f : 1.0f;
  qm_status status = QM_OK;
  for (uint64_t i = 0; i < count && status == QM_OK; ++i) {
    status = one(c, i, infos[i], &weights[i], stats[i], factor, &out[i]);
  }
  return status;
}

/* ---- kernel ---- */

static int32_t accepts(const char* format_id, const char* json, qm_device_kind device, int32_t sm,
                       qm_dtype activation) {
  (void)sm;
  return strcmp(format_id, kRows) == 0 && strcmp(json, "{}") == 0 && device == QM_CPU &&
         activation == QM_F32;
}

static float value_at(const qm_packed* p, int64_t row, int64_t column) {
  const int8_t* codes = p->tensors[0].tensor.data;
  const uint32_t bits = (uint32_t)((const uint16_t*)p->tensors[1].tensor.data)[row] << 16;
  float scale;
  memcpy(&scale, &bits, sizeof scale);
  return scale * (float)codes[row * p->in_features + column];
}

static void store(qm_tensor* t, int64_t i, float value) {
  const int wide = t->dtype == QM_F32;
  if (wide) ((float*)t->data)[i] = value;
  if (!wide) ((uint16_t*)t->data)[i] = 0;
  if (wide || value == 0.0f) return;
  if (OFFENCE == DEQUANTIZES_COARSELY) value *= 1.01f;
  qm_store_scale(t->data, t->dtype, i, fabsf(value));
  if (value < 0.0f) ((uint16_t*)t->data)[i] |= 0x8000;
}

static qm_status dequantize(qm_call* c, const qm_packed* p, qm_tensor* weight) {
  if (misbehave(c, "dequantize")) return QM_FAILED_PRECONDITION;
  (void)c;
  for (int64_t i = 0; i < p->out_features * p->in_features; ++i) {
    store(weight, i, value_at(p, i / p->in_features, i % p->in_features));
  }
  return QM_OK;
}

static qm_status prepack(qm_call* c, const qm_packed* p, qm_packed* out) {
  if (misbehave(c, "prepack")) return QM_FAILED_PRECONDITION;
  const qm_status status = list(c, 0, p->out_features, p->in_features, out);
  if (status) return status;
  for (int t = 0; t < 2; ++t) {
    const int64_t bytes = t == 0 ? p->out_features * p->in_features : p->out_features * 2;
    memcpy(out->tensors[t].tensor.data, p->tensors[t].tensor.data, (size_t)bytes);
  }
  if (OFFENCE == PREPACK_CHANGES) ((int8_t*)out->tensors[0].tensor.data)[0] ^= 1;
  return QM_OK;
}

static qm_status matmul(qm_call* c, const qm_packed* p, const qm_tensor* x, void* workspace,
                        qm_tensor* y) {
  if (misbehave(c, "matmul")) return QM_FAILED_PRECONDITION;
  (void)c, (void)workspace;
  for (int64_t r = 0; r < x->shape[0]; ++r) {
    const int dropped = OFFENCE == DROPS_ROW_17 && r == 16;
    for (int64_t o = 0; o < p->out_features; ++o) {
      float sum = 0.0f;
      for (int64_t k = 0; k < p->in_features && !dropped; ++k) {
        sum += value_at(p, o, k) * ((const float*)x->data)[r * x->stride[0] + k];
      }
      ((float*)y->data)[r * y->stride[0] + o] = sum;
    }
  }
  return QM_OK;
}

static qm_status matmul_transposed(qm_call* c, const qm_packed* p, const qm_tensor* dy,
                                   void* workspace, qm_tensor* dx) {
  (void)c, (void)workspace;
  const int64_t first = OFFENCE == TRANSPOSES_WRONGLY ? 1 : 0; /* one row is left out */
  for (int64_t r = 0; r < dy->shape[0]; ++r) {
    for (int64_t k = 0; k < p->in_features; ++k) {
      float sum = 0.0f;
      for (int64_t o = first; o < p->out_features; ++o) {
        sum += value_at(p, o, k) * ((const float*)dy->data)[r * dy->stride[0] + o];
      }
      ((float*)dx->data)[r * dx->stride[0] + k] = sum;
    }
  }
  return QM_OK;
}

/* ---- format ---- */

static int is_tensor(const qm_named_tensor* t, const char* name, qm_dtype dtype, int32_t rank,
                     int64_t rows, int64_t columns) {
  return strcmp(t->name, name) == 0 && t->tensor.dtype == dtype && t->tensor.rank == rank &&
         t->tensor.shape[0] == rows && (rank < 2 || t->tensor.shape[1] == columns);
}

static qm_status check(qm_call* c, const qm_packed* p) {
  if (misbehave(c, "check")) return QM_FAILED_PRECONDITION;
  const int64_t n = p->out_features, k = p->in_features;
  const int good = strcmp(p->format_id, kRows) == 0 && strcmp(p->format_json, "{}") == 0 &&
                   p->tensor_count == 2 && is_tensor(&p->tensors[0], "codes", QM_I8, 2, n, k) &&
                   is_tensor(&p->tensors[1], "scale", QM_BF16, 1, n, 1);
  if (OFFENCE == CHECK_PASSES_ALL || (good && OFFENCE != CHECK_REFUSES_ALL)) return QM_OK;
  return c->fail(c, QM_INVALID_ARGUMENT, "rows wants codes I8 [out, in] and scale BF16 [out]");
}

static qm_status known(qm_call* c, const char* target, const char* json) {
  if (OFFENCE != ANY_TARGET && strcmp(target, kTarget) != 0) {
    return c->fail(c, QM_FAILED_PRECONDITION, "no such target; use org.example.rows");
  }
  if (OFFENCE != ANY_PARAMETERS && strcmp(json, "{}") != 0) {
    return c->fail(c, QM_FAILED_PRECONDITION, "the format has no parameters; write {}");
  }
  return QM_OK;
}

static qm_status can_store(qm_call* c, const char* target, const char* json, int64_t n, int64_t k) {
  (void)n, (void)k;
  return known(c, target, json);
}

static qm_status copy(qm_call* c, const qm_named_tensor* tensors, int64_t n, int64_t k,
                      qm_packed* out) {
  const qm_status status = list(c, 0, n, k, out);
  if (status) return status;
  memcpy(out->tensors[0].tensor.data, tensors[0].tensor.data, (size_t)(n * k));
  memcpy(out->tensors[1].tensor.data, tensors[1].tensor.data, (size_t)n * 2);
  return QM_OK;
}

static qm_status to_checkpoint(qm_call* c, const char* target, const char* layer,
                               const qm_packed* p, const qm_named_tensor** out, uint64_t* count,
                               const char** json) {
  (void)layer;
  qm_packed copied = {0};
  qm_status status = known(c, target, p->format_json);
  if (status == QM_OK) status = copy(c, p->tensors, p->out_features, p->in_features, &copied);
  if (status) return status;
  *out = copied.tensors;
  *count = copied.tensor_count;
  *json = "{}";
  return QM_OK;
}

static qm_status from_checkpoint(qm_call* c, const char* target, const char* layer,
                                 const qm_named_tensor* in, uint64_t count, const char* json,
                                 qm_packed* out) {
  (void)layer;
  qm_status status = known(c, target, json);
  if (status) return status;
  if (count != 2) return c->fail(c, QM_INVALID_ARGUMENT, "rows wants codes and scale");
  status = copy(c, in, in[0].tensor.shape[0], in[0].tensor.shape[1], out);
  if (status == QM_OK && OFFENCE == LOSES_A_BIT) {
    ((uint16_t*)out->tensors[1].tensor.data)[0] ^= 1;
  }
  return status;
}

/* ---- descriptor ---- */

static const char* const kTargets[] = {kTarget};
static const qm_quantize_linear kQuantize = {sizeof kQuantize, plan, run, run_group};
static const qm_linear_kernel kKernel = {.struct_size = sizeof kKernel,
                                         .accepts = accepts,
                                         .dequantize = dequantize,
                                         .prepack = prepack,
                                         .matmul = matmul,
                                         .matmul_transposed = matmul_transposed};
static const qm_format kFormat = {.struct_size = sizeof kFormat,
                                  .format_id = kRows,
                                  .targets = kTargets,
                                  .target_count = 1,
                                  .check = check,
                                  .can_store = can_store,
                                  .to_checkpoint = to_checkpoint,
                                  .from_checkpoint = from_checkpoint};
static const void* ext(const qm_method* m, const char* id) {
  (void)m;
  if (strcmp(id, QM_EXT_QUANTIZE_LINEAR) == 0) return &kQuantize;
  if (strcmp(id, QM_EXT_LINEAR_KERNEL) == 0) return &kKernel;
  return strcmp(id, QM_EXT_FORMAT) == 0 ? &kFormat : NULL;
}
static const qm_option kOptions[] = {{"rounding", "nearest", "nearest|down",
                                      OFFENCE == NO_DOC ? "" : "where a weight goes", QM_OPT_ENUM,
                                      0}};
static const qm_method kMethod = {sizeof kMethod,
                                  "org.example.rows",
                                  "1.0.0",
                                  "rounds rows to 8 bits",
                                  kOptions,
                                  1,
                                  QM_METHOD_DETERMINISTIC,
                                  ext};
static const qm_method* const kMethods[] = {&kMethod};
static const qm_plugin kPlugin = {sizeof kPlugin, QM_ABI_MAJOR, QM_ABI_MINOR, 0,     1,
                                  kMethods,       "example",    "Apache-2.0", "none"};
QM_EXPORT const qm_plugin* qm_plugin_entry_v1(void);
const qm_plugin* qm_plugin_entry_v1(void) { return &kPlugin; }
