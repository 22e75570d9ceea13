// Packed weights to try kernels and formats on.
#ifndef QUANTMILL_SDK_CHECK_PACKED_SAMPLES_H_
#define QUANTMILL_SDK_CHECK_PACKED_SAMPLES_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "core/formats/packed.h"
#include "sdk/check/case.h"

namespace quantmill::check {

struct PackedSample {
  std::string name;  // of the parameters and the shape, for messages
  PackedWeight packed;
};

// Weights on the host of every format there is a source for: drawn at random where the reference of
// the format is built in (all widths, kinds of zero point and group sizes, odd shapes, scattered
// groups), else what the plugin's own quantizers make of a synthetic layer, with their defaults and
// each choice of an option `bits`. `format_id`: only of this format; "" = of any.
absl::StatusOr<std::vector<PackedSample>> MakePackedSamples(Subject& subject,
                                                            const std::string& format_id = "");

// Those of one format with a reference, on the host; samples_*.cc.
absl::StatusOr<std::vector<PackedSample>> AffineSamples(uint64_t seed);
absl::StatusOr<std::vector<PackedSample>> CodebookSamples(uint64_t seed);
absl::StatusOr<std::vector<PackedSample>> Int8RowSamples(uint64_t seed);
absl::StatusOr<std::vector<PackedSample>> Float8Samples(uint64_t seed);
// samples_additive_codebook.cc.
absl::StatusOr<std::vector<PackedSample>> AdditiveCodebookSamples(uint64_t seed);

// F32 [out, in] on the host: by the reference of the format where that is built in, else by the
// best kernel of the subject's formats.
absl::StatusOr<Tensor> DequantizeOnHost(Subject& subject, const PackedWeight& packed);

// "" when both are equal: format, parameters, shape, and every tensor bit by bit (in any order);
// else the first difference.
std::string PackedDifference(const PackedWeight& a, const PackedWeight& b);

}  // namespace quantmill::check

#endif  // QUANTMILL_SDK_CHECK_PACKED_SAMPLES_H_
