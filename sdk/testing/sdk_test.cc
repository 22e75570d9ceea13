// The header-only layer of the SDK and the fake host, against slow definitions.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "quantmill/sdk/affine_int.hpp"
#include "quantmill/sdk/affine_search.hpp"
#include "quantmill/sdk/plugin.hpp"
#include "quantmill/testing/affine_reading.hpp"
#include "quantmill/testing/fake_call.hpp"

namespace {

using qm::testing::FakeCall;

TEST(SdkFloats, EveryHalfSurvivesAndMidpointsGoToEven) {
  for (uint32_t bits = 0; bits < 0x7C00u; ++bits) {
    const qm::F16 half = {static_cast<uint16_t>(bits)};
    const double value = qm::testing::HalfToDouble(half.bits);
    ASSERT_EQ(static_cast<double>(qm::ToFloat(half)), value);
    ASSERT_EQ(qm::ToF16(static_cast<float>(value)).bits, bits);
    ASSERT_EQ(qm::ToF16(static_cast<float>(-value)).bits, bits | 0x8000u);
    if (bits == 0x7BFFu) break;
    const double next = qm::testing::HalfToDouble(static_cast<uint16_t>(bits + 1));
    const float middle = static_cast<float>((value + next) / 2);
    ASSERT_EQ(qm::ToF16(middle).bits, bits % 2 == 0 ? bits : bits + 1) << bits;
    ASSERT_EQ(qm::ToF16(std::nextafter(middle, 0.0f)).bits, bits) << bits;
    ASSERT_EQ(qm::ToF16(std::nextafter(middle, 1e9f)).bits, bits + 1) << bits;
  }
  EXPECT_EQ(qm::ToF16(65519.99f).bits, 0x7BFFu);
  EXPECT_EQ(qm::ToF16(65520.0f).bits, 0x7C00u);
  EXPECT_TRUE(std::isnan(qm::ToFloat(qm::ToF16(std::nanf("")))));
}

TEST(SdkFloats, EveryBrainFloatSurvivesAndMidpointsGoToEven) {
  for (uint32_t bits = 0; bits < 0x7F80u; ++bits) {
    const float value = static_cast<float>(qm::testing::BrainToDouble(static_cast<uint16_t>(bits)));
    ASSERT_EQ(qm::ToFloat(qm::BF16{static_cast<uint16_t>(bits)}), value);
    ASSERT_EQ(qm::ToBF16(value).bits, bits);
    const float middle = qm::FloatFromBits((bits << 16) | 0x8000u);
    ASSERT_EQ(qm::ToBF16(middle).bits, bits % 2 == 0 ? bits : bits + 1) << bits;
    ASSERT_EQ(qm::ToBF16(qm::FloatFromBits((bits << 16) | 0x7FFFu)).bits, bits);
  }
  EXPECT_TRUE(std::isnan(qm::ToFloat(qm::ToBF16(std::nanf("")))));
}

TEST(SdkAffine, FirstNotFiniteIsFoundWhereverItIs) {
  for (const int64_t n : {1, 31, 32, 33, 100}) {
    std::vector<float> values(static_cast<size_t>(n), std::numeric_limits<float>::max());
    EXPECT_EQ(qm::FirstNotFinite(values.data(), n), -1) << n;
    for (const float bad : {INFINITY, -INFINITY, std::nanf("")}) {
      for (int64_t at = 0; at < n; ++at) {
        std::vector<float> broken(values);
        broken[at] = broken[n - 1] = bad;
        EXPECT_EQ(qm::FirstNotFinite(broken.data(), n), at) << n;
      }
    }
  }
  EXPECT_EQ(qm::FirstNotFinite(nullptr, 0), -1);
}

TEST(SdkAffine, ScaleIsNeverZeroAndNeverInfinite) {
  for (const qm_dtype dtype : {QM_F16, QM_BF16, QM_F32}) {
    for (const float scale : {0.0f, 1e-45f, 1e-30f, 1e-8f, 3e-8f, 0.1f, 7e4f, 3.4e38f, INFINITY}) {
      const float rounded = qm::RoundScale(scale, dtype);
      EXPECT_GT(rounded, 0.0f) << scale;
      EXPECT_TRUE(std::isfinite(rounded)) << scale;
      EXPECT_EQ(qm::RoundScale(rounded, dtype), rounded) << scale;
    }
  }
  EXPECT_EQ(qm::RoundScale(0.1f, QM_F32), 0.1f);
  EXPECT_EQ(qm::RoundScale(1e-30f, QM_F16), 0x1p-24f);
  EXPECT_EQ(qm::RoundScale(1e30f, QM_F16), 65504.0f);
}

TEST(SdkAffine, RoundHalfEvenEqualsTheLibrary) {
  for (int i = -4096; i <= 4096; ++i) {
    const float x = static_cast<float>(i) / 8.0f;
    EXPECT_EQ(qm::RoundHalfEven(x), std::nearbyint(x)) << x;
  }
}

TEST(SdkAffine, PackedCodesReadBack) {
  for (const int bits : {2, 3, 4, 8}) {
    for (const int64_t n : {1, 7, 32, 33, 95}) {
      std::vector<uint8_t> codes;
      std::vector<int32_t> position;
      for (int64_t i = 0; i < n; ++i) {
        codes.push_back(static_cast<uint8_t>((i * 37 + 11) & ((1 << bits) - 1)));
        position.push_back(static_cast<int32_t>(n - 1 - i));
      }
      std::vector<int32_t> plain, reversed;
      for (int64_t w = 0; w < qm::AffineWordsPerRow(n, bits); ++w) {
        plain.push_back(static_cast<int32_t>(qm::PackWord(codes.data(), n, bits, w)));
        reversed.push_back(
            static_cast<int32_t>(qm::PackWord(codes.data(), n, bits, w, position.data())));
      }
      plain.push_back(-1);  // UnpackCode must not need it
      reversed.push_back(-1);
      for (int64_t i = 0; i < n; ++i) {
        EXPECT_EQ(qm::UnpackCode(plain.data(), bits, i), codes[i]);
        EXPECT_EQ(qm::UnpackCode(reversed.data(), bits, i), codes[n - 1 - i]);
      }
    }
  }
}

TEST(SdkAffine, JsonIsCanonical) {
  EXPECT_EQ(qm::AffineIntJson(4, 128, "int"), R"({"bits":4,"group_size":128,"zero":"int"})");
  EXPECT_EQ(qm::AffineIntJson(8, -1, "none"), R"({"bits":8,"group_size":-1,"zero":"none"})");
}

TEST(SdkStatus, GuardTurnsExceptionsIntoCodes) {
  FakeCall call;
  EXPECT_EQ(qm::guard(call.get(), [] { return QM_OK; }), QM_OK);
  EXPECT_EQ(qm::guard(call.get(), []() -> qm_status { throw std::bad_alloc(); }),
            QM_RESOURCE_EXHAUSTED);
  EXPECT_EQ(qm::guard(call.get(), []() -> qm_status { throw std::runtime_error("seven"); }),
            QM_INTERNAL);
  EXPECT_EQ(call.error(), "seven");
  EXPECT_EQ(qm::guard(call.get(), []() -> qm_status { throw 7; }), QM_INTERNAL);
  EXPECT_FALSE(call.error().empty());
}

TEST(SdkThreads, RangesCoverTheWholeAndErrorsComeBack) {
  for (const int threads : {0, 1, 4}) {
    FakeCall call;
    call.Threads(threads);
    std::vector<int> seen(103, 0);
    EXPECT_EQ(qm::ParallelFor(call.get(), 103, 10,
                              [&](int64_t begin, int64_t end, int32_t worker) -> qm_status {
                                EXPECT_EQ(begin % 10, 0);
                                EXPECT_LT(worker, qm::WorkerCount(call.get()));
                                for (int64_t i = begin; i < end; ++i) ++seen[i];
                                return QM_OK;
                              }),
              QM_OK);
    EXPECT_EQ(seen, std::vector<int>(103, 1));
    EXPECT_EQ(qm::ParallelFor(call.get(), 5, 1,
                              [](int64_t, int64_t, int32_t) -> qm_status {
                                throw std::runtime_error("inside");
                              }),
              QM_INTERNAL);
    EXPECT_EQ(call.error(), "inside");
  }
}

TEST(SdkThreads, TheFakeHostRefusesNesting) {
  FakeCall call;
  EXPECT_EQ(qm::ParallelFor(call.get(), 1, 1,
                            [&](int64_t, int64_t, int32_t) {
                              return qm::ParallelFor(
                                  call.get(), 1, 1,
                                  [](int64_t, int64_t, int32_t) -> qm_status { return QM_OK; });
                            }),
            QM_FAILED_PRECONDITION);
}

TEST(FakeHost, GemmEqualsItsDefinition) {
  FakeCall call;
  const qm_host_linalg* linalg = qm::HostLinalg(call.get());
  ASSERT_NE(linalg, nullptr);
  const std::vector<float> values = {1, 2, 3, 4, 5, 6};
  const qm_tensor a = call.Tensor(values, {2, 3});
  qm_tensor c = call.Tensor<float>({1, 1, 1, 1}, {2, 2});
  ASSERT_EQ(linalg->gemm(call.get(), 0, 1, 2.0, &a, &a, 10.0, &c), QM_OK);
  EXPECT_EQ(call.Read<float>(c), (std::vector<float>{38, 74, 74, 164}));
  qm_tensor d = call.Tensor<float>(std::vector<float>(9, 0.0f), {3, 3});
  ASSERT_EQ(linalg->gemm(call.get(), 1, 0, 1.0, &a, &a, 0.0, &d), QM_OK);
  EXPECT_EQ(call.Read<float>(d), (std::vector<float>{17, 22, 27, 22, 29, 36, 27, 36, 45}));
}

TEST(FakeHost, InverseCholeskyInvertsTheDampedMatrix) {
  FakeCall call;
  const std::vector<float> h = {4, 1, 0, 1, 3, 1, 0, 1, 2};
  const double damp = 0.5, mean = 3.0;
  const qm_tensor ht = call.Tensor(h, {3, 3});
  qm_tensor ut = call.Tensor<float>(std::vector<float>(9, 7.0f), {3, 3});
  ASSERT_EQ(qm::HostLinalg(call.get())->inverse_cholesky(call.get(), &ht, damp, &ut), QM_OK);
  const std::vector<float> u = call.Read<float>(ut);
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < i; ++j) EXPECT_EQ(u[i * 3 + j], 0.0f);
    for (int j = 0; j < 3; ++j) {  // (u^T u) (h + damp mean I) = I
      double sum = 0.0;
      for (int k = 0; k < 3; ++k) {
        double inverse = 0.0;
        for (int l = 0; l < 3; ++l) inverse += static_cast<double>(u[l * 3 + i]) * u[l * 3 + k];
        sum += inverse * (h[k * 3 + j] + (k == j ? damp * mean : 0.0));
      }
      EXPECT_NEAR(sum, i == j ? 1.0 : 0.0, 1e-6);
    }
  }
  const qm_tensor bad = call.Tensor<float>({1, 2, 2, 1}, {2, 2});
  qm_tensor out = call.Tensor<float>({0, 0, 0, 0}, {2, 2});
  EXPECT_EQ(qm::HostLinalg(call.get())->inverse_cholesky(call.get(), &bad, 0.0, &out),
            QM_FAILED_PRECONDITION);
}

TEST(FakeHost, NoticesWritesPastTheEnd) {
  FakeCall call;
  uint8_t* bytes = nullptr;
  ASSERT_EQ(qm::Scratch(call.get(), {QM_CPU, 0}, 100, "a test", &bytes), QM_OK);
  EXPECT_TRUE(call.CanariesIntact());
  bytes[100] = 0;
  EXPECT_FALSE(call.CanariesIntact());
}

TEST(FakeHost, RefusesASecondEmitOfOneName) {
  FakeCall call;
  const int64_t shape[1] = {4};
  qm_tensor t;
  qm_call* c = call.get();
  EXPECT_EQ(c->emit(c, 0, "codes", c->device, QM_I32, 1, shape, &t), QM_OK);
  EXPECT_EQ(c->emit(c, 1, "codes", c->device, QM_I32, 1, shape, &t), QM_OK);
  EXPECT_EQ(c->emit(c, 0, "codes", c->device, QM_I32, 1, shape, &t), QM_INVALID_ARGUMENT);
}

}  // namespace
