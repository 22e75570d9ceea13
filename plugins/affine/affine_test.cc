// CPU kernel against the reference of core/formats.
#include "affine.h"

#include "affine_test_util.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace affine_testing {
namespace {

using ::testing::HasSubstr;
using Zero = AffineIntParams::Zero;
using qm::testing::FakeCall;

std::vector<WeightSpec> CheckedSpecs() {
  std::vector<WeightSpec> specs;
  for (int bits : {2, 3, 4, 8}) {
    for (int64_t group : {-1, 8, 32, 128, 256}) {
      for (Zero zero : {Zero::kNone, Zero::kInt, Zero::kFloat}) {
        specs.push_back({5, 768, {bits, group, zero}, DType::kF16, false, 0});
      }
    }
    specs.push_back({33, 100, {bits, 5, Zero::kInt}, DType::kBF16, false, 0});
    specs.push_back({3, 37, {bits, -1, Zero::kInt}, DType::kF32, false, 0});
    specs.push_back({1, 1, {bits, 1, Zero::kNone}, DType::kF32, false, 0});
    specs.push_back({17, 256, {bits, 64, Zero::kInt}, DType::kF16, true, 0});
  }
  for (int bits : {1, 2, 3, 4, 8}) {
    specs.push_back({16, 100, {bits, 4, Zero::kFloat, 0}, DType::kF16, false, 0});
    specs.push_back({3, 37, {bits, -1, Zero::kFloat, 0}, DType::kF32, false, 0});
    specs.push_back({33, 256, {bits, 16, Zero::kQ8, 1, true}, DType::kF16, false, 0});
    specs.push_back({64, 45, {bits, 16, Zero::kQ8, 0, true}, DType::kF16, false, 0});
  }
  specs.push_back({33, 256, {1, 64, Zero::kFloat}, DType::kBF16, false, 0});
  specs.push_back({5, 100, {1, 5, Zero::kFloat}, DType::kF16, true, 0});
  return specs;
}

std::string Name(const WeightSpec& spec) {
  return quantmill::AffineIntJson(spec.params) + " [" + std::to_string(spec.out) + ", " +
         std::to_string(spec.in) + "]" + (spec.group_index ? " group_index" : "");
}

template <class T>
void ExpectDequantized(const PackedWeight& weight, const qm_packed* packed, DType dtype) {
  Tensor expected = *Tensor::Host(dtype, {weight.out_features, weight.in_features});
  Tensor actual = *Tensor::Host(dtype, {weight.out_features, weight.in_features});
  ASSERT_TRUE(quantmill::DequantizeAffineIntReference(weight, &expected).ok());
  FakeCall call;
  call.Threads(2);
  qm_tensor out = actual.View();
  ASSERT_EQ(Kernel()->dequantize(call.get(), packed, &out), QM_OK) << call.error();
  EXPECT_EQ(std::memcmp(expected.data(), actual.data(), expected.bytes()), 0);
}

TEST(CpuDequantize, EqualsTheReferenceBitForBit) {
  for (const WeightSpec& spec : CheckedSpecs()) {
    SCOPED_TRACE(Name(spec));
    const PackedWeight weight = RandomWeight(spec);
    const View view(weight);
    ExpectDequantized<float>(weight, view.get(), DType::kF32);
    ExpectDequantized<uint16_t>(weight, view.get(), DType::kF16);
    ExpectDequantized<uint16_t>(weight, view.get(), DType::kBF16);
  }
}

// y through the kernel, compared with f64: sums of `in` terms in f32 differ by at most about
// in * 2^-24 of the sum of magnitudes, in any order; the factor 2 covers scale * (code - zero).
void ExpectProduct(const PackedWeight& weight, const qm_packed* packed, int64_t rows) {
  const int64_t in = weight.in_features, out = weight.out_features;
  const std::vector<float> x = RandomVector(rows * in);
  const Product expected = ReferenceProduct(x, ReferenceWeight(weight), rows, in, out);
  FakeCall call;
  call.Threads(2);
  const qm_tensor input = call.Tensor(x, {rows, in});
  std::vector<float> y(rows * out, std::nanf(""));
  qm_tensor output = qm::MakeMatrix(y.data(), rows, out, out, {QM_CPU, 0});
  ASSERT_EQ(Kernel()->matmul(call.get(), packed, &input, nullptr, &output), QM_OK) << call.error();
  EXPECT_TRUE(call.CanariesIntact());
  for (int64_t i = 0; i < rows * out; ++i) {
    const double bound = 2 * static_cast<double>(in) * 0x1p-24 * expected.magnitude[i];
    ASSERT_NEAR(y[i], expected.value[i], bound) << "element " << i;
  }
}

class CpuMatmul : public ::testing::TestWithParam<affine::CpuLevel> {
 protected:
  void SetUp() override {
    if (affine::DetectCpuLevel() < GetParam()) GTEST_SKIP() << "this processor lacks the level";
    affine::LimitCpuLevel(GetParam());
  }
  void TearDown() override { affine::LimitCpuLevel(affine::CpuLevel::kAvx512); }
};

TEST_P(CpuMatmul, EqualsTheReferenceWithinRounding) {
  for (const WeightSpec& spec : CheckedSpecs()) {
    SCOPED_TRACE(Name(spec));
    const PackedWeight weight = RandomWeight(spec);
    const View view(weight);
    for (int64_t rows : {1, 2, 3, 4, 7, 8}) ExpectProduct(weight, view.get(), rows);
  }
}

TEST_P(CpuMatmul, GivesTheSameBytesForAnyNumberOfThreads) {
  const PackedWeight weight = RandomWeight({200, 512, {4, 128, Zero::kInt}});
  const View view(weight);
  const std::vector<float> x = RandomVector(512);
  std::vector<std::vector<float>> results;
  for (int threads : {0, 1, 3}) {
    FakeCall call;
    call.Threads(threads);
    const qm_tensor input = call.Tensor(x, {1, 512});
    std::vector<float> y(200);
    qm_tensor output = qm::MakeMatrix(y.data(), 1, 200, 200, {QM_CPU, 0});
    ASSERT_EQ(Kernel()->matmul(call.get(), view.get(), &input, nullptr, &output), QM_OK);
    results.push_back(y);
  }
  EXPECT_EQ(results[0], results[1]);
  EXPECT_EQ(results[0], results[2]);
}

INSTANTIATE_TEST_SUITE_P(Levels, CpuMatmul,
                         ::testing::Values(affine::CpuLevel::kPortable, affine::CpuLevel::kAvx2,
                                           affine::CpuLevel::kAvx512));

TEST(CpuMatmul, LeavesManyRowsToTheHost) {
  const PackedWeight weight = RandomWeight({});
  const View view(weight);
  FakeCall call;
  const qm_tensor x = call.Tensor(RandomVector(9 * 128), {9, 128});
  std::vector<float> y(9 * 32);
  qm_tensor output = qm::MakeMatrix(y.data(), 9, 32, 32, {QM_CPU, 0});
  EXPECT_EQ(Kernel()->matmul(call.get(), view.get(), &x, nullptr, &output), QM_UNIMPLEMENTED);
}

TEST(CpuPrepack, SortsScatteredGroupsWithoutChangingTheWeight) {
  for (const AffineIntParams& params :
       {AffineIntParams{2, 64, Zero::kInt}, AffineIntParams{3, 64, Zero::kInt},
        AffineIntParams{4, 64, Zero::kInt}, AffineIntParams{8, 64, Zero::kInt},
        AffineIntParams{4, 64, Zero::kQ8, 1, true}}) {
    const PackedWeight weight = RandomWeight({17, 256, params, DType::kF16, /*group_index=*/true});
    SCOPED_TRACE(weight.format_json);
    const View view(weight);
    FakeCall call;
    qm_packed prepacked;
    ASSERT_EQ(Kernel()->prepack(call.get(), view.get(), &prepacked), QM_OK) << call.error();
    EXPECT_TRUE(call.Emitted(0, "permutation"));
    ExpectDequantized<float>(weight, &prepacked, DType::kF32);
    ExpectDequantized<uint16_t>(weight, &prepacked, DType::kBF16);
    for (int64_t rows : {1, 5}) ExpectProduct(weight, &prepacked, rows);
    FakeCall again;
    EXPECT_EQ(Kernel()->prepack(again.get(), &prepacked, &prepacked), QM_FAILED_PRECONDITION);
    FakeCall check;  // a prepacked weight is no longer in the format
    EXPECT_EQ(Format()->check(check.get(), &prepacked), QM_INVALID_ARGUMENT);
  }
}

TEST(CpuPrepack, LeavesOtherWeightsAsTheyAre) {
  FakeCall call;
  qm_packed prepacked;
  const PackedWeight plain = RandomWeight({});
  EXPECT_EQ(Kernel()->prepack(call.get(), View(plain).get(), &prepacked), QM_UNIMPLEMENTED);
  PackedWeight uneven = RandomWeight({4, 128, {4, 64, Zero::kNone}, DType::kF16, true});
  for (auto& named : uneven.tensors) {
    if (named.name == "group_index") {
      for (int i = 0; i < 128; ++i) named.tensor.as<int32_t>()[i] = i == 0 ? 0 : 1;
    }
  }
  FakeCall second;
  EXPECT_EQ(Kernel()->prepack(second.get(), View(uneven).get(), &prepacked), QM_UNIMPLEMENTED);
  ExpectProduct(uneven, View(uneven).get(), 2);
}

TEST(Kernel, AcceptsWhatItServes) {
  const char* json = R"({"bits":4,"group_size":128,"zero":"int"})";
  EXPECT_GT(Kernel()->accepts("qm.fmt.affine-int/1", json, QM_CPU, 0, QM_F32), 0);
  EXPECT_EQ(Kernel()->accepts("qm.fmt.affine-int/1", json, QM_CPU, 0, QM_F16), 0);
  EXPECT_EQ(Kernel()->accepts("qm.fmt.affine-int/2", json, QM_CPU, 0, QM_F32), 0);
  EXPECT_EQ(Kernel()->accepts("qm.fmt.affine-int/1", "{}", QM_CPU, 0, QM_F32), 0);
  EXPECT_EQ(Kernel()->accepts("qm.fmt.affine-int/1", json, QM_CUDA, 75, QM_F16), 0);
}

TEST(Kernel, RefusesWrongShapesAndDtypes) {
  const PackedWeight weight = RandomWeight({});
  const View view(weight);
  FakeCall call;
  qm_tensor wrong = Tensor::Host(DType::kF32, {32, 64})->View();
  EXPECT_EQ(Kernel()->dequantize(call.get(), view.get(), &wrong), QM_INVALID_ARGUMENT);
  qm_tensor rows = Tensor::Host(DType::kF32, {31, 128})->View();
  EXPECT_EQ(Kernel()->dequantize(call.get(), view.get(), &rows), QM_INVALID_ARGUMENT);
  qm_tensor ints = Tensor::Host(DType::kI32, {32, 128})->View();
  EXPECT_EQ(Kernel()->dequantize(call.get(), view.get(), &ints), QM_INVALID_ARGUMENT);
  EXPECT_THAT(call.error(), HasSubstr("float matrix"));
}

TEST(Format, CheckAgreesWithTheReferenceCheck) {
  std::vector<PackedWeight> weights;
  for (int i = 0; i < 8; ++i) weights.push_back(RandomWeight({4, 96, {3, 48, Zero::kInt}}));
  weights[1].format_json = R"({"bits":5,"group_size":48,"zero":"int"})";
  weights[2].tensors[2].tensor.as<uint8_t>()[3] = 8;
  weights[3].tensors[1].tensor.as<uint16_t>()[0] = 0;
  weights[4].tensors.pop_back();
  weights[5].tensors.push_back({"other", Tensor::FromI32({1}, {1})});
  weights[6].in_features = 48;
  weights[7].tensors.push_back({"group_index", Tensor::FromI32({96}, std::vector<int32_t>(96, 2))});
  for (size_t i = 0; i < weights.size(); ++i) {
    FakeCall call;
    const bool accepted = Format()->check(call.get(), View(weights[i]).get()) == QM_OK;
    EXPECT_EQ(accepted, quantmill::CheckAffineInt(weights[i]).ok()) << i;
    EXPECT_EQ(accepted, i == 0) << i << ": " << call.error();
    EXPECT_EQ(call.error().empty(), accepted);
  }
}

TEST(Plugin, IsNoStageAndAnswersOnlyKnownIds) {
  EXPECT_STREQ(Method()->id, "affine");
  EXPECT_TRUE(Method()->flags & QM_METHOD_NO_STAGE);
  EXPECT_EQ(Method()->ext(Method(), "qm.format/1x"), nullptr);
  EXPECT_EQ(Method()->ext(Method(), QM_EXT_QUANTIZE_LINEAR), nullptr);
}

}  // namespace
}  // namespace affine_testing
