// qm.fmt.affine-int/1 (plugin_api/FORMATS.md): parameters, checks, and the slow reference every
// kernel is compared with.
#ifndef QUANTMILL_CORE_FORMATS_AFFINE_INT_H_
#define QUANTMILL_CORE_FORMATS_AFFINE_INT_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "core/formats/packed.h"

namespace quantmill {

inline constexpr std::string_view kAffineIntId = "qm.fmt.affine-int/1";

struct AffineIntParams {
  enum class Zero { kNone, kInt, kFloat, kQ8 };
  int bits = 4;
  int64_t group_size = -1;
  Zero zero = Zero::kNone;
  int axis = 1;           // 1: groups of input channels; 0: of every (out / group_size)-th output
  bool q8_scale = false;  // scales as bytes with a range per 128
  // Groups per row (axis 1); in_features must be a multiple of group_size.
  int64_t Groups(int64_t in_features) const {
    return group_size == -1 ? 1 : in_features / group_size;
  }
  // Shape of scale and zero of a weight [out, in].
  Shape GroupShape(int64_t out_features, int64_t in_features) const {
    if (axis == 1) return {out_features, Groups(in_features)};
    return {Groups(out_features), in_features};
  }
};

// Scales that share a range when they are stored as bytes.
inline constexpr int64_t kQ8Block = 128;

// {"bits":4,"group_size":128,"zero":"int"}
std::string AffineIntJson(const AffineIntParams& params);
// INVALID_ARGUMENT for a key that is missing, unknown or out of range, and for text that is not in
// canonical form.
absl::StatusOr<AffineIntParams> ParseAffineIntJson(std::string_view json);

// Words per row of the bit stream.
int64_t PackedWords(int64_t count, int bits);
// Little-endian bit stream: value i at bits i*bits .. i*bits+bits-1. `words` has room for
// PackedWords(count, bits); unused bits become 0. Values must be below 2^bits.
void PackBits(const uint8_t* values, int64_t count, int bits, int32_t* words);
void UnpackBits(const int32_t* words, int64_t count, int bits, uint8_t* values);

// Names, dtypes, shapes, parameters and values (zero points and group indices in range, scales
// positive and finite, unused bits 0). Tensors must be on the host.
absl::Status CheckAffineInt(const PackedWeight& weight);

// w[o, i] as FORMATS.md defines it, into F32, F16 or BF16 [out, in] host memory. Checks first.
absl::Status DequantizeAffineIntReference(const PackedWeight& weight, Tensor* out);

// A weight from unpacked parts. codes: U8 [out, in]; the others as in the format (all but scale may
// be empty).
absl::StatusOr<PackedWeight> MakeAffineInt(const AffineIntParams& params, const Tensor& codes,
                                           const Tensor& scale, const Tensor& zero,
                                           const Tensor& group_index,
                                           const Tensor& scale_range = Tensor(),
                                           const Tensor& zero_range = Tensor());

}  // namespace quantmill

#endif  // QUANTMILL_CORE_FORMATS_AFFINE_INT_H_
