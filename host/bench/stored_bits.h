// How large the linears of a checkpoint are, packed or not.
#ifndef QUANTMILL_HOST_BENCH_STORED_BITS_H_
#define QUANTMILL_HOST_BENCH_STORED_BITS_H_

#include <string>

#include "absl/status/statusor.h"

namespace quantmill {

// Bits stored for the linears of the blocks, over their weights: codes, scales, zero points,
// codebooks and indices of packed ones, and the weights of those left dense. Unlike the
// bits_per_weight of `run`, which counts the packed ones alone, it compares pipelines that leave
// different layers dense. Reads headers only.
absl::StatusOr<double> StoredBitsPerWeight(const std::string& directory);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_BENCH_STORED_BITS_H_
