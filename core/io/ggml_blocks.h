// Tensor types of GGUF files: blocks of weights along a row, each with its own scale
// (ggml-org/ggml: include/ggml.h, src/ggml-common.h).
#ifndef QUANTMILL_CORE_IO_GGML_BLOCKS_H_
#define QUANTMILL_CORE_IO_GGML_BLOCKS_H_

#include <cstdint>
#include <string>
#include <string_view>

namespace quantmill {

enum class GgmlType : int32_t {
  kF32 = 0,
  kF16 = 1,
  kQ4_0 = 2,
  kQ4_1 = 3,
  kQ5_0 = 6,
  kQ5_1 = 7,
  kQ8_0 = 8,
  kQ4_K = 12,
  kQ5_K = 13,
  kQ6_K = 14,
  kBF16 = 30,
};

struct GgmlTypeInfo {
  int32_t type;
  std::string_view name;  // "Q4_K"
  int64_t block;          // weights of a block; 1 for plain numbers
  int64_t bytes;          // of a block
  bool readable;          // false: its size is known, its values are not

  bool Is(GgmlType other) const { return type == static_cast<int32_t>(other); }
  // F32, F16 or BF16.
  bool is_float() const { return Is(GgmlType::kF32) || Is(GgmlType::kF16) || Is(GgmlType::kBF16); }
};

// Null for a number that no type has.
const GgmlTypeInfo* FindGgmlType(int32_t type);
const GgmlTypeInfo* FindGgmlType(std::string_view name);
inline const GgmlTypeInfo& InfoOf(GgmlType type) {
  return *FindGgmlType(static_cast<int32_t>(type));
}
// "F32, F16, Q4_0, ..."
std::string ReadableGgmlTypes();

// Weights of `count` whole blocks of a readable type, in f32, in the order of operations of
// ggml's dequantize_row_* (ggml/src/ggml-quants.c), so with the same bits. `data` need not be
// aligned.
void DequantizeGgml(const GgmlTypeInfo& type, const void* data, int64_t count, float* out);

}  // namespace quantmill

#endif  // QUANTMILL_CORE_IO_GGML_BLOCKS_H_
