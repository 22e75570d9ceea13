#include "core/io/checkpoint_files.h"

#include <filesystem>
#include <string>

#include "core/io/files.h"
#include "core/io/safetensors_writer.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/shared_data.h"

namespace quantmill {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr char kIndex[] = "/model.safetensors.index.json";

void WriteTensors(const std::string& path, const std::vector<std::string>& names) {
  std::vector<TensorDeclaration> tensors;
  for (const std::string& name : names) tensors.push_back({name, DType::kU8, {1}});
  auto writer = SafetensorsWriter::Create(path, tensors).value();
  for (const std::string& name : names) ASSERT_TRUE(writer->Append(name, "x").ok());
  ASSERT_TRUE(writer->Finish().ok());
}

// Two shards with tensors a, b and c.
std::string TwoShards() {
  const std::string directory = testing::MakeTempDir();
  WriteTensors(directory + "/one.safetensors", {"a", "b"});
  WriteTensors(directory + "/two.safetensors", {"c"});
  EXPECT_TRUE(WriteFile(directory + kIndex, R"({"weight_map":{"a":"one.safetensors",)"
                                            R"("b":"one.safetensors","c":"two.safetensors"}})")
                  .ok());
  return directory;
}

std::string OpenError(const std::string& directory) {
  const auto checkpoint = Checkpoint::Open(directory);
  return checkpoint.ok() ? "" : std::string(checkpoint.status().message());
}

TEST(CheckpointTest, OpensShardsAndSingleFiles) {
  const auto sharded = Checkpoint::Open(TwoShards());
  ASSERT_TRUE(sharded.ok()) << sharded.status();
  EXPECT_EQ((*sharded)->tensors().size(), 3u);
  EXPECT_EQ((*sharded)->files().size(), 2u);
  EXPECT_THAT((*sharded)->Find("c")->file->path(), HasSubstr("two.safetensors"));
  EXPECT_EQ((*sharded)->Get("c")->as<char>()[0], 'x');
  EXPECT_EQ((*sharded)->Get("d").status().code(), absl::StatusCode::kNotFound);
  (*sharded)->ReleasePrefix("");
  (*sharded)->Release("c");

  const std::string directory = testing::MakeTempDir();
  WriteTensors(directory + "/model.safetensors", {"a"});
  EXPECT_TRUE(Checkpoint::Open(directory).value()->Has("a"));
}

TEST(CheckpointTest, TensorsUnderAPrefix) {
  const std::string directory = testing::MakeTempDir();
  WriteTensors(directory + "/model.safetensors", {"a", "b.1.x", "b.1.y", "b.10.x", "b.2", "c"});
  const auto checkpoint = Checkpoint::Open(directory).value();
  const auto names = [&checkpoint](std::string_view prefix) {
    std::vector<std::string> found;
    for (const auto& tensor : checkpoint->TensorsUnder(prefix)) found.push_back(tensor.entry->name);
    return found;
  };
  EXPECT_THAT(names("b.1."), ElementsAre("b.1.x", "b.1.y"));
  EXPECT_THAT(names("b.1"), ElementsAre("b.1.x", "b.1.y", "b.10.x"));
  EXPECT_THAT(names("c"), ElementsAre("c"));
  EXPECT_THAT(names("b.3"), ElementsAre());
  EXPECT_THAT(names("d"), ElementsAre());
  EXPECT_EQ(names("").size(), 6u);
}

TEST(CheckpointTest, MissingShardIsNamedWithItsFirstTensor) {
  const std::string directory = TwoShards();
  std::filesystem::remove(directory + "/two.safetensors");
  EXPECT_THAT(OpenError(directory), HasSubstr("file two.safetensors is missing"));
  EXPECT_THAT(OpenError(directory), HasSubstr("the first is c"));
}

TEST(CheckpointTest, TruncatedShardIsNamedWithTheTensor) {
  const std::string directory = TwoShards(), shard = directory + "/two.safetensors";
  std::filesystem::resize_file(shard, std::filesystem::file_size(shard) - 1);
  EXPECT_THAT(OpenError(directory), HasSubstr("two.safetensors; tensor c: it ends at byte 1"));
}

TEST(CheckpointTest, TensorThatIsNotInItsShard) {
  const std::string directory = TwoShards();
  ASSERT_TRUE(WriteFile(directory + kIndex, R"({"weight_map":{"d":"two.safetensors"}})").ok());
  EXPECT_THAT(OpenError(directory), HasSubstr("file two.safetensors has no tensor d"));
}

TEST(CheckpointTest, StraySingleFile) {
  const std::string directory = TwoShards();
  WriteTensors(directory + "/model.safetensors", {"a"});
  EXPECT_THAT(OpenError(directory), HasSubstr("delete the one that is out of date"));
}

TEST(CheckpointTest, BadIndex) {
  const std::string directory = TwoShards();
  for (const char* text :
       {"[]", "{}", R"({"weight_map":[]})", R"({"weight_map":{}})", R"({"weight_map":{"a":1}})",
        R"({"weight_map":{"a":"../one.safetensors"}})", R"({"weight_map":{"a":""}})",
        R"({"weight_map":{"a":"one.safetensors","a":"one.safetensors"}})", "{"}) {
    ASSERT_TRUE(WriteFile(directory + kIndex, text).ok());
    EXPECT_THAT(OpenError(directory), HasSubstr("model.safetensors.index.json")) << text;
  }
}

TEST(CheckpointTest, NothingToOpen) {
  EXPECT_THAT(OpenError("/nonexistent"), HasSubstr("it is not a directory"));
  const std::string directory = testing::MakeTempDir();
  EXPECT_THAT(OpenError(directory), HasSubstr("neither model.safetensors nor"));
  ASSERT_TRUE(WriteFile(directory + "/pytorch_model.bin", "x").ok());
  EXPECT_THAT(OpenError(directory), HasSubstr("convert them to safetensors"));
  WriteTensors(directory + "/model-00001-of-00002.safetensors", {"a"});
  EXPECT_THAT(OpenError(directory), HasSubstr("but no model.safetensors.index.json"));
  WriteTensors(directory + "/model.safetensors", {});
  EXPECT_THAT(OpenError(directory), HasSubstr("no tensors"));
}

TEST(CheckpointTest, ManyTensors) {
  const std::string directory = testing::MakeTempDir();
  std::vector<std::string> names;
  std::string index = "{\"weight_map\":{";
  for (int i = 0; i < 50'000; ++i) {
    names.push_back("model.layers." + std::to_string(i) + ".weight");
    index += (i ? ",\"" : "\"") + names.back() + "\":\"one.safetensors\"";
  }
  WriteTensors(directory + "/one.safetensors", names);
  ASSERT_TRUE(WriteFile(directory + kIndex, index + "}}").ok());
  EXPECT_EQ(Checkpoint::Open(directory).value()->tensors().size(), names.size());
}

}  // namespace
}  // namespace quantmill
