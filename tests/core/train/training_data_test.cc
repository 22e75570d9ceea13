#include "core/train/training_data.h"

#include <algorithm>
#include <fstream>
#include <numeric>
#include <set>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/core/cpu/support.h"
#include "tests/support/shared_data.h"

namespace quantmill::testing {
namespace {

using ::testing::HasSubstr;

class TrainingDataTest : public ::testing::Test {
 protected:
  std::string Write(const std::string& name, const std::string& text) {
    std::ofstream(directory_ + "/" + name) << text;
    return directory_ + "/" + name;
  }
  static std::string Sacks(int count) {
    std::string text;
    for (int i = 0; i < count; ++i) text += "The miller ground " + std::to_string(i) + " sacks. ";
    return text;
  }
  std::vector<int32_t> Encode(const std::string& text) {
    return tokenizer_->Encode(text, false).value();
  }

  std::string directory_ = MakeTempDir();
  std::unique_ptr<Tokenizer> tokenizer_ =
      Tokenizer::FromDirectory(SourcePath("configs/quickstart/tiny-llama")).value();
};

TEST_F(TrainingDataTest, PlainTextIsCutIntoShuffledWindows) {
  const std::string text = Sacks(200);
  const std::string path = Write("text.txt", text);
  TrainingDataOptions options;
  options.length = 16;
  options.bos = 0;
  options.eos = 1;
  const TrainingData data = TrainingData::Read(*tokenizer_, path, options).value();
  std::vector<int32_t> stream = {0};
  for (int32_t id : Encode(text)) stream.push_back(id);
  stream.push_back(1);
  EXPECT_EQ(data.windows(), (static_cast<int64_t>(stream.size()) - 1) / 16);
  // One epoch has every window once, and targets are the ids one later.
  const auto epoch = data.Batch(0, data.windows());
  std::set<std::vector<int32_t>> seen, expected;
  for (int64_t w = 0; w < data.windows(); ++w) {
    const int32_t* ids = epoch.ids.as<const int32_t>() + w * 16;
    const int32_t* targets = epoch.targets.as<const int32_t>() + w * 16;
    seen.insert({ids, ids + 16});
    expected.insert({stream.begin() + w * 16, stream.begin() + w * 16 + 16});
    for (int i = 0; i < 15; ++i) EXPECT_EQ(targets[i], ids[i + 1]);
  }
  EXPECT_EQ(seen, expected);
  // Batches over the end of an epoch go on in the next one, in another order.
  const auto next = data.Batch(data.windows(), data.windows());
  const auto over = data.Batch(data.windows() - 1, 2);
  const auto row = [](const Tensor& t, int64_t w) {
    return std::vector<int32_t>(t.as<const int32_t>() + w * 16,
                                t.as<const int32_t>() + w * 16 + 16);
  };
  EXPECT_EQ(row(over.ids, 0), row(epoch.ids, data.windows() - 1));
  EXPECT_EQ(row(over.ids, 1), row(next.ids, 0));
  EXPECT_NE(std::vector<int32_t>(next.ids.as<int32_t>(), next.ids.as<int32_t>() + 160),
            std::vector<int32_t>(epoch.ids.as<int32_t>(), epoch.ids.as<int32_t>() + 160));
}

TEST_F(TrainingDataTest, AnswersOfAlpacaRecordsAreTheTargets) {
  const std::string path =
      Write("alpaca.json",
            R"([{"instruction": "Say it.", "input": "", "output": "The stone turns."},
          {"instruction": "Again.", "input": "Now", "output": "The stone turns again."}])");
  TrainingDataOptions options;
  options.length = 1;  // a window per token, so that nothing is left out
  options.eos = 1;
  const auto counted = [&](bool mask) {
    options.mask_prompts = mask;
    const TrainingData data = TrainingData::Read(*tokenizer_, path, options).value();
    const auto all = data.Batch(0, data.windows());
    int64_t count = 0;
    for (int64_t i = 0; i < data.windows(); ++i) count += all.targets.as<int32_t>()[i] >= 0;
    return std::pair<int64_t, int64_t>(count, data.windows());
  };
  const auto answers = static_cast<int64_t>(Encode("The stone turns.").size() +
                                            Encode("The stone turns again.").size() + 2);
  EXPECT_NEAR(static_cast<double>(counted(true).first), static_cast<double>(answers), 2);
  EXPECT_EQ(counted(false).first, counted(false).second);
}

TEST_F(TrainingDataTest, TooLittleTextIsRefused) {
  TrainingDataOptions options;
  options.length = 100;
  const absl::Status status =
      TrainingData::Read(*tokenizer_, Write("short.txt", "Flour."), options).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("do not fill a window of 100"));
}

// Excerpts are pieces of the text; further windows are read whole, and nothing is a target across
// their borders.
TEST_F(TrainingDataTest, TextIsExtendedByWindows) {
  const std::string text = Sacks(60);
  TrainingDataOptions options;
  options.length = 16;
  const TrainingData data =
      TrainingData::Read(*tokenizer_, Write("text.txt", text), options).value();
  const std::vector<int32_t> stream = Encode(text);
  const Tensor excerpts = data.Excerpts(50, 6, 3).value();
  std::set<int64_t> places;
  for (int64_t i = 0; i < 50; ++i) {
    const int32_t* piece = excerpts.as<const int32_t>() + i * 6;
    const auto place = std::search(stream.begin(), stream.end(), piece, piece + 6);
    ASSERT_NE(place, stream.end());
    places.insert(place - stream.begin());
  }
  EXPECT_GT(places.size(), 25u);
  EXPECT_TRUE(SameBytes(excerpts, data.Excerpts(50, 6, 3).value()));
  EXPECT_FALSE(SameBytes(excerpts, data.Excerpts(50, 6, 4).value()));

  std::vector<int32_t> ids(3 * 16);
  std::iota(ids.begin(), ids.end(), 100);
  const TrainingData longer = data.With(Tensor::FromI32({3, 16}, ids)).value();
  ASSERT_EQ(longer.windows(), data.windows() + 3);
  const auto batch = longer.Batch(0, longer.windows());
  std::multiset<std::vector<int32_t>> seen, expected;
  for (int64_t w = 0; w < longer.windows(); ++w) {
    const int32_t* window = batch.ids.as<const int32_t>() + w * 16;
    const int32_t* targets = batch.targets.as<const int32_t>() + w * 16;
    seen.insert({window, window + 16});
    for (int i = 0; i < 15; ++i) EXPECT_EQ(targets[i], window[i + 1]);
    const bool added = window[0] >= 100 && window[1] == window[0] + 1;
    const bool last = std::equal(window, window + 16, stream.begin() + (data.windows() - 1) * 16);
    EXPECT_EQ(targets[15] < 0, added || last);
  }
  for (int64_t w = 0; w < data.windows(); ++w) {
    expected.insert({stream.begin() + w * 16, stream.begin() + w * 16 + 16});
  }
  for (int i = 0; i < 3; ++i) expected.insert({ids.begin() + i * 16, ids.begin() + i * 16 + 16});
  EXPECT_EQ(seen, expected);

  EXPECT_TRUE(absl::IsInvalidArgument(data.Excerpts(1, 17, 1).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(data.Excerpts(0, 4, 1).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(
      data.With(Tensor::FromI32({1, 8}, absl::MakeConstSpan(ids).first(8))).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(
      data.With(Tensor::FromF32({1, 16}, std::vector<float>(16))).status()));
}

}  // namespace
}  // namespace quantmill::testing
