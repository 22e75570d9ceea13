// qm.fmt.affine-int/1 (plugin_api/FORMATS.md) inside this plugin: its parameters, a checked view of
// its tensors, and the entry points of the files beside this one.
#ifndef QUANTMILL_PLUGINS_AFFINE_AFFINE_H_
#define QUANTMILL_PLUGINS_AFFINE_AFFINE_H_

#include <cstdint>
#include <string>

#include "quantmill/format.h"
#include "quantmill/linear_kernel.h"
#include "quantmill/sdk/affine_int.hpp"
#include "quantmill/sdk/plugin.hpp"
#include "quantmill/sdk/tensor.hpp"

namespace affine {

// For tensors in host memory.
inline constexpr qm_device kHost = {QM_CPU, 0};

enum class Zero { kNone, kInt, kFloat, kQ8 };

struct Params {
  int bits = 4;
  int64_t group_size = -1;
  Zero zero = Zero::kNone;
  int axis = 1;           // 0: groups of outputs
  bool q8_scale = false;  // scales as bytes with ranges
};

// Scales that share a range when they are bytes.
inline constexpr int64_t kQ8Block = 128;

// Parameters from canonical JSON. On failure `why` says what is wrong.
bool ParseParams(const char* json, Params* out, std::string* why);
std::string ParamsJson(const Params& params);

// A packed weight as pointers. Three layouts:
//  - the format's own: codes, scale [out, groups], zero [out, groups], group_index or null;
//  - sorted (prepacked on the CPU): the same without group_index, the columns sorted by group;
//    column i of it is input channel permutation[i];
//  - tiles (prepacked on CUDA, see affine_tiles.h): tiles instead of codes, scale and zero as
//    [strips, groups x 16], permutation or null; what was stored as bytes is f32 there.
struct Weight {
  Params params;
  int64_t out = 0, in = 0;
  int64_t groups = 0;      // per row; axis 0: per column
  int64_t group_size = 0;  // -1 resolved: in / groups; axis 0: out / groups
  int64_t words = 0;       // per row of codes
  const int32_t* codes = nullptr;
  const uint32_t* tiles = nullptr;
  const void* scale = nullptr;
  qm_dtype scale_dtype = QM_F32;
  const void* zero = nullptr;  // null for Zero::kNone
  qm_dtype zero_dtype = QM_U8;
  const float* scale_range = nullptr;  // step and offset per kQ8Block scales; null unless bytes
  const float* zero_range = nullptr;   // step and offset; null unless bytes
  const int32_t* group_index = nullptr;
  const int32_t* permutation = nullptr;

  int middle() const { return 1 << (params.bits - 1); }
  // Shape of scale and zero in the format's own layout: [out, groups]; axis 0: [groups, in].
  int64_t scale_rows() const { return params.axis == 1 ? out : groups; }
  int64_t scale_columns() const { return params.axis == 1 ? groups : in; }
};

// Structure only (names, dtypes, shapes, parameters); values are looked at by CheckValues.
// `prepacked`: also accept what Prepack returned.
qm_status ReadWeight(qm_call* call, const qm_packed& packed, bool prepacked, Weight* out);
// The ranges FORMATS.md asks for. Host memory.
qm_status CheckValues(qm_call* call, const Weight& weight);

// ---- CPU (affine_ref.cc, affine_cpu.cc, affine_cpu_*.cc) ----------------------------------------
float LoadScalar(const void* data, qm_dtype dtype, int64_t index);
// Scale and zero point of one group, in f32.
struct ScaleZero {
  float scale, zero;
};
// Of element `index` of the scale tensor.
ScaleZero LoadScaleZeroAt(const Weight& weight, int64_t index);
// Of (row, group), axis 1.
inline ScaleZero LoadScaleZero(const Weight& weight, int64_t row, int64_t group) {
  return LoadScaleZeroAt(weight, row * weight.groups + group);
}
// Unpacks the first `count` codes of a row.
void UnpackCodes(const int32_t* row, int64_t count, int bits, uint8_t* codes);
// One row in f32, columns as stored. `codes` is room for `in` bytes.
void DequantizeRow(const Weight& weight, int64_t row, uint8_t* codes, float* out);

qm_status CpuDequantize(qm_call* call, const Weight& weight, qm_tensor* out);
qm_status CpuPrepack(qm_call* call, const qm_packed& packed, const Weight& weight, qm_packed* out);
qm_status CpuMatmul(qm_call* call, const Weight& weight, const qm_tensor& x, qm_tensor* y);

// Rows at most for which the fused products pay; above, the host dequantizes.
inline constexpr int64_t kCpuMaxRows = 8;

// Instruction sets of the fused product; kPortable unpacks a row and multiplies.
enum class CpuLevel { kPortable, kAvx2, kAvx512 };
CpuLevel DetectCpuLevel();
// Lowers the level used from now on (tests compare the paths); kAvx512 restores the detected one.
void LimitCpuLevel(CpuLevel limit);

// What the fused products of one call share. Words are taken `lanes` at a time; x is rearranged so
// that field j of all lanes meets contiguous values: x[row][block][j][lane], zero beyond `in`.
struct FusedInput {
  const Weight* weight;
  const float* x;        // [rows, row_stride]
  int64_t row_stride;    // blocks * fields * lanes
  const int32_t* group;  // [blocks * lanes]: group of each word
  int64_t blocks;
  bool uniform;  // every block lies in one group
};
// y[r * ldy + o] for rows r < M of x and outputs o in [begin, end). scale, zero: room for `groups`
// floats each.
void FusedRowsAvx2(const FusedInput& input, int m, int64_t begin, int64_t end, float* scale,
                   float* zero, float* y, int64_t ldy);
void FusedRowsAvx512(const FusedInput& input, int m, int64_t begin, int64_t end, float* scale,
                     float* zero, float* y, int64_t ldy);

// Columns in stable order of their group, when every group has equally many; false otherwise.
bool SortByGroup(const int32_t* group_index, int64_t in, int64_t groups, int32_t* permutation);

// ---- checkpoint targets (affine_checkpoint.cc; affine_hqq.cc, affine_awq.cc) -------------------
qm_status CanStore(qm_call* call, const char* target, const char* format_json, int64_t out,
                   int64_t in);
qm_status ToCheckpoint(qm_call* call, const char* target, const char* layer,
                       const qm_packed& packed, const qm_named_tensor** out, uint64_t* count,
                       const char** config_json);
qm_status FromCheckpoint(qm_call* call, const char* target, const char* layer,
                         const qm_named_tensor* tensors, uint64_t count, const char* config_json,
                         qm_packed* out);
inline constexpr const char* kTargets[] = {"gptq", "gptq_v2", "compressed-tensors", "hqq", "awq"};
const qm_tensor* FindTensor(const qm_named_tensor* tensors, uint64_t count, const char* name);

// A tensor of a layer that must be there, contiguous, with this rank and one of these dtypes.
qm_status Need(qm_call* call, const char* layer, const qm_named_tensor* tensors, uint64_t count,
               const char* name, int32_t rank, std::initializer_list<qm_dtype> dtypes,
               const qm_tensor** out);
qm_status NeedShape(qm_call* call, const char* layer, const char* name, const qm_tensor& tensor,
                    int64_t rows, int64_t columns);
// Refuses float zero points, groups of outputs and scales as bytes.
qm_status NeedIntegerZeros(qm_call* call, const char* target, const Params& p);
// Checks bits and group size read from a file against a weight [out, in].
qm_status CheckParams(qm_call* call, const char* layer, const Params& p, int64_t in);
// [rows, columns] -> [columns, rows] for elements of 1, 2 or 4 bytes.
void Transpose(const void* source, int64_t rows, int64_t columns, int64_t element, void* target);

class Emitter;
qm_status AwqStorable(qm_call* call, const Params& params, int64_t out);
qm_status ToAwq(qm_call* call, const char* layer, const Weight& weight, Emitter* emitter,
                std::string* config);
qm_status FromAwq(qm_call* call, const char* layer, const qm_named_tensor* tensors, uint64_t count,
                  const char* config_json, qm_packed* out);
qm_status HqqStorable(qm_call* call, const Params& params, int64_t out, int64_t in);
qm_status ToHqq(qm_call* call, const char* layer, const Weight& weight, Emitter* emitter,
                std::string* config);
qm_status FromHqq(qm_call* call, const char* layer, const qm_named_tensor* tensors, uint64_t count,
                  qm_packed* out);

// ---- results ------------------------------------------------------------------------------------
// Collects emitted tensors and their names.
class Emitter {
 public:
  explicit Emitter(qm_call* call) : call_(call) {}
  qm_status Emit(const char* name, qm_device device, qm_dtype dtype,
                 std::initializer_list<int64_t> shape, qm_tensor* out);
  // Emits a copy of host memory.
  qm_status EmitCopy(const char* name, const qm_tensor& source);
  // The tensors emitted so far, in scratch.
  qm_status Finish(const qm_named_tensor** tensors, uint64_t* count);
  qm_status FinishPacked(const std::string& format_json, int64_t out_features, int64_t in_features,
                         qm_packed* packed);

 private:
  static constexpr int kMaxTensors = 20;
  qm_call* call_;
  qm_named_tensor tensors_[kMaxTensors] = {};
  int count_ = 0;
};
// Bytes of a contiguous tensor.
int64_t Bytes(const qm_tensor& tensor);
bool IsContiguous(const qm_tensor& tensor);

}  // namespace affine

#endif  // QUANTMILL_PLUGINS_AFFINE_AFFINE_H_
