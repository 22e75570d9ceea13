/* Rounds to nearest as the C template does, and keeps every rule but the one OFFENCE names.
 * Compiled once per offence; throws.cc includes it as C++. */
#include <dlfcn.h>
#include <fcntl.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "quantmill/all.h"
#include "quantmill/sdk/affine_int.h"

enum {
  NONE,
  ACCEPTS_NAN,
  BARE_CODE,
  CHANGES_DESCRIPTOR,
  CHANGES_INPUT,
  CLIPS,
  COMPARES_SIZES,
  EXITS,
  FORGETS_WHY,
  HANGS,
  IGNORES_CANCEL,
  KEEPS_POINTERS,
  LISTS_SCRATCH,
  MATCHES_PREFIX,
  NEEDS_THREADS,
  NOT_THE_SAME_TWICE,
  OPENS_FILE,
  PRINTS_IN_ENTRY,
  READS_NEWER_FIELD,
  REFUSES_LATE,
  SEGFAULTS,
  SLOW_TO_LOAD,
  STARTS_CUDA,
  STARTS_THREAD,
  THROWS,
  TOO_LITTLE_SCRATCH,
  UNKNOWN_CODE,
  WRITES_PAST_END,
  WRONG_NAMES,
  WRONG_TABLE_SIZE
};
#ifndef OFFENCE
#define OFFENCE NONE
#endif

static const qm_option kOptions[] = {
    {"bits", "4", "2|3|4|8", "Width of a code in bits.", QM_OPT_I64, 0},
    {"group_size", "128", "-1..1048576", "Inputs that share a scale; -1 = all.", QM_OPT_I64, 0}};

/* ---- at load ---- */
static void* idle(void* arg) {
  pause();
  return arg;
}
static volatile int opened;

__attribute__((constructor)) static void at_load(void) {
  const struct timespec nap = {0, 150 * 1000 * 1000};
  pthread_t thread;
  if (OFFENCE == OPENS_FILE) opened = open("/etc/passwd", O_RDONLY);
  if (OFFENCE == STARTS_CUDA)
    opened = dlopen("libcuda.so.1", RTLD_NOW) != NULL; /* as cudart does */
  if (OFFENCE == STARTS_THREAD) opened = pthread_create(&thread, NULL, idle, NULL);
  if (OFFENCE == SLOW_TO_LOAD) nanosleep(&nap, NULL);
}

/* ---- plan ---- */
static qm_status plan(qm_call* c, const qm_linear_info* info, qm_quant_plan* out) QM_NOEXCEPT {
  if (OFFENCE == COMPARES_SIZES && info->struct_size != sizeof *info) {
    return c->fail(c, QM_FAILED_PRECONDITION, "another struct than mine");
  }
  if (OFFENCE == READS_NEWER_FIELD && *(const volatile int64_t*)(info + 1) != 0) {
    opened = 1; /* a field behind the last */
  }
  out->stats = NULL;
  out->stat_count = 0;
  out->scratch_bytes = OFFENCE == TOO_LITTLE_SCRATCH ? 8 : 1024;
  out->scratch_bytes_shared = 0;
  out->format_id = "qm.fmt.affine-int/1";
  const int64_t size = c->opt_i64(c, "group_size");
  const int divides = size == -1 || (size > 0 && info->in_features % size == 0);
  if (OFFENCE == BARE_CODE && !divides) return QM_INVALID_ARGUMENT;
  if (OFFENCE == UNKNOWN_CODE && !divides) return 99;
  return qm_affine_check(c, info, size);
}

/* ---- run ---- */
static int calls;
static const float* kept;
static int* volatile nowhere;

/* What goes wrong before anything is done; QM_OK to go on. */
static qm_status begin_badly(qm_call* c, const qm_tensor* weight) {
  float* values = (float*)weight->data;
  if (OFFENCE == CHANGES_INPUT) values[0] = 0;
  if (OFFENCE == EXITS) exit(0);
  while (OFFENCE == HANGS) pause();
  if (OFFENCE == SEGFAULTS) *nowhere = 1;
  if (OFFENCE == KEEPS_POINTERS) {
    const volatile float* old = kept;
    kept = values;
    if (old != NULL && old[0] == 1234) return c->fail(c, QM_INTERNAL, "never");
  }
  if (OFFENCE == NEEDS_THREADS && c->host_ext(c, QM_HOST_THREADS) == NULL) {
    return c->fail(c, QM_INTERNAL, "something went wrong");
  }
  if (OFFENCE == REFUSES_LATE) return c->fail(c, QM_INVALID_ARGUMENT, "not today");
#if defined(__cplusplus)
  if (OFFENCE == THROWS) throw 1;
#endif
  return QM_OK;
}

/* A result in memory that does not outlive the call. */
static qm_status describe_badly(qm_call* c, const qm_linear_info* info, qm_packed* out) {
  qm_named_tensor* t = (qm_named_tensor*)out->tensors;
  if (OFFENCE == LISTS_SCRATCH) {
    t[1].tensor.data = c->scratch(c, c->device, (uint64_t)info->out_features * 64);
    if (t[1].tensor.data == NULL) return c->fail(c, QM_RESOURCE_EXHAUSTED, "no scratch");
  }
  return QM_OK;
}

/* A result under another name than the format's. */
static qm_status emit_badly(qm_call* c, const qm_linear_info* info, qm_packed* out) {
  qm_named_tensor* t = (qm_named_tensor*)c->scratch(c, c->device, sizeof *t);
  if (t == NULL) return c->fail(c, QM_RESOURCE_EXHAUSTED, "no scratch");
  memset(out, 0, sizeof *out);
  t->name = "qweight";
  out->format_id = "qm.fmt.affine-int/1";
  out->format_json = "{\"bits\":8,\"group_size\":-1,\"zero\":\"none\"}";
  out->tensors = t;
  out->tensor_count = 1;
  out->out_features = info->out_features;
  out->in_features = info->in_features;
  const int64_t shape[2] = {info->out_features, info->in_features};
  return c->emit(c, 0, t->name, c->device, QM_I8, 2, shape, &t->tensor);
}

static qm_status round_group(qm_call* c, const qm_linear_info* info, const float* w, int64_t g,
                             int64_t first, int64_t n, const qm_packed* out) {
  const int64_t bits = c->opt_i64(c, "bits");
  const int64_t words = qm_words_per_row(info->in_features, bits);
  const int64_t row = g * n / info->in_features;
  const float top = (float)((1 << bits) - 1);
  float low = 0, high = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (OFFENCE != ACCEPTS_NAN && !isfinite(w[i])) {
      return c->fail(c, QM_INVALID_ARGUMENT, "a weight is NaN or infinite");
    }
    low = fminf(low, w[i]);
    high = fmaxf(high, w[i]);
  }
  if (!(high - low > 0)) low = -1, high = 1;
  if (OFFENCE == CLIPS) low /= 4, high /= 4;
  const float scale =
      qm_store_scale(out->tensors[1].tensor.data, info->scale_dtype, g, (high - low) / top);
  const float zero = fminf(rintf(-low / scale), top);
  ((uint8_t*)out->tensors[2].tensor.data)[g] = (uint8_t)zero;
  for (int64_t i = 0; i < n; ++i) {
    float code = fminf(fmaxf(rintf(w[i] / scale) + zero, 0), top);
    if (OFFENCE == NOT_THE_SAME_TWICE && calls % 2 == 0) code = code > 0 ? code - 1 : 0;
    qm_put_code((int32_t*)out->tensors[0].tensor.data + row * words, bits, first + i,
                (uint32_t)code);
  }
  return QM_OK;
}

static qm_status run(qm_call* c, const qm_linear_info* info, const qm_tensor* weight,
                     const qm_stats* stats, qm_packed* out)
#if !OFFENCE_MAY_THROW
    QM_NOEXCEPT
#endif
{
  (void)stats;
  ++calls;
  const int64_t bits = c->opt_i64(c, "bits"), size = c->opt_i64(c, "group_size");
  const int64_t cols = info->in_features, n = size < 0 ? cols : size;
  if (weight->stride[1] != 1) return c->fail(c, QM_INVALID_ARGUMENT, "rows must be contiguous");
  qm_status status = begin_badly(c, weight);
  if (status == QM_OK) status = qm_affine_check(c, info, size);
  if (OFFENCE == WRONG_NAMES) return emit_badly(c, info, out);
  if (status == QM_OK) status = qm_affine_emit(c, info, bits, size, out);
  if (status != QM_OK && OFFENCE == FORGETS_WHY) {
    return c->fail(c, QM_INTERNAL, "something went wrong");
  }
  if (status == QM_OK) status = describe_badly(c, info, out);
  if (status != QM_OK || OFFENCE == LISTS_SCRATCH) return status;
  for (int64_t g = 0; g < info->out_features * cols / n; ++g) {
    const int64_t row = g * n / cols, first = g * n % cols;
    const float* w = (const float*)weight->data + row * weight->stride[0] + first;
    status = round_group(c, info, w, g, first, n, out);
    if (status != QM_OK) return status;
    const int stop = first == 0 && c->progress(c, (double)row / (double)info->out_features) != 0;
    if (stop && OFFENCE != IGNORES_CANCEL) return QM_CANCELLED;
  }
  if (OFFENCE == WRITES_PAST_END) {
    uint8_t* zero = (uint8_t*)out->tensors[2].tensor.data;
    zero[info->out_features * cols / n] = 7;
  }
  return QM_OK;
}

/* ---- descriptor ---- */
static const qm_quantize_linear kQuantize = {
    sizeof kQuantize + (OFFENCE == WRONG_TABLE_SIZE ? 1024 : 0), plan,
#if OFFENCE_MAY_THROW
    reinterpret_cast<decltype(qm_quantize_linear::run)>(run),
#else
    run,
#endif
    NULL};
static const void* ext(const qm_method* m, const char* id) QM_NOEXCEPT {
  (void)m;
  const size_t length = OFFENCE == MATCHES_PREFIX ? strlen(QM_EXT_QUANTIZE_LINEAR) : 1000;
  return strncmp(id, QM_EXT_QUANTIZE_LINEAR, length) == 0 ? &kQuantize : NULL;
}
static const qm_method kMethod = {sizeof kMethod,
                                  "org.example.rounding",
                                  "0.1.0",
                                  "Round to nearest",
                                  kOptions,
                                  2,
                                  QM_METHOD_DETERMINISTIC,
                                  ext};
static const qm_method* const kMethods[] = {&kMethod};
static const qm_plugin kPlugin = {sizeof kPlugin, QM_ABI_MAJOR, QM_ABI_MINOR, 0,     1,
                                  kMethods,       "example",    "Apache-2.0", "none"};
static const qm_plugin kOther = {sizeof kOther, QM_ABI_MAJOR, QM_ABI_MINOR, 0,     1,
                                 kMethods,      "other",      "Apache-2.0", "none"};

QM_EXPORT const qm_plugin* qm_plugin_entry_v1(void);
const qm_plugin* qm_plugin_entry_v1(void) {
  static int entries;
  if (OFFENCE == PRINTS_IN_ENTRY) {
    fprintf(stderr, "hello\n");
  }
  return OFFENCE == CHANGES_DESCRIPTOR && ++entries > 1 ? &kOther : &kPlugin;
}

#if EXPORTS_ANOTHER
QM_EXPORT int rounding_version(void);
int rounding_version(void) { return 1; }
#endif
