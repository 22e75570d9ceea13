#include "core/formats/distortion.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/base/status.h"

namespace quantmill {
namespace {

absl::StatusOr<double> Load(const Tensor& tensor, int64_t index) {
  switch (tensor.dtype()) {
    case DType::kF32:
    case DType::kF16:
    case DType::kBF16:
      return LoadFloat(tensor, index);
    case DType::kF64:
      return tensor.as<double>()[index];
    default:
      return absl::InvalidArgumentError(absl::StrCat("distortion needs float tensors; got ",
                                                     std::string(DTypeName(tensor.dtype()))));
  }
}

}  // namespace

void Distortion::Add(double reference, double approximate) {
  const double error = approximate - reference;
  ++count;
  if (!std::isfinite(error)) finite = false;
  reference_energy += reference * reference;
  approximate_energy += approximate * approximate;
  dot += reference * approximate;
  error_energy += error * error;
  max_error = std::max(max_error, std::abs(error));
}

void Distortion::Merge(const Distortion& other) {
  count += other.count;
  finite = finite && other.finite;
  reference_energy += other.reference_energy;
  approximate_energy += other.approximate_energy;
  dot += other.dot;
  error_energy += other.error_energy;
  max_error = std::max(max_error, other.max_error);
}

double Distortion::nmse() const {
  if (error_energy == 0) return 0;
  if (reference_energy == 0) return std::numeric_limits<double>::infinity();
  return error_energy / reference_energy;
}

double Distortion::snr_db() const {
  const double ratio = nmse();
  if (ratio == 0) return std::numeric_limits<double>::infinity();
  return -10.0 * std::log10(ratio);
}

double Distortion::cosine() const {
  if (reference_energy == 0 && approximate_energy == 0) return 1;
  if (reference_energy == 0 || approximate_energy == 0) return 0;
  return dot / (std::sqrt(reference_energy) * std::sqrt(approximate_energy));
}

absl::StatusOr<Distortion> MeasureDistortion(const Tensor& reference, const Tensor& approximate) {
  if (reference.elements() != approximate.elements()) {
    return absl::InvalidArgumentError(absl::StrCat("cannot compare ", reference.shape().ToString(),
                                                   " with ", approximate.shape().ToString()));
  }
  if (!reference.device().is_cpu() || !approximate.device().is_cpu()) {
    return absl::InvalidArgumentError("distortion needs tensors in host memory");
  }
  Distortion result;
  for (int64_t i = 0; i < reference.elements(); ++i) {
    QM_ASSIGN_OR_RETURN(const double r, Load(reference, i));
    QM_ASSIGN_OR_RETURN(const double a, Load(approximate, i));
    result.Add(r, a);
  }
  return result;
}

}  // namespace quantmill
