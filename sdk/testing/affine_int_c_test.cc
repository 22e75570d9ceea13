// The C helpers of affine_int.h against the C++ ones and against FORMATS.md.
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "quantmill/sdk/affine_int.h"
#include "quantmill/sdk/affine_int.hpp"
#include "quantmill/testing/fake_call.hpp"

namespace {

using qm::testing::FakeCall;

void ExpectSameScale(float scale) {
  for (const qm_dtype dtype : {QM_F16, QM_BF16, QM_F32}) {
    uint32_t ours[2] = {0, 0}, theirs[2] = {0, 0};
    const float returned = qm_store_scale(ours, dtype, 1, scale);
    const float expected = qm::RoundScale(scale, dtype);
    qm::StoreScale(theirs, dtype, 1, expected);
    EXPECT_EQ(returned, expected) << scale << " as " << dtype;
    EXPECT_EQ(ours[0], theirs[0]) << scale << " as " << dtype;
    EXPECT_EQ(ours[1], theirs[1]) << scale << " as " << dtype;
  }
}

TEST(AffineIntC, ScalesAreStoredAsTheCppLayerStoresThem) {
  for (const float scale : {0.0f, 1e-45f, 3e-8f, 0x1p-25f, 0x1.8p-24f, 0x1.ffcp-15f, 0x1.ffep-15f,
                            0x1p-14f, 65504.0f, 65519.0f, 65520.0f, 1e6f, 3.4e38f, INFINITY}) {
    ExpectSameScale(scale);
  }
  for (uint32_t bits = 0; bits < 0x7F800000u; bits += 9973)
    ExpectSameScale(qm::FloatFromBits(bits));
}

TEST(AffineIntC, CodesReadBackInAnyOrder) {
  for (const int bits : {2, 3, 4, 8}) {
    for (const int64_t n : {1, 31, 33, 95}) {
      std::vector<int32_t> row(static_cast<size_t>(qm_words_per_row(n, bits)), 0);
      ASSERT_EQ(qm_words_per_row(n, bits), qm::AffineWordsPerRow(n, bits));
      const auto code = [&](int64_t i) {
        return static_cast<uint32_t>(i * 37 + 11) & ((1u << bits) - 1);
      };
      for (int64_t i = n - 1; i >= 0; --i) qm_put_code(row.data(), bits, i, code(i));
      for (int64_t i = 0; i < n; ++i) {
        EXPECT_EQ(qm::UnpackCode(row.data(), bits, i), code(i)) << bits << " bits, " << i;
      }
    }
  }
}

qm_linear_info Info(int64_t rows, int64_t cols) {
  qm_linear_info info = {};
  info.struct_size = sizeof info;
  info.out_features = rows;
  info.in_features = cols;
  info.scale_dtype = QM_BF16;
  return info;
}

TEST(AffineIntC, EmitsTheTensorsOfTheFormat) {
  for (const int64_t group_size : {-1, 32}) {
    FakeCall call;
    call.ScratchLimit(1024);
    const qm_linear_info info = Info(3, 96);
    qm_packed packed = {};
    ASSERT_EQ(qm_affine_emit(call.get(), &info, 3, group_size, &packed), QM_OK) << call.error();
    EXPECT_STREQ(packed.format_id, "qm.fmt.affine-int/1");
    EXPECT_EQ(packed.format_json, qm::AffineIntJson(3, group_size, "int"));
    EXPECT_EQ(packed.out_features, 3);
    EXPECT_EQ(packed.in_features, 96);
    ASSERT_EQ(packed.tensor_count, 3u);
    const int64_t groups = group_size < 0 ? 1 : 3;
    const struct {
      const char* name;
      qm_dtype dtype;
      int64_t cols;
    } expected[] = {{"codes", QM_I32, 9}, {"scale", QM_BF16, groups}, {"zero", QM_U8, groups}};
    for (int i = 0; i < 3; ++i) {
      EXPECT_STREQ(packed.tensors[i].name, expected[i].name);
      EXPECT_EQ(packed.tensors[i].tensor.dtype, expected[i].dtype);
      EXPECT_EQ(packed.tensors[i].tensor.shape[0], 3);
      EXPECT_EQ(packed.tensors[i].tensor.shape[1], expected[i].cols);
    }
    EXPECT_EQ(call.Read<int32_t>(0, "codes"), std::vector<int32_t>(27, 0));
    EXPECT_TRUE(call.CanariesIntact());
  }
}

TEST(AffineIntC, SaysWhatFailed) {
  const qm_linear_info info = Info(3, 96);
  for (const int64_t size : {0, -2, 64, 97}) {
    FakeCall call;
    EXPECT_EQ(qm_affine_check(call.get(), &info, size), QM_INVALID_ARGUMENT);
    EXPECT_NE(call.error().find(std::to_string(size)), std::string::npos) << call.error();
  }
  FakeCall fine;
  for (const int64_t size : {-1, 1, 96}) EXPECT_EQ(qm_affine_check(fine.get(), &info, size), QM_OK);
  qm_packed packed = {};
  FakeCall no_scratch;
  no_scratch.FailScratchAt(0);
  EXPECT_EQ(qm_affine_emit(no_scratch.get(), &info, 4, 32, &packed), QM_RESOURCE_EXHAUSTED);
  for (int nth = 0; nth < 3; ++nth) {
    FakeCall no_emit;
    no_emit.FailEmitAt(nth);
    EXPECT_EQ(qm_affine_emit(no_emit.get(), &info, 4, 32, &packed), QM_RESOURCE_EXHAUSTED);
  }
}

}  // namespace
