#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "host/cli/inspect_checkpoint.h"
#include "tests/support/shared_data.h"

namespace quantmill {
namespace {

TEST(InspectCheckpointTest, CountsAnOriginalModel) {
  QM_SHARED_OR_SKIP(model, "models/small-llama");
  const auto summary = SummarizeCheckpoint(model);
  ASSERT_TRUE(summary.ok()) << summary.status();
  EXPECT_EQ(summary->model_type, "llama");
  EXPECT_EQ(summary->tensors, 92);
  EXPECT_EQ(summary->dense_linears, 70);  // 10 blocks of 7; the head is tied
  EXPECT_EQ(summary->packed_linears, 0);
  EXPECT_EQ(summary->bits_per_weight, 0);
  int64_t bytes = 0, count = 0;
  for (const TensorGroup& group : summary->groups) {
    bytes += group.bytes;
    count += group.count;
  }
  EXPECT_EQ(bytes, summary->bytes);
  EXPECT_EQ(count, summary->tensors);
  const std::string text = FormatSummary(*summary);
  EXPECT_THAT(text, ::testing::HasSubstr("model.layers.*.mlp.down_proj.weight"));
  EXPECT_THAT(text, ::testing::HasSubstr("linears: 70 dense, 0 packed"));
}

TEST(InspectCheckpointTest, BadDirectoriesAreErrors) {
  EXPECT_FALSE(SummarizeCheckpoint("/nonexistent").ok());
  EXPECT_FALSE(SummarizeCheckpoint(testing::MakeTempDir()).ok());
  EXPECT_FALSE(SummarizeFile("/nonexistent.safetensors").ok());
}

}  // namespace
}  // namespace quantmill
