#include "core/formats/additive_codebook.h"

#include <cmath>

#include "core/formats/reference.h"
#include "core/tensor/dtype.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace quantmill {
namespace {

using ::testing::HasSubstr;

// Two codebooks of four vectors of two; two rows of two groups.
PackedWeight Small() {
  Tensor codes = *Tensor::Host(DType::kI8, {2, 2, 2});
  const int8_t stored[] = {0, 1, -2, -1, 1, 1, -1, 0};  // indices 0 1, 2 3, 1 1, 3 0
  std::copy(stored, stored + 8, codes.as<int8_t>());
  const Tensor codebooks =
      Tensor::FromF32({2, 4, 2}, {1, 2, 3, 4, 5, 6, 7, 8, 10, 20, 30, 40, 50, 60, 70, 80});
  return {
      std::string(kAdditiveCodebookId),
      R"({"codebooks":2,"group_size":2,"index_bits":2})",
      {{"codes", codes}, {"codebooks", codebooks}, {"scales", Tensor::FromF32({2}, {0.5f, 2.0f})}},
      2,
      4};
}

TEST(AdditiveCodebook, SumsVectorsAndScalesRows) {
  Tensor out = *Tensor::Host(DType::kF32, {2, 4});
  ASSERT_TRUE(DequantizeWithReference(Small(), &out).ok());
  const float expected[] = {0.5f * 31, 0.5f * 42, 0.5f * 75, 0.5f * 86, 66, 88, 34, 56};
  for (int i = 0; i < 8; ++i) EXPECT_EQ(out.as<float>()[i], expected[i]) << i;
}

void ExpectCodebookRefused(const PackedWeight& weight, const std::string& word) {
  const absl::Status status = CheckWithReference(weight);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr(word));
}

TEST(AdditiveCodebook, DamageIsNamed) {
  EXPECT_TRUE(CheckWithReference(Small()).ok());
  PackedWeight w = Small();
  w.tensors[0].tensor.as<int8_t>()[3] = 2;
  ExpectCodebookRefused(w, "code 3 is 2");
  w = Small();
  w.tensors[1].tensor.as<float>()[9] = NAN;
  ExpectCodebookRefused(w, "value 9 of tensor 'codebooks'");
  w = Small();
  w.tensors[2].tensor.as<float>()[1] = INFINITY;
  ExpectCodebookRefused(w, "value 1 of tensor 'scales'");
  w = Small();
  w.tensors.pop_back();
  ExpectCodebookRefused(w, "no tensor 'scales'");
  w = Small();
  w.tensors.push_back({"bias", w.tensors[2].tensor});
  ExpectCodebookRefused(w, "'bias'");
  w = Small();
  w.tensors.push_back(w.tensors[2]);
  ExpectCodebookRefused(w, "two tensors");
  w = Small();
  w.in_features = 5;
  ExpectCodebookRefused(w, "multiple of group_size");
  w = Small();
  w.out_features = 3;
  ExpectCodebookRefused(w, "'codes'");
}

TEST(AdditiveCodebook, ParametersHaveOneForm) {
  AdditiveCodebookParams params;
  params.codebooks = 1;
  params.index_bits = 16;
  const std::string json = AdditiveCodebookJson(params);
  EXPECT_EQ(json, R"({"codebooks":1,"group_size":8,"index_bits":16})");
  ASSERT_TRUE(ParseAdditiveCodebookJson(json).ok());
  EXPECT_EQ(ParseAdditiveCodebookJson(json)->index_bits, 16);
  EXPECT_EQ(params.code_dtype(), DType::kI16);
  for (const char* bad : {"", "[]", R"({"codebooks":1,"group_size":8})",
                          R"({"codebooks":17,"group_size":8,"index_bits":8})",
                          R"({"codebooks":1,"group_size":0,"index_bits":8})",
                          R"({"codebooks":1,"group_size":8,"index_bits":17})",
                          R"({"codebooks":1,"group_size":8,"index_bits":"8"})",
                          R"({"codebooks":1, "group_size":8,"index_bits":8})",
                          R"({"codebooks":1,"extra":1,"group_size":8,"index_bits":8})"}) {
    EXPECT_FALSE(ParseAdditiveCodebookJson(bad).ok()) << bad;
  }
}

}  // namespace
}  // namespace quantmill
