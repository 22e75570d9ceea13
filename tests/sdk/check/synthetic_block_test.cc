// The gradients of the small block against central differences of its output.
#include "sdk/check/synthetic_block.h"

#include <cmath>
#include <random>

#include "gtest/gtest.h"

namespace quantmill::check {
namespace {

double BlockDot(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0.0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

TEST(SyntheticBlockGradients, MatchDifferences) {
  constexpr int64_t kWindow = 2;
  constexpr float kStep = 0x1p-10f;  // error of the difference: kStep^2 and 2^-53 / kStep
  const SyntheticBlock block(7);
  std::mt19937_64 random(3);
  std::normal_distribution<double> normal;
  std::vector<double> d_out(SyntheticBlock::kRows * SyntheticBlock::kHidden);
  for (double& value : d_out) value = normal(random);
  const BlockOutputs gradients = block.Gradients(block.tensors(), kWindow, d_out);
  ASSERT_EQ(gradients.size(), block.tensors().size());
  for (const auto& [name, tensor] : block.tensors()) {
    SCOPED_TRACE(name);
    std::vector<double> direction(static_cast<size_t>(tensor.elements()));
    for (double& value : direction) value = std::round(normal(random) * 16) / 16;  // exact in F32
    double loss[2];
    for (const int side : {0, 1}) {
      BlockTensors moved = block.tensors();
      Tensor values = *Tensor::Host(DType::kF32, tensor.shape());
      for (int64_t i = 0; i < tensor.elements(); ++i) {
        values.as<float>()[i] =
            tensor.as<float>()[i] + (side == 0 ? kStep : -kStep) * static_cast<float>(direction[i]);
      }
      moved[name] = values;
      loss[side] = BlockDot(d_out, block.Run(moved, kWindow).at(""));
    }
    const double slope = (loss[0] - loss[1]) / (2.0 * kStep);
    const double expected = BlockDot(gradients.at(name), direction);
    const double size = std::sqrt(BlockDot(gradients.at(name), gradients.at(name)) *
                                  BlockDot(direction, direction));
    // F32 rounds the moved values by 2^-24, a 2^-14 of the step.
    EXPECT_NEAR(slope, expected, 0x1p-12 * size);
  }
}

}  // namespace
}  // namespace quantmill::check
