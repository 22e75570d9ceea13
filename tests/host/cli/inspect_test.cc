#include <filesystem>

#include "core/io/safetensors_writer.h"
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

// bitsandbytes may store its bytes under another dtype; they are still no dense weight.
TEST(InspectCheckpointTest, PackedCodesInAFloatTypeAreNotDense) {
  const std::string model = testing::MakeTempDir();
  std::filesystem::copy(testing::SourcePath("configs/quickstart/tiny-llama/config.json"), model);
  const std::string query = "model.layers.0.self_attn.q_proj.weight";
  const std::string key = "model.layers.0.self_attn.k_proj.weight";
  const auto writer = SafetensorsWriter::Create(model + "/model.safetensors",
                                                {{query, DType::kBF16, Shape({4096, 1})},
                                                 {query + ".absmax", DType::kF32, Shape({256})},
                                                 {key, DType::kBF16, Shape({64, 128})}})
                          .value();
  const auto write = [&](const std::string& name, DType dtype, const Shape& shape) {
    const Tensor tensor = Tensor::Host(dtype, shape).value();
    ASSERT_TRUE(writer->Write(name, tensor).ok());
  };
  write(query, DType::kBF16, Shape({4096, 1}));
  write(query + ".absmax", DType::kF32, Shape({256}));
  write(key, DType::kBF16, Shape({64, 128}));
  ASSERT_TRUE(writer->Finish().ok());
  const auto summary = SummarizeCheckpoint(model);
  ASSERT_TRUE(summary.ok()) << summary.status();
  EXPECT_EQ(summary->packed_linears, 1);
  EXPECT_EQ(summary->dense_linears, 1);
  EXPECT_DOUBLE_EQ(summary->bits_per_weight, 8.0 * (4096 * 2 + 256 * 4) / (128 * 128));
}

TEST(InspectCheckpointTest, BadDirectoriesAreErrors) {
  EXPECT_FALSE(SummarizeCheckpoint("/nonexistent").ok());
  EXPECT_FALSE(SummarizeCheckpoint(testing::MakeTempDir()).ok());
  EXPECT_FALSE(SummarizeFile("/nonexistent.safetensors").ok());
}

}  // namespace
}  // namespace quantmill
