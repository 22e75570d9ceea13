#include <cmath>
#include <numbers>
#include <vector>

#include "core/base/status.h"
#include "core/model/decoder.h"

namespace quantmill {
namespace {

// Rotation per position of frequency pair i. Llama 3 leaves short wavelengths alone, divides long
// ones by `factor`, and blends between (_compute_llama3_parameters).
double Frequency(const ModelConfig& config, int64_t pair) {
  const RopeConfig& rope = config.rope;
  const double exponent = -2.0 * static_cast<double>(pair) / static_cast<double>(config.head_dim);
  const double frequency = std::pow(rope.theta, exponent);
  if (rope.type == RopeConfig::Type::kDefault) return frequency;
  if (rope.type == RopeConfig::Type::kLinear) return frequency / rope.factor;
  const double wavelength = 2.0 * std::numbers::pi / frequency;
  const double original = static_cast<double>(rope.original_positions);
  if (wavelength < original / rope.high_freq_factor) return frequency;
  if (wavelength > original / rope.low_freq_factor) return frequency / rope.factor;
  const double blend = (original / wavelength - rope.low_freq_factor) /
                       (rope.high_freq_factor - rope.low_freq_factor);
  return (1.0 - blend) * frequency / rope.factor + blend * frequency;
}

}  // namespace

absl::StatusOr<RopeTables> MakeRopeTables(const ModelConfig& config, int64_t positions,
                                          Backend& backend) {
  if (positions < 1) return absl::InvalidArgumentError("rope tables need at least one position");
  const int64_t pairs = config.head_dim / 2;
  QM_ASSIGN_OR_RETURN(Tensor cosine, Tensor::Host(DType::kF32, {positions, pairs}));
  QM_ASSIGN_OR_RETURN(Tensor sine, Tensor::Host(DType::kF32, {positions, pairs}));
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const double frequency = Frequency(config, pair);
    for (int64_t position = 0; position < positions; ++position) {
      const double angle = static_cast<double>(position) * frequency;
      cosine.as<float>()[position * pairs + pair] = static_cast<float>(std::cos(angle));
      sine.as<float>()[position * pairs + pair] = static_cast<float>(std::sin(angle));
    }
  }
  RopeTables tables;
  QM_ASSIGN_OR_RETURN(tables.cosine, backend.ToDevice(cosine));
  QM_ASSIGN_OR_RETURN(tables.sine, backend.ToDevice(sine));
  return tables;
}

}  // namespace quantmill
