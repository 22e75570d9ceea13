#include "core/text/answers.h"

#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "core/text/documents.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/shared_data.h"

namespace quantmill::testing {
namespace {

using ::testing::HasSubstr;

constexpr char kIntroduction[] =
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\nSay it.\n\n### Response:\n";

class AnswersTest : public ::testing::Test {
 protected:
  std::string Write(const std::string& name, const std::string& text) {
    std::ofstream(directory_ + "/" + name) << text;
    return directory_ + "/" + name;
  }
  int64_t Length(const std::string& text) {
    return static_cast<int64_t>(tokenizer_->Encode(text, false).value().size());
  }
  std::string ErrorOf(const std::string& path, const AnswerOptions& options) {
    return std::string(ReadAnswers(*tokenizer_, path, options).status().message());
  }

  std::string directory_ = MakeTempDir();
  std::unique_ptr<Tokenizer> tokenizer_ =
      Tokenizer::FromDirectory(SourcePath("configs/quickstart/tiny-llama")).value();
  std::string records_ =
      Write("alpaca.json",
            R"([{"instruction": "Say it.", "input": "", "output": "The stone turns."},
          {"instruction": "Say it.", "input": "", "output": ""},
          {"instruction": "Say it.", "input": "", "output": "The stone turns and turns again."}])");
};

TEST_F(AnswersTest, ARecordIsAWindowAndItsAnswerIsScored) {
  AnswerOptions options;
  options.eos = 1;
  const AnswerWindows windows = ReadAnswers(*tokenizer_, records_, options).value();
  EXPECT_EQ(windows.cut, 0);
  EXPECT_EQ(windows.left_out, 1);  // the empty answer
  const std::string answers[] = {"The stone turns.", "The stone turns and turns again."};
  const int64_t longest = Length(kIntroduction + answers[1]) + 1;
  ASSERT_EQ(windows.ids.shape(), Shape({2, longest}));
  ASSERT_EQ(windows.scored.shape(), windows.ids.shape());
  for (int64_t w = 0; w < 2; ++w) {
    const int32_t* ids = windows.ids.as<int32_t>() + w * longest;
    const int32_t* scored = windows.scored.as<int32_t>() + w * longest;
    const int64_t prompt = Length(kIntroduction);
    std::vector<int32_t> answer;
    for (int64_t i = 0; i < longest; ++i) {
      if (i < prompt) {
        EXPECT_EQ(scored[i], 0);
      }
      if (scored[i] != 0) answer.push_back(ids[i]);
    }
    ASSERT_FALSE(answer.empty());
    EXPECT_EQ(answer.back(), 1);
    answer.pop_back();
    EXPECT_EQ(tokenizer_->Decode(answer, true).value(), answers[w]);
  }
}

TEST_F(AnswersTest, WhatDoesNotFitIsCutOrLeftOut) {
  AnswerOptions options;
  options.length = Length(kIntroduction) + 2;
  const AnswerWindows windows = ReadAnswers(*tokenizer_, records_, options).value();
  EXPECT_EQ(windows.cut, 2);
  EXPECT_EQ(windows.ids.shape(), Shape({2, options.length}));
  options.count = 1;
  EXPECT_EQ(ReadAnswers(*tokenizer_, records_, options).value().ids.dim(0), 1);
  options.length = Length(kIntroduction);
  EXPECT_THAT(ErrorOf(records_, options), HasSubstr("whose answer begins within"));
}

TEST_F(AnswersTest, OtherTextsAreRefused) {
  for (const auto& [name, text] : {std::pair("a.txt", "The stone turns."),
                                   std::pair("b.json", R"([{"text": "The stone turns."}])")}) {
    EXPECT_THAT(ErrorOf(Write(name, text), {}), HasSubstr("there are no answers to score")) << name;
  }
  EXPECT_THAT(ErrorOf(directory_ + "/none.json", {}), HasSubstr("none.json"));
}

}  // namespace
}  // namespace quantmill::testing
