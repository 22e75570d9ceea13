#include "core/io/safetensors_writer.h"

#include <filesystem>
#include <set>
#include <string>

#include "core/io/checkpoint_files.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/shared_data.h"

namespace quantmill {
namespace {

using ::testing::HasSubstr;

std::set<std::string> FilesIn(const std::string& directory) {
  std::set<std::string> names;
  for (const auto& item : std::filesystem::directory_iterator(directory)) {
    names.insert(item.path().filename().string());
  }
  return names;
}

const std::vector<TensorDeclaration>& Mixed() {
  static const auto* tensors = new std::vector<TensorDeclaration>{
      {"a", DType::kI8, {3}},  {"b.weight", DType::kF32, {2, 3}}, {"c", DType::kI64, {}},
      {"h", DType::kF16, {2}}, {"empty", DType::kF32, {0, 4}},    {"q\"\u00e9", DType::kU8, {1}},
      {"i", DType::kI32, {1}},
  };
  return *tensors;
}

std::string MixedData(const std::string& name) {
  if (name == "a") return std::string("\x01\x02\x03", 3);
  if (name == "b.weight") {
    const float values[] = {0, 1, 2, 3, 4, 5};
    return std::string(reinterpret_cast<const char*>(values), sizeof values);
  }
  if (name == "c") return std::string("\x07\0\0\0\0\0\0\0", 8);
  if (name == "h") return std::string("\x00\x3c\x00\xc0", 4);
  if (name == "i") return std::string("\xff\xff\xff\xff", 4);
  if (name == "empty") return "";
  return "\x05";
}

// The bytes of safetensors.numpy.save (safetensors 0.6) for the same tensors.
std::string MixedFile() {
  std::string header =
      R"({"__metadata__":{"format":"pt"},"c":{"dtype":"I64","shape":[],"data_offsets":[0,8]},)"
      R"("b.weight":{"dtype":"F32","shape":[2,3],"data_offsets":[8,32]},)"
      R"("empty":{"dtype":"F32","shape":[0,4],"data_offsets":[32,32]},)"
      R"("i":{"dtype":"I32","shape":[1],"data_offsets":[32,36]},)"
      R"("h":{"dtype":"F16","shape":[2],"data_offsets":[36,40]},)"
      R"("a":{"dtype":"I8","shape":[3],"data_offsets":[40,43]},)"
      "\"q\\\"\u00e9\":"
      R"({"dtype":"U8","shape":[1],"data_offsets":[43,44]}}  )";
  std::string bytes = std::string("\xb0\x01\0\0\0\0\0\0", 8) + header;
  for (const char* name : {"c", "b.weight", "empty", "i", "h", "a", "q"}) bytes += MixedData(name);
  return bytes;
}

TEST(SafetensorsWriterTest, BytesEqualTheReferenceWriters) {
  const std::string directory = testing::MakeTempDir(), path = directory + "/m.safetensors";
  auto writer = SafetensorsWriter::Create(path, Mixed());
  ASSERT_TRUE(writer.ok()) << writer.status();
  for (const TensorDeclaration& tensor : Mixed()) {
    for (const char byte : MixedData(tensor.name)) {
      ASSERT_TRUE((*writer)->Append(tensor.name, std::string_view(&byte, 1)).ok());
    }
  }
  EXPECT_EQ(FilesIn(directory), std::set<std::string>{"m.safetensors.tmp"});
  ASSERT_TRUE((*writer)->Finish().ok());
  EXPECT_EQ(ReadFile(path).value(), MixedFile());
  EXPECT_EQ(FilesIn(directory), std::set<std::string>{"m.safetensors"});
  EXPECT_TRUE(SafetensorsFile::Open(path).ok());
}

TEST(SafetensorsWriterTest, RefusesWrongUse) {
  const std::string directory = testing::MakeTempDir(), path = directory + "/m.safetensors";
  const auto create = [&path](std::vector<TensorDeclaration> tensors) {
    return SafetensorsWriter::Create(path, std::move(tensors)).status();
  };
  EXPECT_THAT(create({{"a", DType::kU8, {1}}, {"a", DType::kI8, {1}}}).ToString(),
              HasSubstr("declared twice"));
  EXPECT_THAT(create({{"__metadata__", DType::kU8, {1}}}).ToString(), HasSubstr("reserves"));
  EXPECT_THAT(create({{"\xff", DType::kU8, {1}}}).ToString(), HasSubstr("UTF-8"));
  {
    auto writer = SafetensorsWriter::Create(path, {{"a", DType::kF32, {2}}}).value();
    EXPECT_THAT(writer->Write("b", Tensor::FromF32({2}, {1, 2})).ToString(),
                HasSubstr("not declared"));
    EXPECT_THAT(writer->Write("a", Tensor::FromF32({1, 2}, {1, 2})).ToString(),
                HasSubstr("was declared F32 [2], its data are F32 [1, 2]"));
    EXPECT_TRUE(writer->Append("a", "1234").ok());
    EXPECT_THAT(writer->Finish().ToString(), HasSubstr("tensor a has 4 of its 8 bytes"));
    EXPECT_THAT(writer->Append("a", "56789").ToString(), HasSubstr("more than its 8 bytes"));
  }
  EXPECT_TRUE(FilesIn(directory).empty());
}

TEST(CheckpointWriterTest, SingleFileReplacesAnOldIndexAndShards) {
  const std::string directory = testing::MakeTempDir();
  for (const char* old : {"model.safetensors.index.json", "model-00001-of-00002.safetensors"}) {
    ASSERT_TRUE(WriteFile(directory + "/" + old, "{}").ok());
  }
  auto writer = CheckpointWriter::Create(directory, Mixed()).value();
  for (const auto& tensor : Mixed()) {
    ASSERT_TRUE(writer->Append(tensor.name, MixedData(tensor.name)).ok());
  }
  ASSERT_TRUE(writer->Finish().ok());
  EXPECT_EQ(FilesIn(directory), std::set<std::string>{"model.safetensors"});
  EXPECT_EQ(ReadFile(directory + "/model.safetensors").value(), MixedFile());
}

TEST(CheckpointWriterTest, ShardsAndIndex) {
  const std::string directory = testing::MakeTempDir();
  ASSERT_TRUE(WriteFile(directory + "/model.safetensors", "old").ok());
  auto writer = CheckpointWriter::Create(directory,
                                         {{"z", DType::kF32, {2}},
                                          {"y", DType::kF32, {2}},
                                          {"big", DType::kF32, {9}},
                                          {"x", DType::kF32, {1}}},
                                         16)
                    .value();
  EXPECT_EQ(writer->file_names().size(), 3u);
  ASSERT_TRUE(writer->Write("x", Tensor::FromF32({1}, {4})).ok());
  ASSERT_TRUE(writer->Write("big", Tensor::FromF32({9}, {1, 2, 3, 4, 5, 6, 7, 8, 9})).ok());
  ASSERT_TRUE(writer->Write("z", Tensor::FromF32({2}, {1, 2})).ok());
  EXPECT_FALSE(writer->Finish().ok());
  ASSERT_TRUE(writer->Write("y", Tensor::FromF32({2}, {2, 3})).ok());
  ASSERT_TRUE(writer->Finish().ok());
  EXPECT_EQ(ReadFile(directory + "/model.safetensors.index.json").value(), R"({
  "metadata": {
    "total_size": 56
  },
  "weight_map": {
    "big": "model-00002-of-00003.safetensors",
    "x": "model-00003-of-00003.safetensors",
    "y": "model-00001-of-00003.safetensors",
    "z": "model-00001-of-00003.safetensors"
  }
}
)");
  const auto checkpoint = Checkpoint::Open(directory);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_EQ((*checkpoint)->Get("big")->as<float>()[8], 9.0f);
  EXPECT_EQ((*checkpoint)->Get("y")->as<float>()[1], 3.0f);
}

TEST(CheckpointWriterTest, RewritingAModelGivesTheSameTensors) {
  QM_SHARED_OR_SKIP(model, "models/small-llama");
  const auto original = Checkpoint::Open(model).value();
  const std::string directory = testing::MakeTempDir();
  std::vector<TensorDeclaration> declared;
  for (const CheckpointTensor& tensor : original->tensors()) {
    const Tensor data = original->Get(tensor.entry->name).value();
    declared.push_back({tensor.entry->name, data.dtype(), data.shape()});
  }
  auto writer = CheckpointWriter::Create(directory, declared, 10'000'000).value();
  for (const auto& item : declared) {
    ASSERT_TRUE(writer->Write(item.name, original->Get(item.name).value()).ok());
  }
  ASSERT_TRUE(writer->Finish().ok());
  const auto copy = Checkpoint::Open(directory).value();
  ASSERT_EQ(copy->tensors().size(), original->tensors().size());
  EXPECT_GT(copy->files().size(), 3u);
  for (const auto& item : declared) {
    const Tensor a = original->Get(item.name).value(), b = copy->Get(item.name).value();
    ASSERT_EQ(std::string_view(a.as<char>(), static_cast<size_t>(a.bytes())),
              std::string_view(b.as<char>(), static_cast<size_t>(b.bytes())));
  }
}

TEST(CheckpointWriterTest, NoRoomLeavesNothing) {
  const std::string directory = testing::MakeTempDir();
  const auto writer = CheckpointWriter::Create(
      directory, {{"a", DType::kU8, {10}}, {"b", DType::kU8, {int64_t{1} << 61}}}, 100);
  EXPECT_EQ(writer.status().code(), absl::StatusCode::kResourceExhausted) << writer.status();
  EXPECT_TRUE(FilesIn(directory).empty());
  EXPECT_EQ(CheckpointWriter::Create(directory + "/none", Mixed()).status().code(),
            absl::StatusCode::kNotFound);
}

}  // namespace
}  // namespace quantmill
