// What the parts of the plugin share: options, shapes, and the operations that exist on the CPU and
// as CUDA kernels. Arithmetic is f32; x and the results of forward are f32, f16 or bf16.
#ifndef QUANTMILL_PLUGINS_OFTQ_OFTQ_H_
#define QUANTMILL_PLUGINS_OFTQ_OFTQ_H_

#include <cstdint>
#include <string>
#include <string_view>

#include "quantmill/reparametrize.h"
#include "quantmill/sdk/status.hpp"

namespace quantmill::oftq {

constexpr int64_t kMaxBlock = 128;  // three matrices of a block fit a GPU's shared memory
constexpr int64_t kMaxTerms = 64;
constexpr int64_t kMaxRank = 4096;

struct Options {
  bool lora = false;
  int64_t block = 32;
  int64_t neumann_terms = 5;  // 0 = the exact transform
  int64_t rank = 8;
  double alpha = 16.0;
  std::string target;
  bool merge = false;
};

// INVALID_ARGUMENT for a value outside its range.
qm_status ReadOptions(qm_call* call, Options* out);

// Whether one of the comma-separated patterns (`*` any text, `?` any character) names the linear:
// its whole name or the last part of it.
bool Targets(std::string_view patterns, std::string_view linear);

// The divisor of in_features that PEFT takes for `block` (peft 0.21.2, tuners/oft/layer.py,
// adjust_oft_parameters): the nearest one, the lower of two; all of in_features if block is larger.
int64_t NearestBlock(int64_t in_features, int64_t block);

// ---- orthogonal --------------------------------------------------------------------------------

// The rotation in front of one linear.
struct Rotation {
  int64_t in_features = 0;
  int64_t block = 0;  // divides in_features
  int64_t terms = 0;  // 0 = exact

  int64_t blocks() const { return in_features / block; }
  // Stored numbers of a block: the strict upper triangle, row by row.
  int64_t numbers() const { return block * (block - 1) / 2; }
  int64_t elements() const { return in_features * block; }  // of R, [blocks, block, block]
};

// Contiguous rows of x or of a result.
struct Rows {
  void* data = nullptr;
  qm_dtype dtype = QM_F32;
  int64_t rows = 0;
};

// R [blocks, b, b] from the stored numbers q [blocks, numbers].
qm_status BuildRotation(qm_call* call, const Rotation& rotation, const float* q, float* r);
// out = in R of each block (transposed: in R^T), added to what is there if `accumulate` (f32 only).
// in and out have equal dtypes. scratch: RotateScratch(rotation) floats.
qm_status Rotate(qm_call* call, const Rotation& rotation, const float* r, bool transposed,
                 const Rows& in, bool accumulate, const Rows& out, float* scratch);
int64_t RotateScratch(qm_device_kind device, const Rotation& rotation);
// d_q += the gradient for out = in R(q); d_out is f32. scratch: GradientScratch floats.
qm_status RotationGradient(qm_call* call, const Rotation& rotation, const float* q, const float* r,
                           const Rows& in, const float* d_out, float* d_q, float* scratch);
int64_t GradientScratch(qm_device_kind device, const Rotation& rotation);

// ---- products of low rank ----------------------------------------------------------------------

// Element (i, j) is data[i * row_stride + j * column_stride]; one of the strides is 1.
struct Operand {
  const void* data = nullptr;
  qm_dtype dtype = QM_F32;
  int64_t row_stride = 0, column_stride = 0;
};
inline Operand RowMajor(const void* data, qm_dtype dtype, int64_t columns) {
  return {data, dtype, columns, 1};
}
inline Operand Transposed(const Operand& a) {
  return {a.data, a.dtype, a.column_stride, a.row_stride};
}

// c [m, n] = scale a [m, k] b [k, n], added to what is there if `accumulate` (f32 only). c is
// row-major without gaps.
struct Product {
  int64_t m = 0, n = 0, k = 0;
  Operand a, b;
  float scale = 1.0f;
  void* c = nullptr;
  qm_dtype c_dtype = QM_F32;
  bool accumulate = false;
};

// scratch: ProductScratch floats, where `numbers` is the most elements that a b with strided rows
// (column_stride != 1) has.
qm_status Multiply(qm_call* call, const Product& product, float* scratch);
int64_t ProductScratch(qm_device_kind device, int64_t numbers);

// ---- both --------------------------------------------------------------------------------------

// values[i] = uniform in [-bound, bound), from seed and i alone; the same on every device.
qm_status FillUniform(qm_call* call, uint64_t seed, float bound, float* values, int64_t count);
qm_status FillZero(qm_call* call, float* values, int64_t count);
// The index of the first value that is NaN or infinite, or -1. Waits for the stream.
qm_status FindNotFinite(qm_call* call, const float* values, int64_t count, int64_t* index);
qm_status Copy(qm_call* call, const float* from, float* to, int64_t count);

// ---- adapters of PEFT (adapter.cc) -------------------------------------------------------------

// See qm_reparametrize: to_adapter, from_adapter.
qm_status ToAdapter(qm_call* call, const char* target, const char** config_json);
qm_status FromAdapter(qm_call* call, const char* target, const char* config_json,
                      const char** options_json);

}  // namespace quantmill::oftq

#endif  // QUANTMILL_PLUGINS_OFTQ_OFTQ_H_
