// qm.fmt.codebook-absmax/1 (plugin_api/FORMATS.md) inside this plugin: its parameters, a checked
// view of its tensors, and the entry points of the files beside this one.
#ifndef QUANTMILL_PLUGINS_NF4_NF4_H_
#define QUANTMILL_PLUGINS_NF4_NF4_H_

#include <cstdint>
#include <string>

#include "quantmill/format.h"
#include "quantmill/linear_kernel.h"
#include "quantmill/sdk/plugin.hpp"
#include "quantmill/sdk/tensor.hpp"

namespace quantmill::nf4 {

inline constexpr char kFormatId[] = "qm.fmt.codebook-absmax/1";
inline constexpr char kTarget[] = "bitsandbytes";
// For tensors in host memory.
inline constexpr qm_device kHost = {QM_CPU, 0};

struct Params {
  bool fp4 = false;
  int64_t block_size = 64;
  int64_t nested_block_size = 0;  // 0: factors are floats
  qm_dtype dtype = QM_BF16;       // of the weight before

  int64_t Blocks(int64_t weights) const { return (weights + block_size - 1) / block_size; }
  // nested_block_size > 0
  int64_t NestedBlocks(int64_t weights) const {
    return (Blocks(weights) + nested_block_size - 1) / nested_block_size;
  }
};

// Block sizes are powers of two in this range.
inline constexpr int64_t kSmallestBlock = 32, kLargestBlock = 4096;
bool ValidBlockSize(int64_t size);

// Parameters from canonical JSON. On failure `why` says what is wrong.
bool ParseParams(const char* json, Params* out, std::string* why);
std::string ParamsJson(const Params& params);
// All bits of the packed tensors over the weights.
double BitsPerWeight(const Params& params, int64_t weights);
const char* DTypeText(qm_dtype dtype);  // "bf16", "f16" or "f32"

// A packed weight as pointers, on one device.
struct Weight {
  Params params;
  int64_t out = 0, in = 0;
  const uint8_t* codes = nullptr;
  const float* absmax = nullptr;         // null when nested
  const uint8_t* absmax_byte = nullptr;  // null unless nested, like the rest
  const float* codebook = nullptr;
  const float* nested_absmax = nullptr;
  const float* nested_codebook = nullptr;
  const float* absmax_offset = nullptr;
  // Prepacked for CUDA (nf4_tiles.h): tiles and one of the next two, instead of codes and factors.
  const uint8_t* tiles = nullptr;
  const float* tile_absmax = nullptr;
  const uint8_t* tile_absmax_byte = nullptr;

  int64_t weights() const { return out * in; }
  // Host memory.
  float AbsmaxOf(int64_t block) const {
    if (absmax != nullptr) return absmax[block];
    const float product =
        nested_codebook[absmax_byte[block]] * nested_absmax[block / params.nested_block_size];
    return product + absmax_offset[0];
  }
};

// Structure only (names, dtypes, shapes, parameters). `prepacked`: also accept what prepacking
// returned.
qm_status ReadWeight(qm_call* call, const qm_packed& packed, bool prepacked, Weight* out);
// Every float is finite. Host memory.
qm_status CheckValues(qm_call* call, const Weight& weight);

// ---- quantizing (method.cc, nf4_ref.cc, nf4.cu) ------------------------------------------------
// Tensors of the result on the call's device; of the nested ones data is null without double
// quantization.
struct Result {
  qm_tensor codes = {}, absmax = {}, codebook = {};
  qm_tensor nested_absmax = {}, nested_codebook = {}, absmax_offset = {};
};
// Fill `out` from weight [out, in]. INVALID_ARGUMENT names the first weight that is not finite;
// CANCELLED when progress says so.
qm_status QuantizeCpu(qm_call* call, const Params& params, qm::TensorView<const float> weight,
                      const Result& out);
qm_status QuantizeCuda(qm_call* call, const Params& params, qm::TensorView<const float> weight,
                       const Result& out);
// Scratch either path takes at most.
uint64_t CpuScratchBytes(const Params& params, int64_t weights);
uint64_t CudaScratchBytes(const Params& params, int64_t weights);
// Copies from host memory that outlives the call.
qm_status CopyToDevice(qm_call* call, const float* values, int64_t count, const qm_tensor& out);
// The codebook of a type, and of double quantized factors: the signed dynamic map, ascending.
const float* CodebookOf(bool fp4);
const float* ByteCodebook();

const qm_quantize_linear* QuantizeLinearTable();

// ---- CPU (nf4_cpu.cc, nf4_cpu_*.cc) ------------------------------------------------------------
// Rows at most for which the fused products pay; above, the host dequantizes.
inline constexpr int64_t kCpuMaxRows = 8;

qm_status CpuDequantize(qm_call* call, const Weight& weight, qm_tensor* out);
qm_status CpuMatmul(qm_call* call, const Weight& weight, const qm_tensor& x, qm_tensor* y);

// Instruction sets of the fused product; kPortable unpacks a row and multiplies.
enum class CpuLevel { kPortable, kAvx2, kAvx512 };
CpuLevel DetectCpuLevel();
// Lowers the level used from now on (tests compare the paths); kAvx512 restores the detected one.
void LimitCpuLevel(CpuLevel limit);

// What the fused products of one call share. x is rearranged so that the weights in the high and
// the low halves of `lanes` bytes meet contiguous values: x[row][chunk][even, odd][lane]; a chunk
// is 32 weights of a row.
struct FusedInput {
  const Weight* weight;
  const float* x;      // [rows, in]
  int64_t row_stride;  // in
};
// y[r * ldy + o] for rows r < m of x, m <= 4, and outputs o in [begin, end).
void FusedRowsAvx2(const FusedInput& input, int m, int64_t begin, int64_t end, float* y,
                   int64_t ldy);
void FusedRowsAvx512(const FusedInput& input, int m, int64_t begin, int64_t end, float* y,
                     int64_t ldy);

// ---- checkpoint target (nf4_checkpoint.cc) -----------------------------------------------------
qm_status CanStore(qm_call* call, const char* target, const char* format_json, int64_t out,
                   int64_t in);
qm_status ToCheckpoint(qm_call* call, const char* target, const char* layer,
                       const qm_packed& packed, const qm_named_tensor** out, uint64_t* count,
                       const char** config_json);
qm_status FromCheckpoint(qm_call* call, const char* target, const char* layer,
                         const qm_named_tensor* tensors, uint64_t count, const char* config_json,
                         qm_packed* out);

// ---- results -----------------------------------------------------------------------------------
// Collects emitted tensors and their names (which must outlive the call's end).
class Emitter {
 public:
  explicit Emitter(qm_call* call) : call_(call) {}
  // A vector, or with `columns` >= 0 a matrix.
  qm_status Emit(const char* name, qm_device device, qm_dtype dtype, int64_t rows, int64_t columns,
                 qm_tensor* out);
  qm_status Emit(const char* name, qm_device device, qm_dtype dtype, int64_t elements,
                 qm_tensor* out) {
    return Emit(name, device, dtype, elements, -1, out);
  }
  // A vector on the host, copied from host memory.
  qm_status EmitCopy(const char* name, qm_dtype dtype, int64_t elements, const void* data);
  // The tensors emitted so far, in scratch.
  qm_status Finish(const qm_named_tensor** tensors, uint64_t* count);
  qm_status FinishPacked(const Params& params, int64_t out_features, int64_t in_features,
                         qm_packed* packed);

 private:
  static constexpr int kMaxTensors = 8;
  qm_call* call_;
  qm_named_tensor tensors_[kMaxTensors] = {};
  int count_ = 0;
};
int64_t Elements(const qm_tensor& tensor);
bool IsContiguous(const qm_tensor& tensor);

}  // namespace quantmill::nf4

#endif  // QUANTMILL_PLUGINS_NF4_NF4_H_
