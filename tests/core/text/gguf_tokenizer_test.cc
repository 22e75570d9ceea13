// Tokenizers written into GGUF metadata and read back give the ids of the original.
#include "core/text/gguf_tokenizer.h"

#include "core/io/gguf_writer.h"
#include "core/io/json.h"
#include "core/text/tokenizer.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/shared_data.h"

namespace quantmill {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using Json = nlohmann::json;

Json Fixture(const std::string& name) {
  return ReadJson(testing::SourcePath("tests/data/tokenizers/" + name + ".json")).value();
}

// Highest id + 1 and two more, as models have rows that no token uses.
int64_t Rows(const Json& tokenizer) {
  return Tokenizer::FromJson(tokenizer.dump(), "t").value()->vocab_size() + 2;
}

GgufHeader HeaderOf(const GgufMetadata& metadata) {
  GgufHeader header;
  for (const auto& [key, value] : metadata) header.metadata.emplace(key, value);
  return header;
}

class GgufTokenizerTest : public ::testing::TestWithParam<std::pair<const char*, const char*>> {};

TEST_P(GgufTokenizerTest, KeepsTheIds) {
  const auto& [name, pre] = GetParam();
  const Json fixture = Fixture(name);
  const Json& original = fixture["tokenizer"];
  const auto metadata = GgufTokenizer(original, Json(), Rows(original));
  ASSERT_TRUE(metadata.ok()) << metadata.status();
  const GgufHeader header = HeaderOf(*metadata);
  EXPECT_EQ(header.Text("tokenizer.ggml.pre"), pre);
  EXPECT_EQ(header.Find("tokenizer.ggml.tokens")->size(), static_cast<size_t>(Rows(original)));
  EXPECT_EQ(header.Find("tokenizer.ggml.token_type")->numbers.back(), 5);
  const auto json = TokenizerFromGguf(header);
  ASSERT_TRUE(json.ok()) << json.status();
  const auto tokenizer = Tokenizer::FromJson(json->dump(), name);
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  for (const Json& item : fixture["cases"]) {
    const std::string text = item["text"];
    SCOPED_TRACE(item["text"].dump());
    EXPECT_EQ(Json((*tokenizer)->Encode(text, false).value()).dump(), item["ids"].dump());
    const std::vector<int32_t> ids = (*tokenizer)->Encode(text, true).value();
    EXPECT_EQ(Json(ids).dump(), item["ids_with_special"].dump());
    EXPECT_EQ((*tokenizer)->Decode(ids, true).value(), item["decoded_without_special"]);
  }
}

INSTANTIATE_TEST_SUITE_P(Kinds, GgufTokenizerTest,
                         ::testing::Values(std::pair("llama3", "dbrx"), std::pair("qwen", "qwen2"),
                                           std::pair("smollm", "smollm"),
                                           std::pair("llama2_legacy", "default")),
                         [](const auto& info) { return std::string(info.param.first); });

TEST(GgufTokenizerTest, RefusesWhatMetadataCannotExpress) {
  const auto error = [](Json tokenizer, int64_t rows) {
    return std::string(GgufTokenizer(tokenizer, Json(), rows).status().message());
  };
  const Json llama3 = Fixture("llama3")["tokenizer"];
  EXPECT_THAT(error(llama3, 3), HasSubstr("is not below the model's 3 rows"));
  Json other = llama3;
  other["pre_tokenizer"] = {{"type", "Digits"}, {"individual_digits", false}};
  EXPECT_THAT(error(other, Rows(llama3)), HasSubstr("its pre_tokenizer is none"));
  other = llama3;
  other["normalizer"] = {{"type", "NFKC"}};
  EXPECT_THAT(error(other, Rows(llama3)), HasSubstr("has a normalizer"));
}

GgufHeader Small(const std::string& model) {
  return HeaderOf(
      {{"tokenizer.ggml.model", GgufValue::Text(model)},
       {"tokenizer.ggml.tokens",
        {GgufValueType::kString,
         true,
         {"<unk>", "<s>", "a", "b", "ab", "\xE2\x96\x81", "<0x0A>"},
         {}}},
       {"tokenizer.ggml.token_type", {GgufValueType::kI32, true, {}, {2, 3, 1, 1, 1, 1, 6}}},
       {"tokenizer.ggml.scores", {GgufValueType::kF32, true, {}, {0, 0, -3, -4, -1, -5, 0}}},
       {"tokenizer.ggml.bos_token_id", GgufValue::U32(1)}});
}

TEST(GgufTokenizerTest, JoinsPiecesByScore) {
  const auto json = TokenizerFromGguf(Small("llama"));
  ASSERT_TRUE(json.ok()) << json.status();
  EXPECT_EQ((*json)["model"]["merges"].dump(), R"([["a","b"]])");
  const auto tokenizer = Tokenizer::FromJson(json->dump(), "t").value();
  EXPECT_THAT(*tokenizer->Encode("abb\n", true), ElementsAre(1, 5, 4, 3, 6));
  EXPECT_EQ(*tokenizer->Decode({1, 5, 4, 3, 6}, true), "abb\n");
}

TEST(GgufTokenizerTest, NamesWhatIsWrong) {
  const auto error = [](const GgufHeader& header) {
    return std::string(TokenizerFromGguf(header).status().message());
  };
  EXPECT_THAT(error(GgufHeader()), HasSubstr("holds no tokenizer"));
  EXPECT_THAT(error(Small("bert")), HasSubstr("\"bert\" is not supported; supported are gpt2"));
  GgufHeader header = Small("gpt2");
  EXPECT_THAT(error(header), HasSubstr("no tokenizer.ggml.merges"));
  header.metadata["tokenizer.ggml.pre"] = GgufValue::Text("tekken");
  EXPECT_THAT(error(header), HasSubstr("\"tekken\" is not supported; supported are llama-bpe"));
  header = Small("llama");
  header.metadata.erase("tokenizer.ggml.scores");
  EXPECT_THAT(error(header), HasSubstr("tokenizer.ggml.scores"));
  header = Small("llama");
  header.metadata["tokenizer.ggml.bos_token_id"] = GgufValue::U32(99);
  EXPECT_THAT(error(header), HasSubstr("bos_token_id names none"));
  header = Small("llama");
  header.metadata["tokenizer.ggml.token_type"].numbers.pop_back();
  EXPECT_THAT(error(header), HasSubstr("7 tokens, but 6 types"));
}

}  // namespace
}  // namespace quantmill
