// Which way a linear is computed: dense, packed, or not at all.
#include "core/model/weights.h"

#include "core/formats/int8_row.h"
#include "core/formats/reference.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace quantmill {
namespace {

using ::testing::HasSubstr;

// Serves no product, as a format's reference does.
LinearWeight Packed(Backend& backend, bool activations) {
  const Tensor codes = *Tensor::HostZeros(DType::kI8, {2, 3});
  codes.as<int8_t>()[0] = 2;
  LinearWeight weight;
  weight.packed = std::make_shared<const PackedWeight>(
      *MakeInt8Row({activations}, codes, Tensor::FromF32({2}, {1, 1})));
  weight.kernel = MakeReferencePackedKernel(backend);
  return weight;
}

TEST(ApplyLinear, NeverMultipliesDenseWhereActivationsAreQuantized) {
  const auto backend = MakeCpuBackend(1).value();
  const Tensor x = Tensor::FromF32({1, 3}, {5, 0, 0});
  Tensor y = *Tensor::Host(DType::kF32, {1, 2});
  LinearWeight plain = Packed(*backend, false);
  ASSERT_TRUE(ApplyLinear(*backend, plain, x, &y).ok());
  EXPECT_EQ(y.as<float>()[0], 10);
  LinearWeight quantized = Packed(*backend, true);
  for (const bool with_dense : {false, true}) {
    if (with_dense) quantized.dense = *Tensor::HostZeros(DType::kF32, {2, 3});
    const absl::Status status = ApplyLinear(*backend, quantized, x, &y);
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_THAT(std::string(status.message()), HasSubstr("quantize their input"));
  }
}

}  // namespace
}  // namespace quantmill
