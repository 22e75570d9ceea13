#include "core/io/safetensors_reader.h"

#include <cstring>
#include <string>

#include "core/io/files.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/shared_data.h"

namespace quantmill {
namespace {

using ::testing::HasSubstr;

std::string FileBytes(const std::string& header, const std::string& data) {
  const uint64_t size = header.size();
  std::string bytes(8, '\0');
  std::memcpy(bytes.data(), &size, 8);
  return bytes + header + data;
}

absl::StatusOr<std::shared_ptr<const SafetensorsFile>> OpenBytes(const std::string& bytes) {
  const std::string path = testing::MakeTempDir() + "/x.safetensors";
  EXPECT_TRUE(WriteFile(path, bytes).ok());
  return SafetensorsFile::Open(path);
}

std::string HeaderError(const std::string& bytes) {
  const auto header = ParseSafetensorsHeader(bytes, bytes.size(), "m/x.safetensors");
  return header.ok() ? "" : std::string(header.status().message());
}

TEST(SafetensorsReaderTest, ReadsTensorsWithoutCopying) {
  const auto file = OpenBytes(FileBytes(
      R"({"__metadata__":{"format":"pt"},"b":{"dtype":"I32","shape":[2],"data_offsets":[8,16]},)"
      R"("a":{"dtype":"F16","shape":[2,2],"data_offsets":[0,8]}} )"
      "  ",
      std::string("\x00\x3c\x00\xc0\x00\x00\x00\x38\x07\x00\x00\x00\xff\xff\xff\xff", 16)));
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ((*file)->metadata().at("format"), "pt");
  ASSERT_EQ((*file)->entries().size(), 2u);
  EXPECT_EQ((*file)->entries()[0].name, "a");
  const Tensor a = (*file)->Get("a").value(), b = (*file)->Get("b").value();
  EXPECT_EQ(a.shape(), (Shape{2, 2}));
  EXPECT_TRUE(a.read_only());
  EXPECT_EQ(F16ToF32(a.as<uint16_t>()[1]), -2.0f);
  EXPECT_EQ(b.as<int32_t>()[0], 7);
  EXPECT_EQ(b.as<int32_t>()[1], -1);
  (*file)->Release("a");
  (*file)->Release("nothing");
  EXPECT_EQ(F16ToF32(a.as<uint16_t>()[3]), 0.5f);
  EXPECT_EQ((*file)->Get("c").status().code(), absl::StatusCode::kNotFound);
}

TEST(SafetensorsReaderTest, TensorOutlivesTheFileObject) {
  Tensor tensor;
  {
    auto file =
        OpenBytes(FileBytes(R"({"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}})", "xyz"));
    tensor = (*file)->Get("a").value();
  }
  EXPECT_EQ(tensor.as<char>()[2], 'z');
}

TEST(SafetensorsReaderTest, ScalarsEmptyTensorsAndMisalignedData) {
  const auto file = OpenBytes(FileBytes(
      R"({"e":{"dtype":"F32","shape":[0,7],"data_offsets":[0,0]},"s":{"dtype":"U8","shape":[],)"
      R"("data_offsets":[0,1]},"w":{"dtype":"F32","shape":[1],"data_offsets":[1,5]}})",
      std::string("\x01\x00\x00\x80\x3f", 5)));
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ((*file)->Get("e")->elements(), 0);
  EXPECT_EQ((*file)->Get("s")->rank(), 0);
  const Tensor w = (*file)->Get("w").value();
  EXPECT_EQ(reinterpret_cast<uintptr_t>(w.data()) % 4, 0u);
  EXPECT_EQ(w.as<float>()[0], 1.0f);
}

TEST(SafetensorsReaderTest, NoTensorsAtAllIsLegal) {
  EXPECT_EQ(HeaderError(FileBytes("{}", "")), "");
}

TEST(SafetensorsReaderTest, UnknownTypesFailOnlyWhenAskedFor) {
  const auto file = OpenBytes(FileBytes(
      R"({"m":{"dtype":"BOOL","shape":[2],"data_offsets":[0,2]},"n":{"dtype":"NEW","shape":[9],)"
      R"("data_offsets":[2,4]},"o":{"dtype":"U8","shape":[1,1,1,1,1],"data_offsets":[4,5]}})",
      "abcde"));
  ASSERT_TRUE(file.ok()) << file.status();
  for (const char* name : {"m", "n", "o"}) {
    EXPECT_EQ((*file)->Get(name).status().code(), absl::StatusCode::kUnimplemented) << name;
  }
  EXPECT_EQ((*file)->Find("m")->dtype_name, "BOOL");
}

TEST(SafetensorsReaderTest, RefusesDamagedFiles) {
  struct Case {
    std::string bytes, expected;
  };
  const auto one = [](const std::string& dtype, const std::string& shape,
                      const std::string& offsets, size_t data) {
    return FileBytes("{\"t\":{\"dtype\":\"" + dtype + "\",\"shape\":" + shape +
                         ",\"data_offsets\":" + offsets + "}}",
                     std::string(data, 'x'));
  };
  std::string huge_header(16, '\xff'), long_header = FileBytes("{}", "");
  long_header[0] = 100;
  const Case cases[] = {
      {"", "it has 0 bytes"},
      {"1234567", "it has 7 bytes"},
      {huge_header, "more than the limit"},
      {long_header, "claims 100 bytes, but the file has only 10"},
      {FileBytes("[]", ""), "not a JSON object"},
      {FileBytes(" {}", ""), "not a JSON object"},
      {FileBytes("{\"a\":", ""), "parse error"},
      {FileBytes("{\"\xff\":1}", ""), "UTF-8"},
      {FileBytes("{\"t\":1}", ""), "tensor t: its header entry is not an object"},
      {FileBytes("{\"t\":{\"dtype\":\"U8\",\"shape\":[]}}", "x"), "no \"data_offsets\""},
      {FileBytes("{\"__metadata__\":{\"a\":1}}", ""), "__metadata__ \"a\" is not a string"},
      {FileBytes("{\"__metadata__\":7}", ""), "__metadata__ is not an object"},
      {one("U8", "[-1]", "[0,1]", 1), "shape is not a list of non-negative integers"},
      {one("U8", "3", "[0,3]", 3), "shape is not a list"},
      {one("U8", "[1.5]", "[0,1]", 1), "shape is not a list of non-negative integers"},
      {one("U8", "[3]", "[0,3,3]", 3), "pair"},
      {one("U8", "[3]", "[0,-3]", 3), "pair"},
      {one("U8", "[0]", "[3,0]", 3), "ends before it begins"},
      {one("F32", "[2]", "[0,7]", 7), "F32 [2] needs 8 bytes but data_offsets give 7"},
      {one("F32", "[4294967296,4294967296]", "[0,8]", 8), "too large"},
      {one("F4", "[3]", "[0,1]", 1), "does not fill whole bytes"},
      {one("U8", "[3]", "[1,4]", 4), "begins at byte 1 of the data, but 0 is the next"},
      {one("U8", "[3]", "[0,3]", 2), "the file holds only 2"},
      {one("U8", "[3]", "[0,3]", 4), "its tensors take 3 bytes, but it holds 4"},
      {FileBytes(R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},)"
                 R"("b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}})",
                 "xyz"),
       "tensor b: it begins at byte 1 of the data, but 2"},
      {FileBytes(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                 R"("a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})",
                 "x"),
       "key \"a\" appears twice"},
  };
  for (const Case& item : cases) {
    const std::string error = HeaderError(item.bytes);
    EXPECT_THAT(error, HasSubstr(item.expected));
    EXPECT_THAT(error, HasSubstr("m/x.safetensors"));
  }
}

TEST(SafetensorsReaderTest, EveryTruncationOfARealFileIsRefused) {
  QM_SHARED_OR_SKIP(model, "models/arch/qwen2/model.safetensors");
  const std::string bytes = ReadFile(model).value();
  EXPECT_EQ(HeaderError(bytes), "");
  for (size_t size = 0; size < bytes.size(); size += 1 + bytes.size() / 50) {
    EXPECT_NE(HeaderError(bytes.substr(0, size)), "") << size;
  }
  EXPECT_NE(HeaderError(bytes + "x"), "");
}

TEST(SafetensorsReaderTest, MissingFileAndDirectory) {
  EXPECT_EQ(SafetensorsFile::Open("/nonexistent/x").status().code(), absl::StatusCode::kNotFound);
  EXPECT_FALSE(SafetensorsFile::Open(testing::MakeTempDir()).ok());
}

}  // namespace
}  // namespace quantmill
