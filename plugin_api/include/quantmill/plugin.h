/* quantmill plugin ABI, major 1: descriptor, tensors, one open call.  Pure C11, no dependency but
 * the C standard headers.
 *
 * Two kinds of struct live in these headers (RULES.md, QM-A-003):
 *   FROZEN   never changes within a major; may appear by value and in arrays.
 *   GROWABLE starts with struct_size; only ever passed by pointer, one at a time.  New fields go
 *            at the end.  Test QM_HAS(ptr, field) before touching a field newer than minor 0.
 * Every struct is free of implicit padding, so each new field changes sizeof.
 *
 * Thread tags: [scan] inspect-only: no CUDA, no thread, no I/O, no allocation.  [call] inside one
 * plugin call, on the thread the host called from.  [any] callable from any thread while the call
 * is open.
 *
 * Strings are UTF-8 and end in NUL.  Sizes are in bytes, extents and strides in elements. */
#ifndef QUANTMILL_PLUGIN_H_
#define QUANTMILL_PLUGIN_H_

#include <stddef.h>
#include <stdint.h>

#define QM_ABI_MAJOR 1u
#define QM_ABI_MINOR 1u
#define QM_MAX_RANK 4

#ifdef __cplusplus
#define QM_NOEXCEPT noexcept /* part of the type since C++17: a throwing function fits no slot */
#define QM_EXTERN_C extern "C"
extern "C" {
#else
#define QM_NOEXCEPT
#define QM_EXTERN_C extern
#endif

#if defined(_WIN32)
#define QM_EXPORT QM_EXTERN_C __declspec(dllexport)
#else
#define QM_EXPORT QM_EXTERN_C __attribute__((visibility("default")))
#endif

/* ---- status ----------------------------------------------------------------------------------
 * Numeric values equal those of absl::StatusCode. */
typedef int32_t qm_status;
enum {
  QM_OK = 0,
  QM_CANCELLED = 1,
  QM_UNKNOWN = 2,
  QM_INVALID_ARGUMENT = 3,
  QM_NOT_FOUND = 5,
  QM_RESOURCE_EXHAUSTED = 8,
  QM_FAILED_PRECONDITION = 9,
  QM_UNIMPLEMENTED = 12,
  QM_INTERNAL = 13
};

/* ---- tensors ---------------------------------------------------------------------------------
 * Storage type.  Codes of fewer than 8 bits travel as U8 or I32 words; a format id (FORMATS.md)
 * says how to read them. */
typedef int32_t qm_dtype;
enum {
  QM_F32 = 1,
  QM_F16 = 2,
  QM_BF16 = 3,
  QM_F64 = 4,
  QM_F8_E4M3 = 5,
  QM_F8_E5M2 = 6,
  QM_I8 = 16,
  QM_U8 = 17,
  QM_I16 = 18,
  QM_I32 = 19,
  QM_I64 = 20
};

typedef int32_t qm_device_kind; /* values as in DLPack */
enum { QM_CPU = 1, QM_CUDA = 2, QM_CUDA_PINNED = 3 };

typedef struct qm_device { /* FROZEN */
  qm_device_kind kind;     /* QM_CPU, QM_CUDA */
  int32_t index;           /* CUDA ordinal; 0 on the CPU */
} qm_device;

/* A view: owns nothing, has no lifetime of its own.  Shape and strides are inline, so a copy of the
 * struct is as good as the original.  Bases handed out by the host are 256-byte aligned. */
typedef struct qm_tensor {     /* FROZEN, 112 bytes */
  void* data;                  /* first element; NULL iff some extent is 0 */
  qm_dtype dtype;              /* of the elements */
  int32_t rank;                /* 0..QM_MAX_RANK */
  qm_device device;            /* where data lies */
  int64_t shape[QM_MAX_RANK];  /* unused entries are 1 */
  int64_t stride[QM_MAX_RANK]; /* in elements; unused entries are 0 */
  uint64_t flags;              /* QM_TENSOR_* */
  uint64_t reserved[2];        /* zero */
} qm_tensor;
#define QM_TENSOR_READONLY (UINT64_C(1) << 0)

typedef struct qm_named_tensor { /* FROZEN */
  const char* name;              /* by format or service */
  qm_tensor tensor;              /* the view */
} qm_named_tensor;

/* ---- one open call ---------------------------------------------------------------------------
 * Owned by the host, alive for one plugin call.  Everything reached through it (scratch, strings,
 * option values, extension tables) dies when the plugin returns; only what was emitted lives on. */
typedef struct qm_call qm_call;
struct qm_call { /* GROWABLE */
  uint64_t struct_size;
  void* host_data; /* the host's; plugins leave it alone */
  /* Records an error message (copied) and returns `code`, so that a plugin writes
   * `return c->fail(c, QM_INVALID_ARGUMENT, "...")`.  Say what is wrong and what would be right.
   * [any] */
  qm_status (*fail)(qm_call*, qm_status code, const char* message) QM_NOEXCEPT;
  /* Severity: 0 debug, 1 info, 2 warning.  [any] */
  void (*log)(qm_call*, int32_t severity, const char* message) QM_NOEXCEPT;
  /* Reports progress in [0, 1]; negative means "alive, no news".  Nonzero result: stop soon and
   * return QM_CANCELLED.  Call it at least every two seconds of work.  [any] */
  int32_t (*progress)(qm_call*, double fraction) QM_NOEXCEPT;
  /* Scratch memory on `device`, 256-byte aligned, content undefined, freed by the host after the
   * call.  On CUDA it is stream-ordered: valid for all work queued on cuda_stream before return.
   * NULL when the plan's bound or the device's memory is used up.  [call] */
  void* (*scratch)(qm_call*, qm_device device, uint64_t bytes)QM_NOEXCEPT;
  /* Memory for one result tensor that outlives the call; fills *out (contiguous, content
   * undefined).  `item` is the index of the linear in a group call, else 0.  `name` must be one
   * the format knows; a second emit of one (item, name) is an error.  [call] */
  qm_status (*emit)(qm_call*, uint64_t item, const char* name, qm_device device, qm_dtype dtype,
                    int32_t rank, const int64_t* shape, qm_tensor* out) QM_NOEXCEPT;
  /* Validated option values with defaults filled in.  BOOL reads as 0 or 1 through opt_i64; ENUM
   * and STR through opt_str.  An unknown name gives 0, 0.0 or "".  [any] */
  int64_t (*opt_i64)(qm_call*, const char* name) QM_NOEXCEPT;
  /* F64; see opt_i64.  [any] */
  double (*opt_f64)(qm_call*, const char* name) QM_NOEXCEPT;
  /* ENUM and STR; see opt_i64.  [any] */
  const char* (*opt_str)(qm_call*, const char* name)QM_NOEXCEPT;
  uint64_t seed;     /* from (run seed, stage, layer name): independent of the order of layers */
  qm_device device;  /* where to work; already current on CUDA */
  void* cuda_stream; /* cudaStream_t, the same pointer type as CUstream; NULL on the CPU */
  /* A host service by id ("qm.host.threads/1", host_ext.h), or NULL.  [any] */
  const void* (*host_ext)(qm_call*, const char* id)QM_NOEXCEPT;
};

/* ---- descriptor ------------------------------------------------------------------------------ */
typedef int32_t qm_option_type;
enum { QM_OPT_I64 = 1, QM_OPT_F64 = 2, QM_OPT_STR = 3, QM_OPT_ENUM = 4, QM_OPT_BOOL = 5 };

typedef struct qm_option {   /* FROZEN */
  const char* name;          /* as in a pipeline file */
  const char* default_value; /* text form ("4", "0.01", "false", "nf4"); NULL = required */
  const char* choices;       /* ENUM: "a|b|c"; numbers: "min..max" or "2|3|4|8"; else NULL */
  const char* doc;           /* one sentence with units */
  qm_option_type type;       /* QM_OPT_* */
  int32_t reserved;          /* zero */
} qm_option;

typedef struct qm_method qm_method;
struct qm_method { /* GROWABLE */
  uint64_t struct_size;
  const char* id;           /* "gptq"; third parties: "org.example.gptq-plus" */
  const char* version;      /* semver of the method, not of the ABI */
  const char* summary;      /* one line */
  const qm_option* options; /* static array */
  uint64_t option_count;    /* entries of options */
  uint64_t flags;           /* QM_METHOD_* */
  /* Static capability table for an id such as QM_EXT_QUANTIZE_LINEAR, or NULL.  [scan][any] */
  const void* (*ext)(const qm_method*, const char* id)QM_NOEXCEPT;
};
/* Same input, seed and device model give the same bytes. */
#define QM_METHOD_DETERMINISTIC (UINT64_C(1) << 0)
/* Offers formats or kernels only; a pipeline stage cannot `use` it. */
#define QM_METHOD_NO_STAGE (UINT64_C(1) << 1)

typedef struct qm_plugin { /* GROWABLE */
  uint64_t struct_size;
  uint32_t abi_major;              /* of the header it was compiled against */
  uint32_t abi_minor;              /* of the same */
  uint32_t min_host_minor;         /* oldest host minor it can live with */
  uint32_t method_count;           /* entries of methods */
  const qm_method* const* methods; /* static array */
  const char* vendor;              /* who made it */
  const char* license;             /* SPDX */
  const char* build_info;          /* compiler, CUDA version, SM list */
} qm_plugin;

/* The one exported symbol.  The major is in the name, so one file can serve two majors.  Returns a
 * pointer to static data.  [scan] */
typedef const qm_plugin* (*qm_plugin_entry_v1_fn)(void);
#define QM_ENTRY_SYMBOL "qm_plugin_entry_v1"

/* ---- packed weight ---------------------------------------------------------------------------
 * A linear's weight [out_features, in_features] in some format. */
typedef struct qm_packed { /* FROZEN */
  const char* format_id;   /* "qm.fmt.affine-int/1": says what the tensors mean */
  const char* format_json; /* parameters of the format: JSON object, keys sorted, no spaces */
  const qm_named_tensor* tensors; /* names fixed by the format */
  uint64_t tensor_count;          /* entries of tensors */
  int64_t out_features;           /* rows of the weight */
  int64_t in_features;            /* columns */
} qm_packed;

/* True if `table` (GROWABLE, from the other side) is new enough to hold `field` and has it set. */
#define QM_HAS(table, field)                                                                    \
  ((table) &&                                                                                   \
   (table)->struct_size >= (uint64_t)(((const char*)(&(table)->field) - (const char*)(table)) + \
                                      (ptrdiff_t)sizeof((table)->field)) &&                     \
   (table)->field)

#ifdef __cplusplus
}
#endif
#endif /* QUANTMILL_PLUGIN_H_ */
