// Which call last words name when formats and kernels are at work.
#include "host/run/format_words.h"

#include "gtest/gtest.h"
#include "tests/support/shared_data.h"

namespace quantmill {
namespace {

class FormatWordsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    auto words = LastWords::Open(testing::MakeTempDir() + "/last_words");
    ASSERT_TRUE(words.ok()) << words.status();
    words_ = *std::move(words);
    method_.id = "org.example.kernel";
    method_.version = "2.0";
    loaded_.method = &method_;
    loaded_.path = "/plugins/libqm_kernel.so";
  }
  std::unique_ptr<LastWords> words_;
  qm_method method_ = {};
  LoadedMethod loaded_;
};

TEST_F(FormatWordsTest, NameTheFunctionAndWhatItIsFor) {
  FormatWords format(words_.get());
  {
    const FormatWordsScope scope(&format, {{"slot", "down_proj"}, {"key", "k"}});
    const WatchedCall call(&format, loaded_, "format.check");
    const auto running = words_->Running();
    ASSERT_TRUE(running.has_value());
    EXPECT_EQ(running->dump(),
              R"({"function":"format.check","key":"k","path":"/plugins/libqm_kernel.so",)"
              R"("plugin":"org.example.kernel","slot":"down_proj","version":"2.0"})");
  }
  EXPECT_FALSE(words_->Running().has_value());
  const WatchedCall call(&format, loaded_, "linear-kernel.matmul");
  EXPECT_FALSE(words_->Running()->contains("slot"));  // the scope is over
}

TEST_F(FormatWordsTest, ACallInsideAnotherStaysTheOthers) {
  FormatWords format(words_.get());
  words_->Begin({{"function", "block-transform.run"}});
  { const WatchedCall call(&format, loaded_, "linear-kernel.matmul"); }
  ASSERT_TRUE(words_->Running().has_value());
  EXPECT_EQ((*words_->Running())["function"], "block-transform.run");
  words_->End();
  EXPECT_FALSE(words_->Running().has_value());
}

TEST_F(FormatWordsTest, ACallThatIsKeptIsTheLast) {
  FormatWords format(words_.get());
  {
    WatchedCall call(&format, loaded_, "linear-kernel.dequantize");
    call.Keep();
  }
  { const WatchedCall call(&format, loaded_, "linear-kernel.matmul"); }
  ASSERT_TRUE(words_->Running().has_value());
  EXPECT_EQ((*words_->Running())["function"], "linear-kernel.dequantize");
}

TEST_F(FormatWordsTest, WithoutWordsNothingHappens) {
  FormatWords format(nullptr);
  const FormatWordsScope scope(&format, {{"slot", "x"}});
  const WatchedCall call(&format, loaded_, "format.check");
  const FormatWordsScope none(nullptr, {{"slot", "x"}});
  const WatchedCall unwatched(nullptr, loaded_, "format.check");
}

}  // namespace
}  // namespace quantmill
