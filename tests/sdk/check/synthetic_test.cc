#include "sdk/check/synthetic.h"

#include <cmath>
#include <cstring>
#include <memory>

#include "gtest/gtest.h"

namespace quantmill {
namespace {

constexpr int64_t kOut = 24, kIn = 64, kRows = 100;

SyntheticLayer Layer(SyntheticKind kind, uint64_t seed = 1, int64_t rows = kRows) {
  return *MakeSyntheticLayer(kind, kOut, kIn, rows, seed);
}

bool SameBytes(const Tensor& a, const Tensor& b) {
  return a.bytes() == b.bytes() &&
         std::memcmp(a.data(), b.data(), static_cast<size_t>(a.bytes())) == 0;
}

double ChannelEnergy(const Tensor& matrix, int64_t channel) {
  double sum = 0.0;
  for (int64_t r = 0; r < matrix.dim(0); ++r) {
    const double x = matrix.as<float>()[r * matrix.dim(1) + channel];
    sum += x * x;
  }
  return sum / static_cast<double>(matrix.dim(0));
}

TEST(Synthetic, SameSeedGivesSameBytes) {
  for (const SyntheticKind kind : kSyntheticKinds) {
    SCOPED_TRACE(SyntheticName(kind));
    EXPECT_TRUE(SameBytes(Layer(kind).weight, Layer(kind).weight));
    EXPECT_TRUE(SameBytes(Layer(kind).inputs, Layer(kind).inputs));
    EXPECT_FALSE(SameBytes(Layer(kind).weight, Layer(kind, 2).weight));
    EXPECT_FALSE(SameBytes(Layer(kind).inputs, Layer(kind).original_inputs));
  }
}

TEST(Synthetic, KindsAreWhatTheySay) {
  const SyntheticLayer gaussian = Layer(SyntheticKind::kGaussian);
  EXPECT_NEAR(ChannelEnergy(gaussian.weight, 5), 4e-4, 3e-4);
  EXPECT_NEAR(ChannelEnergy(gaussian.inputs, 17), 1.0, 0.5);
  const SyntheticLayer outliers = Layer(SyntheticKind::kOutlierChannels);
  EXPECT_GT(ChannelEnergy(outliers.weight, 5), 16 * ChannelEnergy(outliers.weight, 6));
  EXPECT_GT(ChannelEnergy(outliers.inputs, 17 + 32), 100 * ChannelEnergy(outliers.inputs, 18));
}

// Rank in/8 plus 1 % of noise energy: tr(H^2) / tr(H)^2 is near 8/in, not 1/in as for noise.
TEST(Synthetic, CorrelatedInputsHaveALowRank) {
  const auto concentration = [](const SyntheticLayer& layer) {
    double squares = 0.0, trace = 0.0;
    for (int64_t i = 0; i < kIn; ++i) {
      for (int64_t j = 0; j < kIn; ++j) {
        double h = 0.0;
        for (int64_t r = 0; r < layer.inputs.dim(0); ++r) {
          h += static_cast<double>(layer.inputs.as<float>()[r * kIn + i]) *
               layer.inputs.as<float>()[r * kIn + j];
        }
        squares += h * h;
        if (i == j) trace += h;
      }
    }
    return squares / (trace * trace);
  };
  EXPECT_GT(concentration(Layer(SyntheticKind::kCorrelatedInputs, 1, 1000)), 4.0 / kIn);
  EXPECT_LT(concentration(Layer(SyntheticKind::kGaussian, 1, 1000)), 1.5 / kIn);
}

TEST(Synthetic, StatisticsAreThoseOfTheRows) {
  const std::unique_ptr<Backend> cpu = *MakeCpuBackend(2);
  const SyntheticLayer layer = Layer(SyntheticKind::kOutlierChannels);
  const qm_stat_request requests[] = {{QM_STAT_HESSIAN, 0, QM_F32, 0},
                                      {QM_STAT_CROSS, 0, QM_F32, 0},
                                      {QM_STAT_ABSMAX, 0, QM_F32, 0},
                                      {QM_STAT_ABSMEAN, 0, QM_F32, QM_STAT_FROM_ORIGINAL},
                                      {QM_STAT_ROWS, 7, QM_F32, 0}};
  const std::vector<NamedTensor> items = *MeasureStatistics(*cpu, layer, requests);
  ASSERT_EQ(items.size(), 5u);
  const float* x = layer.inputs.as<float>();
  const float* o = layer.original_inputs.as<float>();
  for (const auto& [i, j] : {std::pair<int64_t, int64_t>{3, 17}, {17, 3}, {9, 9}}) {
    double hessian = 0.0, cross = 0.0, size = 0.0;
    for (int64_t r = 0; r < kRows; ++r) {
      hessian += static_cast<double>(x[r * kIn + i]) * x[r * kIn + j];
      cross += (static_cast<double>(o[r * kIn + i]) - x[r * kIn + i]) * x[r * kIn + j];
      size += std::fabs(static_cast<double>(x[r * kIn + i]) * x[r * kIn + j]);
    }
    const double bound = static_cast<double>(kRows) * 0x1p-24 * size;
    EXPECT_NEAR(items[0].tensor.as<float>()[i * kIn + j], hessian, bound);
    EXPECT_NEAR(items[1].tensor.as<float>()[i * kIn + j], cross, bound);
  }
  float most = 0.0f;
  double sum = 0.0;
  for (int64_t r = 0; r < kRows; ++r) {
    most = std::max(most, std::fabs(x[r * kIn + 17]));
    sum += std::fabs(o[r * kIn + 17]);
  }
  EXPECT_EQ(items[2].tensor.as<float>()[17], most);
  EXPECT_NEAR(items[3].tensor.as<float>()[17], sum / kRows, 1e-5 * sum / kRows);
  EXPECT_EQ(items[4].tensor.shape(), (Shape{7, kIn}));
  EXPECT_EQ(items[4].tensor.as<float>()[kIn], x[14 * kIn]);  // every 100/7 = 14th row
  const StatsView view(items, kRows);
  EXPECT_STREQ(view.get()->items[1].name, "cross");
  EXPECT_EQ(view.get()->row_count, kRows);
}

TEST(Synthetic, RefusesUnknownStatistics) {
  const std::unique_ptr<Backend> cpu = *MakeCpuBackend(1);
  const SyntheticLayer layer = Layer(SyntheticKind::kGaussian);
  const qm_stat_request unknown[] = {{"variance", 0, QM_F32, 0}};
  EXPECT_EQ(MeasureStatistics(*cpu, layer, unknown).status().code(),
            absl::StatusCode::kInvalidArgument);
  const qm_stat_request no_rows[] = {{QM_STAT_ROWS, 0, QM_F32, 0}};
  EXPECT_EQ(MeasureStatistics(*cpu, layer, no_rows).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST(Synthetic, NoRowsGiveZeroStatistics) {
  const std::unique_ptr<Backend> cpu = *MakeCpuBackend(1);
  const SyntheticLayer layer = Layer(SyntheticKind::kGaussian, 1, 0);
  const qm_stat_request requests[] = {{QM_STAT_HESSIAN, 0, QM_F32, 0},
                                      {QM_STAT_ROWS, 7, QM_F32, 0}};
  const std::vector<NamedTensor> items = *MeasureStatistics(*cpu, layer, requests);
  EXPECT_EQ(items[0].tensor.as<float>()[0], 0.0f);
  EXPECT_EQ(items[1].tensor.dim(0), 0);
}

// The two ways to write the output error: over rows, and over the Hessian.
TEST(Synthetic, OutputErrorIsWeighedByTheHessian) {
  const std::unique_ptr<Backend> cpu = *MakeCpuBackend(2);
  const SyntheticLayer layer = Layer(SyntheticKind::kCorrelatedInputs);
  Tensor approximate = *Tensor::HostZeros(DType::kF32, {kOut, kIn});
  EXPECT_NEAR(*OutputNmse(*cpu, layer, approximate), 1.0, 1e-6);
  EXPECT_NEAR(*WeightNmse(layer.weight, approximate), 1.0, 1e-6);
  for (int64_t i = 0; i < kOut * kIn; ++i) {
    approximate.as<float>()[i] = std::round(layer.weight.as<float>()[i] * 50.0f) / 50.0f;
  }
  const qm_stat_request request[] = {{QM_STAT_HESSIAN, 0, QM_F32, 0}};
  const std::vector<NamedTensor> items = *MeasureStatistics(*cpu, layer, request);
  const float* h = items[0].tensor.as<float>();
  double error = 0.0, energy = 0.0;
  for (int64_t o = 0; o < kOut; ++o) {
    for (int64_t i = 0; i < kIn; ++i) {
      for (int64_t j = 0; j < kIn; ++j) {
        const auto term = [&](const auto& at) { return at(i) * h[i * kIn + j] * at(j); };
        energy += term([&](int64_t c) { return double{layer.weight.as<float>()[o * kIn + c]}; });
        error += term([&](int64_t c) {
          return double{layer.weight.as<float>()[o * kIn + c]} -
                 approximate.as<float>()[o * kIn + c];
        });
      }
    }
  }
  EXPECT_NEAR(*OutputNmse(*cpu, layer, approximate), error / energy, 1e-4 * error / energy);
}

}  // namespace
}  // namespace quantmill
