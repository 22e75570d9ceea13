// How far an approximation is from a reference: one definition for tests, benchmarks and the
// reports of a run.
#ifndef QUANTMILL_CORE_FORMATS_DISTORTION_H_
#define QUANTMILL_CORE_FORMATS_DISTORTION_H_

#include <cstdint>

#include "absl/status/statusor.h"
#include "core/tensor/tensor.h"

namespace quantmill {

struct Distortion {
  int64_t count = 0;
  double reference_energy = 0;    // sum of r^2
  double approximate_energy = 0;  // sum of a^2
  double dot = 0;                 // sum of r*a
  double error_energy = 0;        // sum of (a-r)^2
  double max_error = 0;           // largest |a-r|
  bool finite = true;             // no NaN or infinity on either side

  void Add(double reference, double approximate);
  // Sums of both; order of merging does not matter up to rounding.
  void Merge(const Distortion& other);

  // error_energy / reference_energy; 0 for two zero signals, infinity for a zero reference only.
  double nmse() const;
  // 10 log10(1 / nmse) in dB; infinity without error.
  double snr_db() const;
  // dot / sqrt(energies); 1 for two zero signals, 0 if only one is zero.
  double cosine() const;
};

// Host tensors of equal element count, each F32, F16, BF16 or F64.
absl::StatusOr<Distortion> MeasureDistortion(const Tensor& reference, const Tensor& approximate);

}  // namespace quantmill

#endif  // QUANTMILL_CORE_FORMATS_DISTORTION_H_
