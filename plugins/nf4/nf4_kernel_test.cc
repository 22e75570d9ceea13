// Dequantizing and products on the CPU against the reference of core/formats.
#include <cmath>
#include <cstring>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nf4.h"
#include "nf4_test_util.h"

namespace nf4_testing {
namespace {

using quantmill::nf4::CpuLevel;
using ::testing::HasSubstr;

TEST(Nf4Kernel, DequantizeEqualsTheReferenceBitForBit) {
  for (const ShapeCase& shape : kShapes) {
    for (const Setting& setting : Settings()) {
      const PackedWeight weight = RandomWeight(shape.rows, shape.columns, setting);
      SCOPED_TRACE(testing::Message()
                   << weight.format_json << " " << shape.rows << "x" << shape.columns);
      for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
        Tensor expected = *Tensor::Host(dtype, {shape.rows, shape.columns});
        ASSERT_TRUE(quantmill::DequantizeCodebookAbsmaxReference(weight, &expected).ok());
        Tensor actual = *Tensor::HostZeros(dtype, {shape.rows, shape.columns});
        qm_tensor out = actual.View();
        FakeCall call;
        ASSERT_EQ(Kernel().dequantize(call.get(), View(weight).get(), &out), QM_OK) << call.error();
        EXPECT_EQ(
            std::memcmp(expected.data(), actual.data(), static_cast<size_t>(expected.bytes())), 0);
      }
    }
  }
}

// Sums of `in` products in f32, in any order, with the weight rounded once more than in the
// reference at most.
void ExpectProduct(const PackedWeight& weight, int64_t rows) {
  const int64_t in = weight.in_features, out = weight.out_features;
  const std::vector<float> x = Gaussian(rows * in, 9, 1.0f);
  const Product want = ReferenceProduct(x, ReferenceWeight(weight), rows, in, out);
  FakeCall call;
  const qm_tensor input = call.Tensor(x, {rows, in});
  qm_tensor output = call.Tensor(std::vector<float>(rows * out, NAN), {rows, out});
  ASSERT_EQ(Kernel().matmul(call.get(), View(weight).get(), &input, nullptr, &output), QM_OK)
      << call.error();
  const std::vector<float> seen = call.Read<float>(output);
  for (size_t i = 0; i < seen.size(); ++i) {
    const double bound = static_cast<double>(in + 2) * 0x1p-24 * want.magnitude[i] + 1e-30;
    ASSERT_NEAR(seen[i], want.value[i], bound) << "output " << i;
  }
  EXPECT_TRUE(call.CanariesIntact());
}

TEST(Nf4Kernel, ProductsEqualTheReferenceOnEveryPath) {
  for (const CpuLevel level : {CpuLevel::kPortable, CpuLevel::kAvx2, CpuLevel::kAvx512}) {
    quantmill::nf4::LimitCpuLevel(level);
    for (const ShapeCase& shape : kShapes) {
      for (const Setting& setting : Settings()) {
        const PackedWeight weight = RandomWeight(shape.rows, shape.columns, setting);
        SCOPED_TRACE(testing::Message() << weight.format_json << " " << shape.rows << "x"
                                        << shape.columns << " level " << static_cast<int>(level));
        for (const int64_t rows : {1, 2, 3, 5, 8}) ExpectProduct(weight, rows);
      }
    }
  }
  quantmill::nf4::LimitCpuLevel(CpuLevel::kAvx512);
}

TEST(Nf4Kernel, LeavesManyRowsToTheHost) {
  const PackedWeight weight = RandomWeight(8, 64, {});
  FakeCall call;
  const qm_tensor x = call.Tensor(std::vector<float>(9 * 64), {9, 64});
  qm_tensor y = call.Tensor(std::vector<float>(9 * 8), {9, 8});
  EXPECT_EQ(Kernel().matmul(call.get(), View(weight).get(), &x, nullptr, &y), QM_UNIMPLEMENTED);
}

TEST(Nf4Kernel, AcceptsItsFormatAlone) {
  const char* json = R"({"block_size":64,"dtype":"bf16","type":"nf4"})";
  const char* id = quantmill::nf4::kFormatId;
  EXPECT_GT(Kernel().accepts(id, json, QM_CPU, 0, QM_F32), 0);
  EXPECT_EQ(Kernel().accepts(id, json, QM_CPU, 0, QM_BF16), 0);
  EXPECT_EQ(Kernel().accepts("qm.fmt.affine-int/1", json, QM_CPU, 0, QM_F32), 0);
  for (const char* bad :
       {"", "{}", R"({"block_size":48,"dtype":"bf16","type":"nf4"})",
        R"({"block_size":64,"dtype":"f64","type":"nf4"})",
        R"({"block_size":64,"dtype":"bf16","type":"nf3"})",
        R"({"block_size":64,"dtype":"bf16","type":"nf4"} )",
        R"({"block_size":064,"dtype":"bf16","type":"nf4"})",
        R"({"block_size":64,"dtype":"bf16","nested_block_size":0,"type":"nf4"})",
        R"({"block_size":64,"dtype":"bf16","nested_block_size":-3,"type":"nf4"})"}) {
    EXPECT_EQ(Kernel().accepts(id, bad, QM_CPU, 0, QM_F32), 0) << bad;
    EXPECT_FALSE(quantmill::ParseCodebookAbsmaxJson(bad).ok()) << bad;
  }
}

TEST(Nf4Kernel, RefusesDamagedWeights) {
  for (const bool nested : {false, true}) {
    const PackedWeight good = RandomWeight(16, 100, {false, 64, nested});
    const auto check = [](const PackedWeight& weight) {
      FakeCall call;
      const qm_status status = Format().check(call.get(), View(weight).get());
      EXPECT_EQ(call.error().empty(), status == QM_OK);
      EXPECT_EQ(quantmill::CheckCodebookAbsmax(weight).ok(), status == QM_OK);
      return status;
    };
    ASSERT_EQ(check(good), QM_OK);
    for (size_t i = 0; i < good.tensors.size(); ++i) {
      SCOPED_TRACE(good.tensors[i].name);
      PackedWeight weight = good;
      weight.tensors.erase(weight.tensors.begin() + static_cast<int64_t>(i));
      EXPECT_EQ(check(weight), QM_INVALID_ARGUMENT);
      weight = good;
      weight.tensors[i].tensor = *Tensor::HostZeros(DType::kF64, good.tensors[i].tensor.shape());
      EXPECT_EQ(check(weight), QM_INVALID_ARGUMENT);
      weight = good;
      weight.tensors[i].tensor = *Tensor::HostZeros(good.tensors[i].tensor.dtype(),
                                                    {good.tensors[i].tensor.elements() + 1});
      EXPECT_EQ(check(weight), QM_INVALID_ARGUMENT);
      if (good.tensors[i].tensor.dtype() != DType::kF32) continue;
      weight = good;
      Tensor copy = *Tensor::HostZeros(DType::kF32, good.tensors[i].tensor.shape());
      copy.as<float>()[copy.elements() - 1] = NAN;
      weight.tensors[i].tensor = copy;
      EXPECT_EQ(check(weight), QM_INVALID_ARGUMENT);
    }
    PackedWeight more = good;
    more.tensors.push_back({"unheard_of", good.tensors[0].tensor});
    EXPECT_EQ(check(more), QM_INVALID_ARGUMENT);
  }
}

// Only the GPU has another layout, and what it made is not for the CPU.
TEST(Nf4Kernel, PrepacksNothingOnTheCpu) {
  const PackedWeight weight = RandomWeight(16, 64, {});
  const View view(weight);
  FakeCall call;
  qm_packed out = {};
  EXPECT_EQ(Kernel().prepack(call.get(), view.get(), &out), QM_UNIMPLEMENTED);
  std::vector<uint8_t> tiles(16 * 64 / 2);
  std::vector<float> factors(16), codebook(16), dense(16 * 64);
  FakeCall other;
  const qm_named_tensor tensors[] = {{"tiles", other.Tensor(tiles, {16 * 64 / 2})},
                                     {"tile_absmax", other.Tensor(factors, {16})},
                                     {"codebook", other.Tensor(codebook, {16})}};
  qm_packed packed = *view.get();
  packed.tensors = tensors;
  packed.tensor_count = 3;
  qm_tensor y = other.Tensor(dense, {16, 64});
  EXPECT_EQ(Kernel().dequantize(other.get(), &packed, &y), QM_INVALID_ARGUMENT);
  EXPECT_THAT(other.error(), HasSubstr("prepacked for CUDA"));
}

}  // namespace
}  // namespace nf4_testing
