#include "core/text/documents.h"

#include <zlib.h>

#include <algorithm>
#include <string>

#include "core/io/files.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/shared_data.h"

namespace quantmill {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::string FileWith(const std::string& name, const std::string& content) {
  const std::string path = testing::MakeTempDir() + "/" + name;
  EXPECT_TRUE(WriteFile(path, content).ok());
  return path;
}

std::vector<std::string> Read(const std::string& name, const std::string& content) {
  return ReadDocuments(FileWith(name, content)).value();
}

std::string ErrorOf(const std::string& name, const std::string& content) {
  const auto documents = ReadDocuments(FileWith(name, content));
  return documents.ok() ? "" : std::string(documents.status().message());
}

std::string Packed(const std::string& content) {
  const std::string path = testing::MakeTempDir() + "/x.gz";
  gzFile file = gzopen(path.c_str(), "wb");
  EXPECT_EQ(gzwrite(file, content.data(), static_cast<unsigned>(content.size())),
            static_cast<int>(content.size()));
  gzclose(file);
  return ReadFile(path).value();
}

TEST(DocumentsTest, PlainText) {
  EXPECT_THAT(Read("a.txt", "one\ntwo\n<|endoftext|>\n\nthree\n"),
              ElementsAre("one\ntwo", "\nthree\n"));
  EXPECT_THAT(Read("a.txt", "one\r\n<|endoftext|>\r\ntwo"), ElementsAre("one", "two"));
  EXPECT_THAT(Read("a.raw", "<|endoftext|>\nx <|endoftext|>\n<|endoftext|>\n<|endoftext|>"),
              ElementsAre("x <|endoftext|>"));
  EXPECT_THAT(Read("a", "no separators\n"), ElementsAre("no separators\n"));
}

TEST(DocumentsTest, JsonLines) {
  const std::string lines =
      "{\"text\":\"a\\nb\",\"n\":1}\n\n  \r\n{\"text\":\"\"}\n{\"text\":\"c\"}";
  EXPECT_THAT(Read("a.jsonl", lines), ElementsAre("a\nb", "c"));
  EXPECT_THAT(Read("a.jsonl.gz", Packed(lines)), ElementsAre("a\nb", "c"));
  EXPECT_THAT(Read("a.txt.gz", Packed("x")), ElementsAre("x"));
  const std::string path = FileWith("b.jsonl", "{\"q\":\"x\"}");
  EXPECT_THAT(ReadDocuments(path, {"q", ""}).value(), ElementsAre("x"));
}

TEST(DocumentsTest, Alpaca) {
  const auto documents = Read("a.json", R"([{"instruction":"Add.","input":"1 2","output":"3"},
      {"instruction":"Sing.","input":"","output":"La"},{"instruction":"Hum.","output":"Mm"},
      {"text":"plain"}])");
  ASSERT_EQ(documents.size(), 4u);
  EXPECT_EQ(documents[0],
            "Below is an instruction that describes a task, paired with an input that provides "
            "further context. Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3");
  EXPECT_EQ(documents[1],
            "Below is an instruction that describes a task. Write a response that appropriately "
            "completes the request.\n\n### Instruction:\nSing.\n\n### Response:\nLa");
  EXPECT_THAT(documents[2], HasSubstr("Hum.\n\n### Response:\nMm"));
  EXPECT_EQ(documents[3], "plain");
}

TEST(DocumentsTest, ErrorsSayWhere) {
  EXPECT_THAT(ErrorOf("a.jsonl", "{\"text\":\"a\"}\n\n{\"text\":"), HasSubstr("a.jsonl:3"));
  EXPECT_THAT(ErrorOf("a.jsonl", "{\"text\":1}"), HasSubstr("a.jsonl:1; \"text\" is not a string"));
  EXPECT_THAT(ErrorOf("a.jsonl", "{\"b\":\"\",\"a\":1}"), HasSubstr("set `key` to one of: a, b"));
  EXPECT_THAT(ErrorOf("a.jsonl", "[1]"), HasSubstr("not a JSON object"));
  EXPECT_THAT(ErrorOf("a.json", "{}"), HasSubstr("use .jsonl"));
  EXPECT_THAT(ErrorOf("a.json", "[{\"text\":\"x\"},{\"instruction\":\"x\"}]"),
              HasSubstr("record 2; there is no key \"output\""));
  EXPECT_THAT(ErrorOf("a.txt", ""), HasSubstr("there is no text in it"));
  EXPECT_THAT(ErrorOf("a.txt.gz", "plain"), HasSubstr("not a gzip file"));
  const std::string packed = Packed(std::string(100'000, 'x') + "y");
  EXPECT_THAT(ErrorOf("a.txt.gz", packed.substr(0, packed.size() / 2)), HasSubstr("cut off"));
  EXPECT_EQ(ReadDocuments("/nonexistent/a.txt.gz").status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(ReadDocuments("/nonexistent/a.txt").status().code(), absl::StatusCode::kNotFound);
}

WindowOptions Windows(int64_t length, int64_t count, bool random = false, uint64_t seed = 0) {
  using Order = WindowOptions::Order;
  return {length, count, random ? Order::kRandom : Order::kStart, seed};
}

TEST(WindowsTest, ConsecutiveFromTheStart) {
  EXPECT_THAT(WindowStarts(11, Windows(3, 0)).value(), ElementsAre(0, 3, 6));
  EXPECT_THAT(WindowStarts(11, Windows(3, 2)).value(), ElementsAre(0, 3));
  const std::vector<int32_t> tokens = {5, 6, 7, 8, 9, 10};
  const Tensor cut = CutWindows(tokens, Windows(2, 2)).value();
  EXPECT_EQ(cut.shape(), (Shape{2, 2}));
  EXPECT_THAT(std::vector<int32_t>(cut.as<int32_t>(), cut.as<int32_t>() + 4),
              ElementsAre(5, 6, 7, 8));
}

TEST(WindowsTest, RandomStartsFollowTheDocumentedGenerator) {
  // SplitMix64 with seed 1234567 (the vector of its authors' reference program).
  const uint64_t outputs[] = {6457827717110365317u, 3203168211198807973u, 9817491932198370423u};
  const auto starts = WindowStarts(1'000'099, Windows(100, 3, true, 1234567)).value();
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(starts[i], static_cast<int64_t>(static_cast<double>(outputs[i]) / 0x1p64 * 1e6)) << i;
  }
  EXPECT_THAT(WindowStarts(7, Windows(7, 2, true)).value(), ElementsAre(0, 0));
  const auto many = WindowStarts(10, Windows(8, 1000, true, 3)).value();
  EXPECT_EQ(*std::min_element(many.begin(), many.end()), 0);
  EXPECT_EQ(*std::max_element(many.begin(), many.end()), 2);
}

TEST(WindowsTest, TooShortSaysWhatItNeeds) {
  const auto message = [](int64_t tokens, const WindowOptions& options) {
    return std::string(WindowStarts(tokens, options).status().message());
  };
  EXPECT_THAT(message(100, Windows(30, 4)),
              HasSubstr("text has 100 tokens, 4 windows of 30 need 120"));
  EXPECT_THAT(message(10, Windows(30, 0)), HasSubstr("1 window of 30 need 30"));
  EXPECT_THAT(message(10, Windows(30, 2, true)), HasSubstr("2 windows of 30 need 30"));
  EXPECT_FALSE(WindowStarts(10, Windows(0, 1)).ok());
  EXPECT_FALSE(WindowStarts(10, Windows(1, -1)).ok());
  EXPECT_FALSE(WindowStarts(10, Windows(1, 0, true)).ok());
}

TEST(WindowsTest, CalibrationText) {
  QM_SHARED_OR_SKIP(model, "models/small-llama");
  QM_SHARED_OR_SKIP(text, "data/calib.txt");
  EXPECT_EQ(ReadDocuments(text)->size(),
            321u);  // one per line of calib.index.tsv
  const auto tokenizer = Tokenizer::FromDirectory(model).value();
  const auto tokens = TokenizeFile(*tokenizer, text).value();
  EXPECT_GE(tokens.size(), 128u * 1024u);
  EXPECT_NE(tokens[0], 0);  // no BOS
  EXPECT_EQ(CutWindows(tokens, Windows(1024, 128))->dim(0), 128);
}

}  // namespace
}  // namespace quantmill
