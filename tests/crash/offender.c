/* Rounds to nearest, int8 per row, until its option `misbehave` says otherwise. Overrides of a
 * pipeline choose the layer; `flag_file` makes it misbehave only while that file is not there. */
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "quantmill/all.h"

static qm_status plan(qm_call* c, const qm_linear_info* li, qm_quant_plan* out) {
  (void)li;
  if (strcmp(c->opt_str(c, "misbehave"), "refuse") == 0) {
    return c->fail(c, QM_INVALID_ARGUMENT, "this layer is not to my taste; use another method");
  }
  if (strcmp(c->opt_str(c, "misbehave"), "crash-in-plan") == 0) raise(SIGSEGV);
  static const qm_stat_request kStats[] = {{QM_STAT_HESSIAN, 0, QM_F32, 0}};
  if (c->opt_i64(c, "statistics")) out->stats = kStats, out->stat_count = 1;
  out->format_id = "qm.fmt.affine-int/1";
  return QM_OK;
}

/* Every frame is used after the call below it: no compiler makes a loop of this. */
static int descend(volatile int depth) { return depth < 0 ? 0 : descend(depth + 1) + depth; }

enum { kKept = 64 << 20 }; /* large enough for the allocator to give it back to the system */
static unsigned char* kept;

static void* scribble(void* memory) {
  const struct timespec pause_time = {0, 2 * 1000 * 1000};
  nanosleep(&pause_time, NULL);
  memset(memory, 0xFF, kKept);
  return NULL;
}

/* Keeps scratch memory for later: 1 = not to be had. */
static int keep_memory(qm_call* c, const qm_tensor* w) {
  kept = c->scratch(c, w->device, kKept);
  if (kept == NULL) return 1;
  if (strcmp(c->opt_str(c, "misbehave"), "late-write") == 0) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, scribble, kept) != 0) return 1;
    kept = NULL;
    return pthread_detach(thread);
  }
  return 0;
}

/* What ends the process or never comes back. */
static void take_down(const char* how) {
  if (strcmp(how, "segfault") == 0) raise(SIGSEGV);
  if (strcmp(how, "abort") == 0) abort();
  if (strcmp(how, "exit") == 0) _exit(9);
  if (strcmp(how, "exit-clean") == 0) exit(0);
  if (strcmp(how, "killed") == 0) raise(SIGKILL); /* as by the kernel, out of memory */
  if (strcmp(how, "recursion") == 0) descend(1);
  if (strcmp(how, "hang") == 0) {
    for (;;) pause();
  }
}

/* The first time only, when a flag file is named. */
static int due(qm_call* c) {
  const char* flag = c->opt_str(c, "flag_file");
  if (*flag == '\0') return 1;
  if (access(flag, F_OK) == 0) return 0;
  char command[4096] = "touch ";
  strncat(command, flag, sizeof command - strlen(command) - 1);
  return system(command) == 0;
}

static qm_status run(qm_call* c, const qm_linear_info* li, const qm_tensor* w, const qm_stats* s,
                     qm_packed* out) {
  (void)s;
  const char* misbehave = c->opt_str(c, "misbehave");
  if (kept != NULL) memset(kept, 0xFF, kKept); /* of an earlier call */
  if (strcmp(misbehave, "none") != 0 && due(c)) {
    take_down(misbehave);
    if (strcmp(misbehave, "keep-pointer") == 0 || strcmp(misbehave, "late-write") == 0) {
      if (keep_memory(c, w)) return c->fail(c, QM_RESOURCE_EXHAUSTED, "no memory to misuse");
    }
    if (strcmp(misbehave, "bare") == 0) return QM_INTERNAL;
    if (strcmp(misbehave, "fail") == 0) {
      return c->fail(c, QM_FAILED_PRECONDITION, "the moon is full; wait a week");
    }
    if (strcmp(misbehave, "slow") == 0) {
      const struct timespec pause_time = {0, 200 * 1000 * 1000};
      nanosleep(&pause_time, NULL);
    }
  }
  const int64_t n = li->out_features, k = li->in_features;
  const int64_t words = strcmp(misbehave, "short-codes") == 0  ? 1
                        : strcmp(misbehave, "huge-codes") == 0 ? INT64_C(1) << 40
                                                               : (k + 3) / 4;
  qm_tensor codes, scale;
  qm_status st = c->emit(c, 0, "codes", w->device, QM_I32, 2, (int64_t[]){n, words}, &codes);
  if (st) return st;
  st = c->emit(c, 0, "scale", w->device, QM_F32, 2, (int64_t[]){n, 1}, &scale);
  if (st) return st;
  memset(codes.data, 0, (size_t)(n * words) * 4);
  for (int64_t i = 0; i < n; ++i) {
    const float* row = (const float*)w->data + i * w->stride[0];
    float top = 0;
    for (int64_t j = 0; j < k; ++j) top = fmaxf(top, fabsf(row[j]));
    const float step = top > 0 ? top / 127.0f : 1.0f;
    ((float*)scale.data)[i] = strcmp(misbehave, "bad-scale") == 0 ? -step : step;
    uint8_t* bytes = (uint8_t*)codes.data + i * words * 4;
    for (int64_t j = 0; j < k && j < words * 4; ++j)
      bytes[j] = (uint8_t)(lrintf(row[j] / step) + 128);
  }
  qm_named_tensor* t = c->scratch(c, w->device, 2 * sizeof *t);
  if (!t) return c->fail(c, QM_RESOURCE_EXHAUSTED, "no scratch");
  t[0].name = "codes", t[0].tensor = codes, t[1].name = "scale", t[1].tensor = scale;
  const int64_t rows = strcmp(misbehave, "wrong-shape") == 0 ? n + 1 : n;
  if (strcmp(misbehave, "more-tensors") == 0) { /* says there are more than the array holds */
    *out = (qm_packed){"qm.fmt.affine-int/1", "{}", (const qm_named_tensor*)16, 40, n, k};
    return QM_OK;
  }
  *out = (qm_packed){
      "qm.fmt.affine-int/1", "{\"bits\":8,\"group_size\":-1,\"zero\":\"none\"}", t, 2, rows, k};
  return QM_OK;
}

static const qm_quantize_linear kQuantize = {sizeof kQuantize, plan, run, NULL};
static const void* ext(const qm_method* m, const char* id) {
  (void)m;
  return strcmp(id, QM_EXT_QUANTIZE_LINEAR) == 0 ? &kQuantize : NULL;
}
static const qm_option kOptions[] = {
    {"misbehave", "none",
     "none|refuse|crash-in-plan|segfault|abort|exit|exit-clean|killed|recursion|hang|keep-pointer|"
     "late-write|bare|fail|slow|bad-scale|wrong-shape|short-codes|huge-codes|more-tensors",
     "what to do wrong", QM_OPT_ENUM, 0},
    {"statistics", "false", NULL, "ask for a Hessian", QM_OPT_BOOL, 0},
    {"flag_file", "", NULL, "misbehave once: until this file exists", QM_OPT_STR, 0}};
static const qm_method kMethod = {sizeof kMethod,
                                  "org.example.offender",
                                  "0.1.0",
                                  "misbehaves on demand",
                                  kOptions,
                                  3,
                                  QM_METHOD_DETERMINISTIC,
                                  ext};
static const qm_method* const kMethods[] = {&kMethod};
static const qm_plugin kPlugin = {sizeof kPlugin, QM_ABI_MAJOR, QM_ABI_MINOR, 0,     1,
                                  kMethods,       "example",    "Apache-2.0", "none"};
QM_EXPORT const qm_plugin* qm_plugin_entry_v1(void);
const qm_plugin* qm_plugin_entry_v1(void) { return &kPlugin; }
