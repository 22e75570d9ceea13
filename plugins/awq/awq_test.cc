// The operations of awq against slow loops, and the GPU against the CPU.
#include "awq.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "quantmill/testing/fake_call.hpp"

extern "C" const qm_plugin* qm_plugin_entry_v1(void);

namespace quantmill::awq {
namespace {

using qm::testing::FakeCall;

std::vector<float> NormalValues(int64_t count, float deviation, uint32_t seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal(0.0f, deviation);
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = normal(engine);
  return values;
}

// A weight with a zero row, a constant row, an all-positive row and an outlier; scales of two
// decades.
struct Sample {
  int64_t rows, columns, width;
  std::vector<float> w, s;

  Sample(int64_t r, int64_t c, int64_t group) : rows(r), columns(c), width(group) {
    w = NormalValues(rows * columns, 0.05f, 7);
    s = NormalValues(columns, 1.0f, 8);
    for (float& value : s) value = std::exp(value);
    for (int64_t i = 0; i < columns; ++i) {
      w[static_cast<size_t>(i)] = 0.0f;
      if (rows > 1) w[static_cast<size_t>(columns + i)] = 0.25f;
      if (rows > 2) {
        float& value = w[static_cast<size_t>(2 * columns + i)];
        value = std::abs(value);
      }
    }
    if (rows > 3) w[static_cast<size_t>(3 * columns)] = 80.0f;
  }
};

// Q(v) of one group, straight from the rule.
std::vector<float> SlowQuant(const std::vector<float>& v, int bits, bool symmetric) {
  float low = std::min(0.0f, *std::min_element(v.begin(), v.end()));
  float high = std::max(0.0f, *std::max_element(v.begin(), v.end()));
  if (symmetric) {
    high = std::max(high, -low);
    low = -high;
  }
  if (low == 0 && high == 0) {
    low = -1;
    high = 1;
  }
  const float most = static_cast<float>((1 << bits) - 1);
  const float step = qm::ToFloat(qm::ToF16((high - low) / most));
  const float zero = symmetric ? (most + 1) / 2 : std::min(most, std::nearbyint(-low / step));
  std::vector<float> out;
  for (const float x : v) {
    const float code = std::clamp(std::nearbyint(x / step) + zero, 0.0f, most);
    out.push_back(step * (code - zero));
  }
  return out;
}

Rounding RoundingOf(int bits, bool symmetric, int64_t width) {
  Rounding rounding;
  rounding.rule.bits = bits;
  rounding.rule.symmetric = symmetric;
  rounding.rule.scale_dtype = QM_F16;
  rounding.width = width;
  return rounding;
}

// Copies of a sample on the call's device.
struct OnDevice {
  Rows rows;
  const float* scale;

  OnDevice(FakeCall* call, const Sample& sample) {
    const qm_tensor w = call->Tensor(sample.w, {sample.rows, sample.columns});
    rows = {static_cast<const float*>(w.data), sample.rows, sample.columns, sample.columns};
    scale = static_cast<const float*>(call->Tensor(sample.s, {sample.columns}).data);
  }
};

std::vector<float> Output(FakeCall* call, int64_t count, float** out) {
  std::vector<float> host(static_cast<size_t>(count), -1.0f);
  const qm_tensor tensor = call->Tensor(host, {count});
  *out = static_cast<float*>(tensor.data);
  return host;
}

std::vector<float> Fetch(FakeCall* call, const float* data, int64_t count) {
  std::vector<float> host(static_cast<size_t>(count));
  EXPECT_EQ(ToHost(call->get(), data, count, host.data()), QM_OK);
  return host;
}

std::vector<float> RunFakeQuant(FakeCall* call, const Sample& sample, const Rounding& rounding,
                                bool scaled, bool difference) {
  const OnDevice on(call, sample);
  float* out = nullptr;
  Output(call, sample.rows * sample.columns, &out);
  EXPECT_EQ(FakeQuant(call->get(), on.rows, scaled ? on.scale : nullptr, rounding, difference, out),
            QM_OK);
  return Fetch(call, out, sample.rows * sample.columns);
}

TEST(FakeQuant, FollowsTheRule) {
  for (const int bits : {2, 3, 4, 8}) {
    for (const bool symmetric : {false, true}) {
      for (const bool scaled : {false, true}) {
        const Sample sample(9, 96, 48);
        FakeCall call;
        call.Threads(2);
        const Rounding rounding = RoundingOf(bits, symmetric, sample.width);
        const std::vector<float> value = RunFakeQuant(&call, sample, rounding, scaled, false);
        const std::vector<float> delta = RunFakeQuant(&call, sample, rounding, scaled, true);
        for (int64_t row = 0; row < sample.rows; ++row) {
          for (int64_t first = 0; first < sample.columns; first += sample.width) {
            std::vector<float> v;
            for (int64_t i = first; i < first + sample.width; ++i) {
              v.push_back(sample.w[row * sample.columns + i] * (scaled ? sample.s[i] : 1.0f));
            }
            const std::vector<float> expected = SlowQuant(v, bits, symmetric);
            for (int64_t i = 0; i < sample.width; ++i) {
              const size_t at = static_cast<size_t>(row * sample.columns + first + i);
              const float s = scaled ? sample.s[first + i] : 1.0f;
              ASSERT_EQ(value[at], expected[i] / s) << bits << " " << symmetric << " " << at;
              ASSERT_EQ(delta[at], expected[i] / s - sample.w[at]);
            }
          }
        }
        EXPECT_TRUE(call.CanariesIntact());
      }
    }
  }
}

struct Clipped {
  std::vector<float> delta, maximum;
};
Clipped RunClip(FakeCall* call, const Sample& sample, const Rounding& rounding, bool scaled,
                const ClipGrid& grid) {
  const OnDevice on(call, sample);
  const int64_t groups = sample.columns / sample.width;
  float *delta = nullptr, *maximum = nullptr;
  Output(call, sample.rows * sample.columns * grid.steps, &delta);
  Output(call, sample.rows * groups, &maximum);
  EXPECT_EQ(
      ClipDeltas(call->get(), on.rows, scaled ? on.scale : nullptr, rounding, grid, delta, maximum),
      QM_OK);
  return {Fetch(call, delta, sample.rows * sample.columns * grid.steps),
          Fetch(call, maximum, sample.rows * groups)};
}

TEST(ClipDeltas, AreTheErrorsOfTheClippedGroups) {
  const Sample sample(6, 64, 32);
  const ClipGrid grid = {20, 10};
  for (const bool scaled : {false, true}) {
    FakeCall call;
    const Clipped clipped = RunClip(&call, sample, RoundingOf(4, false, 32), scaled, grid);
    for (int64_t g = 0; g < 2; ++g) {
      for (int64_t row = 0; row < sample.rows; ++row) {
        std::vector<float> v;
        for (int64_t i = g * 32; i < g * 32 + 32; ++i) {
          v.push_back(sample.w[row * 64 + i] * (scaled ? sample.s[i] : 1.0f));
        }
        float largest = 0;
        for (const float x : v) largest = std::max(largest, std::abs(x));
        EXPECT_EQ(clipped.maximum[static_cast<size_t>(row * 2 + g)], largest);
        for (int32_t t = 0; t < grid.steps; ++t) {
          const float limit = largest * (1.0f - static_cast<float>(t) / 20.0f);
          std::vector<float> c = v;
          for (float& x : c) x = std::clamp(x, -limit, limit);
          const std::vector<float> q = SlowQuant(c, 4, false);
          for (int64_t i = 0; i < 32; ++i) {
            const size_t at = static_cast<size_t>(((g * sample.rows + row) * 10 + t) * 32 + i);
            ASSERT_EQ(clipped.delta[at], (q[i] - v[i]) / (scaled ? sample.s[g * 32 + i] : 1.0f));
          }
        }
      }
    }
  }
}

std::vector<float> RunDots(FakeCall* call, int64_t rows, int64_t columns) {
  const qm_tensor a = call->Tensor(NormalValues(rows * columns, 1.0f, 1), {rows, columns});
  const qm_tensor b = call->Tensor(NormalValues(rows * columns, 1.0f, 2), {rows, columns});
  float* sums = nullptr;
  Output(call, rows, &sums);
  EXPECT_EQ(RowDots(call->get(), static_cast<const float*>(a.data),
                    static_cast<const float*>(b.data), rows, columns, sums),
            QM_OK);
  return Fetch(call, sums, rows);
}

TEST(RowDots, AreDots) {
  for (const int64_t columns : {1, 31, 128, 333}) {
    FakeCall call;
    const std::vector<float> sums = RunDots(&call, 70, columns);
    const std::vector<float> a = NormalValues(70 * columns, 1.0f, 1),
                             b = NormalValues(70 * columns, 1.0f, 2);
    for (int64_t row = 0; row < 70; ++row) {
      double sum = 0, size = 0;
      for (int64_t i = row * columns; i < (row + 1) * columns; ++i) {
        sum += double{a[i]} * b[i];
        size += std::abs(double{a[i]} * b[i]);
      }
      EXPECT_NEAR(sums[static_cast<size_t>(row)], sum, size * (columns / 32 + 6) * 0x1p-24);
    }
  }
}

std::vector<double> RunRelative(FakeCall* call, const Sample& sample) {
  const OnDevice on(call, sample);
  std::vector<double> sums(static_cast<size_t>(sample.columns), 1.0);
  EXPECT_EQ(AddRelative(call->get(), on.rows, sample.width, &sums), QM_OK);
  return sums;
}

TEST(AddRelative, AddsMagnitudesRelativeToTheirGroup) {
  const Sample sample(150, 96, 32);
  FakeCall call;
  call.Threads(2);
  const std::vector<double> sums = RunRelative(&call, sample);
  for (int64_t i = 0; i < sample.columns; ++i) {
    double expected = 1.0;
    for (int64_t row = 0; row < sample.rows; ++row) {
      float largest = 0;
      for (int64_t j = i / 32 * 32; j < i / 32 * 32 + 32; ++j) {
        largest = std::max(largest, std::abs(sample.w[row * 96 + j]));
      }
      expected += std::abs(double{sample.w[row * 96 + i]}) / (double{largest} + 1e-6);
    }
    EXPECT_NEAR(sums[static_cast<size_t>(i)], expected, expected * 70 * 0x1p-24);
  }
}

// ---- rounding -----------------------------------------------------------------------------------

const qm_method& AwqMethod() { return *qm_plugin_entry_v1()->methods[0]; }
const qm_quantize_linear& Quantizer() {
  return *static_cast<const qm_quantize_linear*>(
      AwqMethod().ext(&AwqMethod(), QM_EXT_QUANTIZE_LINEAR));
}

qm_linear_info InfoOf(const Sample& sample) {
  qm_linear_info info = {};
  info.struct_size = sizeof info;
  info.name = "l";
  info.role = "mlp.up";
  info.out_features = sample.rows;
  info.in_features = sample.columns;
  info.scale_dtype = QM_F16;
  return info;
}

qm_status Quantize(FakeCall* call, const Sample& sample, int bits, bool symmetric) {
  call->Defaults(AwqMethod())
      .Set("bits", std::to_string(bits))
      .Set("group_size", std::to_string(sample.width))
      .Set("symmetric", symmetric ? "true" : "false");
  const qm_linear_info info = InfoOf(sample);
  const qm_tensor weight = call->Tensor(sample.w, {sample.rows, sample.columns});
  const qm_stats stats = {sizeof(qm_stats), nullptr, 0, 0};
  qm_packed packed = {};
  return Quantizer().run(call->get(), &info, &weight, &stats, &packed);
}

TEST(Round, IsThatOfTheFakeQuantization) {
  for (const int bits : {2, 3, 4, 8}) {
    for (const bool symmetric : {false, true}) {
      const Sample sample(7, 96, 32);
      FakeCall call, other;
      ASSERT_EQ(Quantize(&call, sample, bits, symmetric), QM_OK) << call.error();
      const std::vector<float> expected =
          RunFakeQuant(&other, sample, RoundingOf(bits, symmetric, 32), false, false);
      const auto codes = call.Read<int32_t>(0, "codes");
      const auto scale = call.Read<qm::F16>(0, "scale");
      const int64_t words = qm::AffineWordsPerRow(sample.columns, bits);
      for (int64_t row = 0; row < sample.rows; ++row) {
        for (int64_t i = 0; i < sample.columns; ++i) {
          const size_t g = static_cast<size_t>(row * 3 + i / 32);
          const float zero =
              symmetric ? static_cast<float>(1 << (bits - 1)) : call.Read<uint8_t>(0, "zero")[g];
          const float code =
              static_cast<float>(qm::UnpackCode(codes.data() + row * words, bits, i));
          ASSERT_EQ(qm::ToFloat(scale[g]) * (code - zero),
                    expected[static_cast<size_t>(row * sample.columns + i)]);
        }
      }
    }
  }
}

TEST(Round, NamesTheFirstBadWeight) {
  Sample sample(70, 64, 32);
  sample.w[65 * 64 + 3] = NAN;
  sample.w[66 * 64] = INFINITY;
  FakeCall call;
  call.Threads(2);
  EXPECT_EQ(Quantize(&call, sample, 4, false), QM_INVALID_ARGUMENT);
  EXPECT_NE(call.error().find("row 65, column 3"), std::string::npos) << call.error();
}

// ---- GPU ----------------------------------------------------------------------------------------

TEST(AwqGpu, EveryOperationGivesTheBitsOfTheCpu) {
  if (!qm::testing::HaveGpu()) GTEST_SKIP() << "no GPU";
  struct Shape {
    int64_t rows, columns, width;
  };
  for (const Shape& shape :
       {Shape{1, 32, 32}, Shape{5, 96, 48}, Shape{130, 512, 128}, Shape{33, 300, 300}}) {
    const Sample sample(shape.rows, shape.columns, shape.width);
    SCOPED_TRACE(shape.columns);
    FakeCall cpu, gpu({QM_CUDA, 0});
    for (const bool scaled : {false, true}) {
      for (const int bits : {3, 4}) {
        const Rounding rounding = RoundingOf(bits, bits == 3, shape.width);
        for (const bool difference : {false, true}) {
          EXPECT_EQ(RunFakeQuant(&gpu, sample, rounding, scaled, difference),
                    RunFakeQuant(&cpu, sample, rounding, scaled, difference));
        }
        const Clipped a = RunClip(&gpu, sample, rounding, scaled, {20, 10});
        const Clipped b = RunClip(&cpu, sample, rounding, scaled, {20, 10});
        EXPECT_EQ(a.delta, b.delta);
        EXPECT_EQ(a.maximum, b.maximum);
      }
    }
    EXPECT_EQ(RunRelative(&gpu, sample), RunRelative(&cpu, sample));
    EXPECT_EQ(RunDots(&gpu, shape.rows, shape.columns), RunDots(&cpu, shape.rows, shape.columns));
  }
}

TEST(AwqGpu, RoundsLikeTheCpu) {
  if (!qm::testing::HaveGpu()) GTEST_SKIP() << "no GPU";
  for (const int bits : {2, 3, 4, 8}) {
    for (const bool symmetric : {false, true}) {
      const Sample sample(131, 384, 128);
      FakeCall cpu, gpu({QM_CUDA, 0});
      ASSERT_EQ(Quantize(&cpu, sample, bits, symmetric), QM_OK) << cpu.error();
      ASSERT_EQ(Quantize(&gpu, sample, bits, symmetric), QM_OK) << gpu.error();
      EXPECT_EQ(gpu.Read<int32_t>(0, "codes"), cpu.Read<int32_t>(0, "codes"));
      const auto a = gpu.Read<qm::F16>(0, "scale"), b = cpu.Read<qm::F16>(0, "scale");
      for (size_t i = 0; i < a.size(); ++i) ASSERT_EQ(a[i].bits, b[i].bits);
      if (!symmetric) {
        EXPECT_EQ(gpu.Read<uint8_t>(0, "zero"), cpu.Read<uint8_t>(0, "zero"));
      }
    }
  }
  Sample bad(70, 64, 32);
  bad.w[65 * 64 + 3] = NAN;
  FakeCall call({QM_CUDA, 0});
  EXPECT_EQ(Quantize(&call, bad, 4, false), QM_INVALID_ARGUMENT);
  EXPECT_NE(call.error().find("row 65, column 3"), std::string::npos) << call.error();
}

}  // namespace
}  // namespace quantmill::awq
