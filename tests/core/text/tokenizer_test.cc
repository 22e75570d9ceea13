#include "core/text/tokenizer.h"

#include <string>
#include <vector>

#include "core/io/files.h"
#include "core/io/json.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/shared_data.h"

namespace quantmill {
namespace {

using ::testing::HasSubstr;
using Json = nlohmann::json;

// tests/data/tokenizers/NAME.json: {"tokenizer": a tokenizer.json, "cases": [{"text", "ids",
// "ids_with_special", "decoded", "decoded_without_special"}]}, expected values computed with
// huggingface/tokenizers by tests/data/tokenizers/make_fixtures.py.
class TokenizerFixtureTest : public ::testing::TestWithParam<const char*> {};

TEST_P(TokenizerFixtureTest, EqualsTheReference) {
  const Json fixture =
      ReadJson(testing::SourcePath(std::string("tests/data/tokenizers/") + GetParam() + ".json"))
          .value();
  const auto tokenizer = Tokenizer::FromJson(fixture["tokenizer"].dump(), GetParam());
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  for (const Json& item : fixture["cases"]) {
    const std::string text = item["text"];
    SCOPED_TRACE(item["text"].dump());
    const std::vector<int32_t> ids = (*tokenizer)->Encode(text, false).value();
    EXPECT_EQ(Json(ids).dump(), item["ids"].dump());
    const std::vector<int32_t> with_special = (*tokenizer)->Encode(text, true).value();
    EXPECT_EQ(Json(with_special).dump(), item["ids_with_special"].dump());
    EXPECT_EQ((*tokenizer)->Decode(with_special, false).value(), item["decoded"]);
    EXPECT_EQ((*tokenizer)->Decode(with_special, true).value(), item["decoded_without_special"]);
  }
}

INSTANTIATE_TEST_SUITE_P(Kinds, TokenizerFixtureTest,
                         ::testing::Values("llama3", "qwen", "smollm", "llama2_legacy",
                                           "metaspace_first", "metaspace_split", "added_tokens",
                                           "ignore_merges", "unknown", "split_behaviors"),
                         [](const auto& info) { return std::string(info.param); });

class TokenizerModelTest : public ::testing::TestWithParam<const char*> {};

TEST_P(TokenizerModelTest, EqualsTheReferenceOfTheModel) {
  QM_SHARED_OR_SKIP(model, std::string("models/") + GetParam());
  const auto tokenizer = Tokenizer::FromDirectory(model);
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  const Json reference = ReadJson(model + "/reference.json").value();
  for (const Json& item : reference["tokenizer"]) {
    const std::vector<int32_t> ids = (*tokenizer)->Encode(std::string(item["text"]), true).value();
    EXPECT_EQ(Json(ids), item["ids"]) << item["text"];
    EXPECT_EQ((*tokenizer)->Decode(ids, false).value(), item["decoded"]);
  }
  const Json& greedy = reference["greedy"];
  EXPECT_EQ((*tokenizer)->Decode(greedy["ids"].get<std::vector<int32_t>>(), false).value(),
            greedy["text"]);
}

INSTANTIATE_TEST_SUITE_P(Models, TokenizerModelTest,
                         ::testing::Values("tiny-llama", "small-llama"));

constexpr char kBytes[] = R"({"pre_tokenizer":{"type":"ByteLevel","add_prefix_space":false,
  "use_regex":false},"decoder":{"type":"ByteLevel"},
  "model":{"type":"BPE","vocab":{"a":0,"b":1,"ab":2,"ï":3,"¿":4,"½":5},"merges":["a b"]}})";

TEST(TokenizerTest, IllFormedTextBecomesReplacementCharacters) {
  const auto tokenizer = Tokenizer::FromJson(kBytes, "t").value();
  EXPECT_THAT(tokenizer
                  ->Encode("ab\xff"
                           "a",
                           false)
                  .value(),
              ::testing::ElementsAre(2, 3, 4, 5, 0));
  EXPECT_EQ(tokenizer->Decode({2, 3, 4}, false).value(), "ab\xEF\xBF\xBD");
}

TEST(TokenizerTest, Lookups) {
  const auto tokenizer = Tokenizer::FromJson(kBytes, "t").value();
  EXPECT_EQ(tokenizer->vocab_size(), 6);
  EXPECT_EQ(tokenizer->TokenId("ab"), 2);
  EXPECT_EQ(tokenizer->TokenId("ba"), std::nullopt);
  EXPECT_EQ(tokenizer->TokenText(1), "b");
  EXPECT_EQ(tokenizer->TokenText(9), std::nullopt);
  EXPECT_EQ(tokenizer->Decode({0, 9, -1, 1}, false).value(), "ab");
}

// The queue and the scan are two implementations of one rule: compare them with a third, quadratic
// one, on random text over two letters (many ties).
TEST(TokenizerTest, LongPiecesMergeInTheSameOrderAsShortOnes) {
  std::vector<std::string> tokens = {"a", "b"};
  std::vector<std::pair<std::string, std::string>> merges;
  for (size_t i = 0; merges.size() < 24; ++i) {
    const auto& left = tokens[(i * 7 + 1) % tokens.size()];
    const auto& right = tokens[(i * 5 + i / 3) % tokens.size()];
    const std::string joined = left + right;
    if (std::find(tokens.begin(), tokens.end(), joined) != tokens.end()) continue;
    merges.emplace_back(left, right);
    tokens.push_back(joined);
  }
  Json json = {
      {"pre_tokenizer", {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}}},
      {"model", {{"type", "BPE"}, {"vocab", Json::object()}, {"merges", merges}}}};
  for (size_t i = 0; i < tokens.size(); ++i) json["model"]["vocab"][tokens[i]] = i;
  const auto tokenizer = Tokenizer::FromJson(json.dump(), "t").value();
  uint32_t state = 1;
  for (size_t length : {5u, 47u, 48u, 49u, 200u, 1000u}) {
    std::string text;
    for (size_t i = 0; i < length; ++i)
      text += (state = state * 1664525u + 1013904223u) >> 31 ? 'a' : 'b';
    std::vector<std::string> expected;
    for (const char c : text) expected.emplace_back(1, c);
    for (bool merged = true; merged;) {
      merged = false;
      for (const auto& [left, right] : merges) {
        for (size_t i = 0; i + 1 < expected.size() && !merged; ++i) {
          if (expected[i] != left || expected[i + 1] != right) continue;
          expected[i] += right;
          expected.erase(expected.begin() + static_cast<std::ptrdiff_t>(i) + 1);
          merged = true;
        }
        if (merged) break;
      }
    }
    std::vector<std::string> actual;
    const std::vector<int32_t> ids = tokenizer->Encode(text, false).value();
    for (const int32_t id : ids) {
      actual.push_back(*tokenizer->TokenText(id));
    }
    EXPECT_EQ(actual, expected) << length;
  }
}

std::string ErrorOf(const std::string& json) {
  const auto tokenizer = Tokenizer::FromJson(json, "m/tokenizer.json");
  return tokenizer.ok() ? "" : std::string(tokenizer.status().message());
}

TEST(TokenizerTest, RefusesWhatItDoesNotKnowByName) {
  const Json base = Json::parse(kBytes);
  const auto with = [&base](const char* pointer, const Json& value) {
    Json json = base;
    json[Json::json_pointer(pointer)] = value;
    return ErrorOf(json.dump());
  };
  EXPECT_EQ(with("/truncation", nullptr), "");
  EXPECT_THAT(with("/normalizer", {{"type", "Lowercase"}}),
              HasSubstr("normalizer of type Lowercase"));
  EXPECT_THAT(with("/pre_tokenizer", {{"type", "Whitespace"}}),
              HasSubstr("pre_tokenizer of type Whitespace"));
  EXPECT_THAT(with("/post_processor", {{"type", "BertProcessing"}}), HasSubstr("BertProcessing"));
  EXPECT_THAT(with("/decoder", {{"type", "WordPiece"}}), HasSubstr("decoder of type WordPiece"));
  EXPECT_THAT(with("/model/type", "Unigram"), HasSubstr("model type \"Unigram\""));
  EXPECT_THAT(with("/model/dropout", 0.1), HasSubstr("dropout"));
  EXPECT_THAT(with("/model/end_of_word_suffix", "</w>"), HasSubstr("end_of_word_suffix"));
}

TEST(TokenizerTest, RefusesDamage) {
  const Json base = Json::parse(kBytes);
  const auto with = [&base](const char* pointer, const Json& value) {
    Json json = base;
    json[Json::json_pointer(pointer)] = value;
    return ErrorOf(json.dump());
  };
  EXPECT_THAT(ErrorOf("{"), HasSubstr("m/tokenizer.json"));
  EXPECT_THAT(ErrorOf("[]"), HasSubstr("not a JSON object"));
  EXPECT_THAT(ErrorOf("{}"), HasSubstr("model is missing"));
  EXPECT_THAT(with("/model/vocab", 3), HasSubstr("no vocab"));
  EXPECT_THAT(with("/model/vocab/a", -3), HasSubstr("\"a\" has no valid id"));
  EXPECT_THAT(with("/model/merges", {"a c"}), HasSubstr("\"a\" and \"c\""));
  EXPECT_THAT(with("/model/merges", {"ab"}), HasSubstr("no space"));
  EXPECT_THAT(with("/model/merges", Json::array({Json::array({"a", 1})})),
              HasSubstr("pairs of strings"));
  EXPECT_THAT(with("/model/unk_token", "<unk>"), HasSubstr("unk_token"));
  EXPECT_THAT(with("/added_tokens", {{{"content", "x"}}}), HasSubstr("no valid id"));
  const auto split = [&with](const char* pattern) {
    return with("/pre_tokenizer",
                {{"type", "Split"}, {"pattern", {{"Regex", pattern}}}, {"behavior", "Isolated"}});
  };
  EXPECT_THAT(split("(a"), HasSubstr("regular expression (a"));
  EXPECT_THAT(split("[a[b]]"), HasSubstr("nested"));
  EXPECT_THAT(split("[a&&b]"), HasSubstr("intersected"));
  EXPECT_EQ(split("[[:alpha:]]"), "");
}

TEST(TokenizerTest, MissingFile) {
  const std::string directory = testing::MakeTempDir();
  EXPECT_EQ(Tokenizer::FromDirectory(directory).status().code(), absl::StatusCode::kNotFound);
  ASSERT_TRUE(WriteFile(directory + "/tokenizer.model", "x").ok());
  EXPECT_THAT(std::string(Tokenizer::FromDirectory(directory).status().message()),
              HasSubstr("tokenizer.model"));
}

}  // namespace
}  // namespace quantmill
