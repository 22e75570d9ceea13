// Kernels on the CPU against the references of core/formats.
#include "row8.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "row8_test_util.h"

namespace eetq_testing {
namespace {

using qm::testing::FakeCall;
using ::testing::HasSubstr;

std::vector<Spec> CheckedSpecs() {
  std::vector<Spec> specs = AllParameters(33, 192);
  for (const Spec& spec : AllParameters(5, 37, DType::kF32)) specs.push_back(spec);
  for (const Spec& spec : AllParameters(1, 1, DType::kBF16)) specs.push_back(spec);
  return specs;
}

class Loops : public ::testing::TestWithParam<bool> {
 protected:
  void SetUp() override { eetq::UsePortableLoops(GetParam()); }
  void TearDown() override { eetq::UsePortableLoops(false); }
};

TEST_P(Loops, DequantizeEqualsTheReferenceBitForBit) {
  for (const Spec& spec : CheckedSpecs()) {
    const PackedWeight weight = RandomWeight(spec);
    SCOPED_TRACE(weight.format_json);
    for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
      const Tensor expected = ReferenceWeight(weight, dtype);
      const Tensor actual = *Tensor::Host(dtype, expected.shape());
      FakeCall call;
      call.Threads(2);
      qm_tensor out = actual.View();
      ASSERT_EQ(Kernel()->dequantize(call.get(), View(weight).get(), &out), QM_OK) << call.error();
      EXPECT_EQ(std::memcmp(expected.data(), actual.data(), expected.bytes()), 0);
    }
  }
}

std::vector<float> Multiply(const PackedWeight& weight, const std::vector<float>& x, int64_t rows,
                            bool linalg = true, int threads = 2) {
  FakeCall call;
  call.Threads(threads);
  if (!linalg) call.WithoutLinalg();
  const qm_tensor input = call.Tensor(x, {rows, weight.in_features});
  std::vector<float> y(rows * weight.out_features, std::nanf(""));
  qm_tensor output =
      qm::MakeMatrix(y.data(), rows, weight.out_features, weight.out_features, {QM_CPU, 0});
  EXPECT_EQ(Kernel()->matmul(call.get(), View(weight).get(), &input, nullptr, &output), QM_OK)
      << call.error();
  EXPECT_TRUE(call.CanariesIntact());
  return y;
}

// Sums of `in` terms in f32 differ by at most about in * 2^-24 of the sum of magnitudes, in any
// order; three more roundings are the scales'.
void ExpectProduct(const PackedWeight& weight, int64_t rows, bool linalg = true) {
  const std::vector<float> x = RandomVector(rows * weight.in_features);
  const Product expected = ReferenceProduct(weight, x, rows);
  const std::vector<float> y = Multiply(weight, x, rows, linalg);
  for (size_t i = 0; i < y.size(); ++i) {
    const double bound =
        static_cast<double>(weight.in_features + 4) * 0x1p-23 * expected.magnitude[i];
    ASSERT_NEAR(y[i], expected.value[i], bound) << weight.format_json << " element " << i;
  }
}

TEST_P(Loops, FewRowsEqualTheReferenceWithinRounding) {
  for (const Spec& spec : CheckedSpecs()) {
    const PackedWeight weight = RandomWeight(spec);
    for (const int64_t rows : {1, 2, 3, 4, 7, 8}) ExpectProduct(weight, rows);
  }
}

TEST_P(Loops, GiveTheSameBytesForAnyNumberOfThreads) {
  const PackedWeight weight = RandomWeight({DType::kI8, 200, 512});
  const std::vector<float> x = RandomVector(512);
  const std::vector<float> one = Multiply(weight, x, 1, true, 1);
  EXPECT_EQ(one, Multiply(weight, x, 1, true, 0));
  EXPECT_EQ(one, Multiply(weight, x, 1, true, 3));
  eetq::UsePortableLoops(!GetParam());
  EXPECT_EQ(one, Multiply(weight, x, 1));
}

INSTANTIATE_TEST_SUITE_P(Portable, Loops, ::testing::Bool());

TEST(CpuMatmul, LeavesManyRowsToTheHostUnlessActivationsAreQuantized) {
  for (const Spec& spec : AllParameters(20, 64)) {
    const PackedWeight weight = RandomWeight(spec);
    if (spec.activations) {
      for (const int64_t rows : {9, 40}) {
        ExpectProduct(weight, rows);
        ExpectProduct(weight, rows, /*linalg=*/false);
      }
      continue;
    }
    FakeCall call;
    const qm_tensor x = call.Tensor(RandomVector(9 * 64), {9, 64});
    std::vector<float> y(9 * 20);
    qm_tensor output = qm::MakeMatrix(y.data(), 9, 20, 20, {QM_CPU, 0});
    EXPECT_EQ(Kernel()->matmul(call.get(), View(weight).get(), &x, nullptr, &output),
              QM_UNIMPLEMENTED);
  }
}

// More outputs and rows than one tile of the path through the host's product has.
TEST(CpuMatmul, TilesOfQuantizedActivationsJoin) {
  ExpectProduct(RandomWeight({DType::kI8, 520, 16, DType::kF16, false, true}), 1030);
}

TEST(QuantizedActivations, ZeroAndHugeRowsAreDefinedAndBadOnesAreNan) {
  for (const Spec& spec : AllParameters(4, 32)) {
    if (!spec.activations) continue;
    const PackedWeight weight = RandomWeight(spec);
    std::vector<float> x = RandomVector(12 * 32);
    std::fill_n(x.begin(), 32, 0.0f);
    for (int i = 32; i < 64; ++i) x[i] *= 1e30f;
    for (int i = 64; i < 96; ++i) x[i] *= 1e-42f;  // subnormal
    x[3 * 32 + 5] = std::nanf("");
    x[4 * 32 + 5] = -INFINITY;
    const Product expected = ReferenceProduct(weight, x, 12);
    for (const bool linalg : {false, true}) {
      const std::vector<float> y = Multiply(weight, x, 12, linalg);
      for (int i = 0; i < 4; ++i) EXPECT_EQ(y[i], 0.0f);
      for (size_t i = 0; i < y.size(); ++i) {
        if (i >= 12 && i < 20) {
          EXPECT_TRUE(std::isnan(y[i]));
          continue;
        }
        ASSERT_NEAR(y[i], expected.value[i], 36 * 0x1p-23 * expected.magnitude[i] + 0x1p-149) << i;
      }
    }
  }
}

TEST(Kernel, AcceptsWhatItServes) {
  const char* e4m3 = R"({"dtype":"e4m3","scale":"channel"})";
  EXPECT_GT(Kernel()->accepts("qm.fmt.int8-row/1", "{}", QM_CPU, 0, QM_F32), 0);
  EXPECT_GT(Kernel()->accepts("qm.fmt.float8/1", e4m3, QM_CPU, 0, QM_F32), 0);
  EXPECT_EQ(Kernel()->accepts("qm.fmt.int8-row/1", e4m3, QM_CPU, 0, QM_F32), 0);
  EXPECT_EQ(Kernel()->accepts("qm.fmt.int8-row/1", "{}", QM_CPU, 0, QM_F16), 0);
  EXPECT_EQ(Kernel()->accepts("qm.fmt.int8-row/2", "{}", QM_CPU, 0, QM_F32), 0);
  EXPECT_EQ(Kernel()->accepts("qm.fmt.int8-row/1", "{}", QM_CUDA, 75, QM_F16), 0);
}

TEST(Kernel, RefusesWrongShapesAndDtypes) {
  const PackedWeight weight = RandomWeight({});
  const View view(weight);
  FakeCall call;
  for (const Tensor& wrong :
       {*Tensor::Host(DType::kF32, {33, 64}), *Tensor::Host(DType::kF32, {32, 192}),
        *Tensor::Host(DType::kI32, {33, 192})}) {
    qm_tensor out = wrong.View();
    EXPECT_EQ(Kernel()->dequantize(call.get(), view.get(), &out), QM_INVALID_ARGUMENT);
  }
}

TEST(Format, CheckAgreesWithTheReferenceCheck) {
  for (const Spec& spec : {Spec{}, Spec{DType::kF8E4M3}, Spec{DType::kF8E5M2}}) {
    std::vector<PackedWeight> weights;
    for (int i = 0; i < 9; ++i) weights.push_back(RandomWeight(spec));
    weights[1].format_json = R"({"bits":8})";
    weights[2].tensors[1].tensor.as<uint16_t>()[0] = 0;        // scale 0
    weights[3].tensors[1].tensor.as<uint16_t>()[32] = 0x7C00;  // infinite
    weights[4].tensors.pop_back();
    weights[5].tensors.push_back({"other", Tensor::FromI32({1}, {1})});
    weights[6].in_features = 96;
    weights[7].tensors[0].tensor = *Tensor::HostZeros(DType::kU8, {33, 192});
    const bool has_nan = spec.code != DType::kI8;
    static_cast<uint8_t*>(weights[8].tensors[0].tensor.data())[200] = 0xFF;
    for (size_t i = 0; i < weights.size(); ++i) {
      FakeCall call;
      const bool accepted = Format(weights[i])->check(call.get(), View(weights[i]).get()) == QM_OK;
      EXPECT_EQ(accepted, quantmill::CheckWithReference(weights[i]).ok()) << i;
      EXPECT_EQ(accepted, i == 0 || (i == 8 && !has_nan)) << i << ": " << call.error();
      EXPECT_EQ(call.error().empty(), accepted);
    }
  }
}

TEST(Plugin, HasAMethodAndTheOwnerOfTheOtherFormat) {
  EXPECT_STREQ(Method(0)->id, "eetq");
  EXPECT_FALSE(Method(0)->flags & QM_METHOD_NO_STAGE);
  EXPECT_STREQ(Method(1)->id, "float8");
  EXPECT_TRUE(Method(1)->flags & QM_METHOD_NO_STAGE);
  EXPECT_EQ(Method(1)->ext(Method(1), QM_EXT_QUANTIZE_LINEAR), nullptr);
  EXPECT_EQ(Method(0)->ext(Method(0), "qm.format/1x"), nullptr);
}

}  // namespace
}  // namespace eetq_testing
