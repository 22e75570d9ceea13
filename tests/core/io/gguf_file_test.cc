// The container, block types, and names of GGUF files.
#include "core/io/gguf_file.h"

#include <cstring>
#include <filesystem>

#include "core/io/checkpoint_files.h"
#include "core/io/files.h"
#include "core/io/gguf_tensors.h"
#include "core/io/gguf_writer.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/shared_data.h"

namespace quantmill {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

// Little-endian pieces of a file.
template <class T>
std::string Raw(T value) {
  return std::string(reinterpret_cast<const char*>(&value), sizeof value);
}
std::string Text(const std::string& text) { return Raw<uint64_t>(text.size()) + text; }
std::string Start(uint64_t tensors, uint64_t keys, uint32_t version = 3) {
  return "GGUF" + Raw(version) + Raw(tensors) + Raw(keys);
}
std::string TensorInfo(const std::string& name, std::vector<uint64_t> dims, int32_t type,
                       uint64_t offset) {
  std::string bytes = Text(name) + Raw<uint32_t>(static_cast<uint32_t>(dims.size()));
  for (const uint64_t dim : dims) bytes += Raw(dim);
  return bytes + Raw(type) + Raw(offset);
}
std::string WithData(std::string header, size_t bytes) {
  header.resize((header.size() + 31) / 32 * 32, '\0');
  return header + std::string(bytes, '\1');
}

std::string GgufError(const std::string& bytes) {
  const auto header = ParseGgufHeader(bytes, bytes.size(), "m.gguf");
  return header.ok() ? "" : std::string(header.status().message());
}

TEST(GgufFileTest, DequantizesAsTheGgufPackage) {
  const auto file = GgufFile::Open(testing::SourcePath("tests/data/gguf/blocks.gguf"));
  ASSERT_TRUE(file.ok()) << file.status();
  const GgufHeader& header = (*file)->header();
  for (const char* name :
       {"F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"}) {
    SCOPED_TRACE(name);
    const GgufTensor* tensor = header.FindTensor(name);
    const GgufTensor* expected = header.FindTensor(std::string(name) + ".expected");
    ASSERT_NE(tensor, nullptr);
    ASSERT_NE(expected, nullptr);
    EXPECT_EQ(tensor->type->name, name);
    EXPECT_THAT(tensor->shape, ElementsAre(2, 512));
    std::vector<float> values(1024);
    DequantizeGgml(*tensor->type, (*file)->data(*tensor), 1024 / tensor->type->block,
                   values.data());
    const auto* wanted = reinterpret_cast<const float*>((*file)->data(*expected));
    for (size_t i = 0; i < values.size(); ++i) ASSERT_EQ(values[i], wanted[i]) << i;
  }
}

TEST(GgufFileTest, ReadsMetadataOfEveryKind) {
  const auto file = GgufFile::Open(testing::SourcePath("tests/data/gguf/blocks.gguf"));
  ASSERT_TRUE(file.ok()) << file.status();
  const GgufHeader& header = (*file)->header();
  EXPECT_EQ(header.version, 3u);
  EXPECT_EQ(header.Text("general.architecture"), "fixture");
  EXPECT_THAT(header.Find("fixture.i32")->numbers, ElementsAre(1, -2, 3));
  EXPECT_THAT(header.Find("fixture.strings")->strings, ElementsAre("", "a b", "\xC3\xA9"));
  EXPECT_EQ(header.Number("fixture.f64", 0), 0.1);
  EXPECT_TRUE(header.Flag("fixture.bool", false));
  EXPECT_EQ(header.Number("fixture.none", 7), 7);
}

TEST(GgufFileTest, RefusesDamagedHeaders) {
  EXPECT_THAT(GgufError("GGML"), HasSubstr("no GGUF file"));
  EXPECT_THAT(GgufError(""), HasSubstr("no GGUF file"));
  EXPECT_THAT(GgufError(Start(0, 0, 1)), HasSubstr("GGUF version 1; 2 and 3 can be read"));
  EXPECT_THAT(GgufError(Start(0, 0, 0x03000000)), HasSubstr("big-endian"));
  EXPECT_THAT(GgufError(Start(0, 0).substr(0, 20)), HasSubstr("ends early"));
  EXPECT_THAT(GgufError(Start(uint64_t{1} << 60, 0)), HasSubstr("more than it has room for"));
  const std::string key = Text("k") + Raw<uint32_t>(4) + Raw<uint32_t>(1);
  EXPECT_THAT(GgufError(Start(0, 2) + key + key), HasSubstr("key k is there twice"));
  EXPECT_THAT(GgufError(Start(0, 1) + Text("") + Raw<uint32_t>(4) + Raw<uint64_t>(1)),
              HasSubstr("not a printable name"));
  EXPECT_THAT(GgufError(Start(0, 1) + Text("k") + Raw<uint32_t>(13) + Raw<uint64_t>(1)),
              HasSubstr("type 13 is not known"));
  const std::string array = Text("k") + Raw<uint32_t>(9) + Raw<uint32_t>(6);
  EXPECT_THAT(GgufError(Start(0, 1) + array + Raw(uint64_t{1} << 62)), HasSubstr("ends early"));
  EXPECT_THAT(
      GgufError(Start(0, 1) + Text("k") + Raw<uint32_t>(9) + Raw<uint32_t>(9) + Raw<uint64_t>(0)),
      HasSubstr("an array of type 9 is not known"));
  EXPECT_THAT(GgufError(Start(0, 1) + Text("k") + Raw<uint32_t>(8) + Raw(uint64_t{1} << 40)),
              HasSubstr("ends early"));
  EXPECT_THAT(
      GgufError(Start(0, 1) + Text("general.alignment") + Raw<uint32_t>(4) + Raw<uint32_t>(24)),
      HasSubstr("power of two"));
}

TEST(GgufFileTest, RefusesDamagedTensors) {
  const auto one = [](const std::string& info, size_t data) {
    return GgufError(WithData(Start(1, 0) + info, data));
  };
  EXPECT_EQ(one(TensorInfo("t", {4}, 0, 0), 16), "");
  EXPECT_THAT(one(TensorInfo("t", {4}, 0, 0), 15), HasSubstr("the file holds only 15"));
  EXPECT_THAT(one(TensorInfo("t", {4}, 0, 32), 64), HasSubstr("0 is its place"));
  EXPECT_THAT(one(TensorInfo("t", {4}, 99, 0), 16), HasSubstr("type number 99"));
  EXPECT_THAT(one(TensorInfo("t", {4}, 99, 0), 16), HasSubstr("Q4_K"));
  EXPECT_THAT(one(TensorInfo("t", {48}, 8, 0), 64), HasSubstr("whole blocks of 32"));
  EXPECT_THAT(one(TensorInfo("t", {0}, 0, 0), 16), HasSubstr("dimension 0 is 0"));
  EXPECT_THAT(one(TensorInfo("t", {1, 1, 1, 1, 1}, 0, 0), 16), HasSubstr("5 dimensions"));
  EXPECT_THAT(one(TensorInfo("t", {uint64_t{1} << 62, 4}, 0, 0), 16), HasSubstr("too large"));
  EXPECT_THAT(one(TensorInfo("t", {uint64_t{1} << 32, uint64_t{1} << 32}, 0, 0), 16),
              HasSubstr("too large"));
  EXPECT_THAT(one(TensorInfo(std::string(64, 'n'), {4}, 0, 0), 16), HasSubstr("at most 63"));
  EXPECT_THAT(one(TensorInfo("t\n", {4}, 0, 0), 16), HasSubstr("no printable name"));
  EXPECT_THAT(GgufError(WithData(
                  Start(2, 0) + TensorInfo("t", {4}, 0, 0) + TensorInfo("t", {4}, 0, 32), 64)),
              HasSubstr("is there twice"));
}

TEST(GgufWriterTest, WritesTheBytesOfTheFormat) {
  const std::string path = testing::MakeTempDir() + "/w.gguf";
  const GgufMetadata metadata = {
      {"a", GgufValue::U32(7)},
      {"b", {GgufValueType::kString, true, {"x", ""}, {}}},
  };
  auto writer = GgufWriter::Create(
      path, metadata, {{"one", GgmlType::kF32, {3}}, {"two", GgmlType::kQ8_0, {2, 32}}});
  ASSERT_TRUE(writer.ok()) << writer.status();
  const std::string one = Raw(1.0f) + Raw(2.0f) + Raw(3.0f), two(68, '\2');
  ASSERT_TRUE((*writer)->Write("two", 34, two.substr(34)).ok());
  EXPECT_EQ((*writer)->Finish().code(), absl::StatusCode::kFailedPrecondition);
  ASSERT_TRUE((*writer)->Write("two", 0, two.substr(0, 34)).ok());
  EXPECT_FALSE((*writer)->Write("two", 0, two).ok());
  EXPECT_FALSE((*writer)->Write("three", 0, "x").ok());
  ASSERT_TRUE((*writer)->Write("one", 0, one).ok());
  ASSERT_TRUE((*writer)->Finish().ok());
  std::string expected = Start(2, 2) + Text("a") + Raw<uint32_t>(4) + Raw<uint32_t>(7) + Text("b") +
                         Raw<uint32_t>(9) + Raw<uint32_t>(8) + Raw<uint64_t>(2) + Text("x") +
                         Text("") + TensorInfo("one", {3}, 0, 0) +
                         TensorInfo("two", {32, 2}, 8, 32);
  expected.resize((expected.size() + 31) / 32 * 32, '\0');
  expected += one + std::string(20, '\0') + two + std::string(28, '\0');
  EXPECT_EQ(*ReadFile(path), expected);
}

TEST(GgufWriterTest, RefusesWhatReadersWould) {
  const std::string path = testing::MakeTempDir() + "/w.gguf";
  const auto error = [&](const GgufMetadata& metadata,
                         const std::vector<GgufDeclaration>& tensors) {
    return std::string(GgufWriter::Create(path, metadata, tensors).status().message());
  };
  EXPECT_THAT(error({{"k", GgufValue::U32(1)}, {"k", GgufValue::U32(1)}}, {}),
              HasSubstr("k is there twice"));
  EXPECT_THAT(error({}, {{"t", GgmlType::kF32, {1}}, {"t", GgmlType::kF32, {1}}}),
              HasSubstr("t is there twice"));
  EXPECT_THAT(error({}, {{"t", GgmlType::kQ4_0, {1, 40}}}), HasSubstr("whole blocks"));
  EXPECT_THAT(error({}, {{std::string(64, 't'), GgmlType::kF32, {1}}}), HasSubstr("longer"));
  EXPECT_FALSE(FileExists(path));
}

TEST(GgufTensorsTest, InterleavesTheHalvesOfAHead) {
  std::vector<int64_t> stored(8);
  for (int64_t row = 0; row < 8; ++row) stored[InterleavedRow(row, 8, 1)] = row;
  EXPECT_THAT(stored, ElementsAre(0, 4, 1, 5, 2, 6, 3, 7));
  EXPECT_EQ(InterleavedRow(13, 16, 2), 8 + 3);
}

TEST(GgufTensorsTest, KnowsWhereEveryTensorLies) {
  const GgufModel llama = {"llama", 4, 2, 0}, mixtral = {"llama", 4, 2, 8};
  const GgufModel qwen = {"qwen3moe", 4, 2, 8};
  const auto place = [](const GgufModel& model, const std::string& name) {
    const auto found = GgufPlaceOf(model, name);
    return found ? absl::StrCat(found->tensor, " ", found->expert, " ", found->heads) : "none";
  };
  EXPECT_EQ(place(llama, "model.embed_tokens.weight"), "token_embd.weight -1 0");
  EXPECT_EQ(place(llama, "lm_head.weight"), "output.weight -1 0");
  EXPECT_EQ(place(llama, "model.layers.12.self_attn.q_proj.weight"), "blk.12.attn_q.weight -1 4");
  EXPECT_EQ(place(llama, "model.layers.0.self_attn.k_proj.bias"), "blk.0.attn_k.bias -1 2");
  EXPECT_EQ(place(llama, "model.layers.0.self_attn.v_proj.weight"), "blk.0.attn_v.weight -1 0");
  EXPECT_EQ(place(qwen, "model.layers.0.self_attn.q_proj.weight"), "blk.0.attn_q.weight -1 0");
  EXPECT_EQ(place(mixtral, "model.layers.1.block_sparse_moe.gate.weight"),
            "blk.1.ffn_gate_inp.weight -1 0");
  EXPECT_EQ(place(mixtral, "model.layers.1.block_sparse_moe.experts.7.w2.weight"),
            "blk.1.ffn_down_exps.weight 7 0");
  EXPECT_EQ(place(mixtral, "model.layers.1.block_sparse_moe.experts.8.w2.weight"), "none");
  EXPECT_EQ(place(qwen, "model.layers.1.mlp.experts.3.up_proj.weight"),
            "blk.1.ffn_up_exps.weight 3 0");
  EXPECT_EQ(place(llama, "model.layers.x.self_attn.v_proj.weight"), "none");
  EXPECT_EQ(place(llama, "model.rotary.inv_freq"), "none");
}

// A file with one tensor, of the given type.
std::string WriteOne(const std::string& architecture, const GgufDeclaration& tensor,
                     const std::string& data) {
  const std::string path = testing::MakeTempDir() + "/one.gguf";
  const GgufMetadata metadata = {
      {"general.architecture", GgufValue::Text(architecture)},
      {architecture + ".attention.head_count", GgufValue::U32(1)},
  };
  auto writer = GgufWriter::Create(path, metadata, {tensor});
  EXPECT_TRUE(writer.ok()) << writer.status();
  EXPECT_TRUE((*writer)->Write(tensor.name, 0, data).ok());
  EXPECT_TRUE((*writer)->Finish().ok());
  return path;
}

TEST(GgufTensorsTest, GivesRowsInTheOriginalOrder) {
  // Rows of q as stored: 0, 2, 1, 3; each a block with d = 1 and the row's number as every code.
  std::string data;
  for (const char row : {0, 2, 1, 3}) {
    data += Raw<uint16_t>(0x3C00) + std::string(32, row);
  }
  const std::string path =
      WriteOne("llama", {"blk.0.attn_q.weight", GgmlType::kQ8_0, {4, 32}}, data);
  const std::string name = "model.layers.0.self_attn.q_proj.weight";
  const auto dense = Checkpoint::Open(path);
  ASSERT_TRUE(dense.ok()) << dense.status();
  const Tensor values = *(*dense)->Get(name);
  EXPECT_EQ(values.dtype(), DType::kF32);
  for (int row = 0; row < 4; ++row) EXPECT_EQ(values.as<float>()[row * 32 + 9], row);
  EXPECT_EQ((*(*dense)->Get(name)).data(), values.data());  // shared while it is held
  EXPECT_EQ((*dense)->Find(name)->entry->bytes(), 4u * 32 * 4);

  const auto blocks = Checkpoint::Open(path, GgufView::kBlocks);
  ASSERT_TRUE(blocks.ok()) << blocks.status();
  const SafetensorsEntry& entry = *(*blocks)->Find(name)->entry;
  EXPECT_EQ(entry.dtype_name, "Q8_0");
  EXPECT_EQ(entry.bytes(), 4u * 34);
  EXPECT_THAT(entry.shape, ElementsAre(4, 32));
  const Tensor bytes = *(*blocks)->Get(name);
  EXPECT_EQ(bytes.shape(), (Shape{4, 34}));
  for (int row = 0; row < 4; ++row) EXPECT_EQ(bytes.as<uint8_t>()[row * 34 + 20], row);
  (*blocks)->Release(name);
}

TEST(GgufTensorsTest, RefusesWhatItCannotRead) {
  const auto error = [](const std::string& path) {
    return std::string(Checkpoint::Open(path).status().message());
  };
  const GgufDeclaration norm = {"output_norm.weight", GgmlType::kF32, {1}};
  EXPECT_THAT(
      error(WriteOne("gemma", norm, Raw(1.0f))),
      HasSubstr("architecture \"gemma\" of a GGUF file is not supported; supported are llama"));
  EXPECT_THAT(error(WriteOne("llama", {"blk.0.ssm_a.weight", GgmlType::kF32, {1}}, Raw(1.0f))),
              HasSubstr("tensor blk.0.ssm_a.weight is not one that a model of architecture llama"));
  EXPECT_THAT(error(WriteOne("llama", {"blk.0.attn_q.weight", GgmlType::kF32, {3, 1}},
                             std::string(12, '\0'))),
              HasSubstr("not pairs of them"));
  const std::string bytes =
      WithData(Start(1, 2) + Text("general.architecture") + Raw<uint32_t>(8) + Text("llama") +
                   Text("llama.attention.head_count") + Raw<uint32_t>(4) + Raw<uint32_t>(1) +
                   TensorInfo("output.weight", {256, 1}, 10, 0),
               84);
  const std::string path = testing::MakeTempDir() + "/q2.gguf";
  ASSERT_TRUE(WriteFile(path, bytes).ok());
  EXPECT_THAT(error(path),
              HasSubstr("has type Q2_K, which is not supported; supported are F32, F16"));
}

TEST(FindGgufTest, TakesAFileOrTheOnlyOneOfADirectory) {
  const std::string directory = testing::MakeTempDir();
  EXPECT_EQ(*FindGguf(directory), "");
  EXPECT_EQ(*FindGguf(directory + "/nowhere"), "");
  ASSERT_TRUE(WriteFile(directory + "/a.gguf", "x").ok());
  EXPECT_EQ(*FindGguf(directory), directory + "/a.gguf");
  EXPECT_EQ(*FindGguf(directory + "/a.gguf"), directory + "/a.gguf");
  ASSERT_TRUE(WriteFile(directory + "/b.gguf", "x").ok());
  EXPECT_THAT(std::string(FindGguf(directory).status().message()),
              HasSubstr("2 GGUF files: a.gguf, b.gguf"));
  ASSERT_TRUE(WriteFile(directory + "/model.safetensors", "x").ok());
  EXPECT_EQ(*FindGguf(directory), "");
  ASSERT_TRUE(WriteFile(directory + "/notes.txt", "x").ok());
  EXPECT_THAT(std::string(FindGguf(directory + "/notes.txt").status().message()),
              HasSubstr("neither a directory nor .gguf"));
}

}  // namespace
}  // namespace quantmill
