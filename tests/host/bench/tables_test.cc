#include "host/bench/tables.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace quantmill {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

nlohmann::ordered_json Results() {
  return {{"bench", "b.yaml"},
          {"version", "1.2.3"},
          {"date", "2026-01-02T03:04:05Z"},
          {"processor", "A CPU"},
          {"threads", 2},
          {"speed_prompt", 8},
          {"speed_new_tokens", 4},
          {"rows",
           {{{"model", "m"},
             {"row", "original"},
             {"status", "done"},
             {"format", "original"},
             {"bits_per_weight_all", 16.0},
             {"size_bytes", 2000000},
             {"size_ratio", 1.0},
             {"perplexity", 28.6502},
             {"perplexity_stderr", 0.912},
             {"kl_mean", 0.0},
             {"kl_mean_stderr", 0.0},
             {"tokens_per_second_b1", 123.4},
             {"tokens_per_second_b1_ratio", 1.0}},
            {{"model", "m"},
             {"row", "q|4"},
             {"status", "done"},
             {"format", "gptq"},
             {"bits_per_weight_all", 4.25},
             {"size_bytes", 500000},
             {"size_ratio", 0.25},
             {"quantize_seconds", 1.234},
             {"perplexity", 31.5530},
             {"perplexity_stderr", 1.02},
             {"kl_mean", 0.14721},
             {"kl_mean_stderr", 0.00342},
             {"kl_ties", {"again"}},
             {"tokens_per_second_b1", 61.7},
             {"tokens_per_second_b1_ratio", 0.5}},
            {{"model", "m"}, {"row", "again"}, {"status", "done"}, {"kl_ties", {"q|4"}}},
            {{"model", "m"},
             {"row", "bad"},
             {"status", "failed"},
             {"error", "what; a \"why\",\nmore <b>"}}}}};
}

TEST(BenchTablesTest, Text) {
  const auto table = BenchTable(Results());
  EXPECT_THAT(table[0], ElementsAre("#", "ROW", "FORMAT", "BITS/W", "SIZE", "x", "QUANTIZE",
                                    "PERPLEXITY", "KL", "TOKENS/S", "x", "KL TIES"));
  EXPECT_THAT(table[1], ElementsAre("1", "original", "original", "16.000", "2.00 MB", "1.00", "-",
                                    "28.65 ± 0.91", "0", "123", "1.00", ""));
  EXPECT_THAT(table[2], ElementsAre("2", "q|4", "gptq", "4.250", "500 kB", "0.25", "1.23 s",
                                    "31.55 ± 1.02", "0.1472 ± 0.0034", "61.7", "0.50", "3"));
  EXPECT_EQ(table[4][8], "failed");
  const std::string text = BenchText(Results());
  EXPECT_THAT(text, AllOf(HasSubstr("quantmill 1.2.3, A CPU, 2 threads, 2026-01-02"),
                          HasSubstr("m/bad failed: what; a \"why\",; more <b>"),
                          HasSubstr("8 tokens of prompt and 4 tokens generated")));
}

TEST(BenchTablesTest, Markdown) {
  const std::string text = BenchMarkdown(Results());
  EXPECT_THAT(text, AllOf(HasSubstr("| # | ROW | FORMAT |"), HasSubstr("| 2 | q\\|4 | gptq |")));
}

TEST(BenchTablesTest, CsvHoldsEveryKeyOnce) {
  const std::string text = BenchCsv(Results());
  EXPECT_THAT(text,
              ::testing::StartsWith(
                  "model,row,status,format,bits_per_weight_all,size_bytes,size_ratio,perplexity,"
                  "perplexity_stderr,kl_mean,kl_mean_stderr,tokens_per_second_b1,"
                  "tokens_per_second_b1_ratio,quantize_seconds,kl_ties,error\r\n"));
  EXPECT_THAT(text, HasSubstr("m,bad,failed,,,,,,,,,,,,,\"what; a \"\"why\"\",\nmore <b>\"\r\n"));
}

TEST(BenchTablesTest, ThePageIsCompleteAndEscaped) {
  const std::string page = BenchPage(Results());
  EXPECT_THAT(page, AllOf(HasSubstr("<!DOCTYPE html>"), HasSubstr("<circle"),
                          HasSubstr("more &lt;b&gt;"), Not(HasSubstr("more <b>")),
                          Not(HasSubstr("http")), Not(HasSubstr("src=")), Not(HasSubstr("href"))));
  // The original has no place on a logarithmic axis, and rows without KL have none at all.
  EXPECT_EQ(page.find("<circle"), page.rfind("<circle"));
}

TEST(BenchTablesTest, NothingMeasuredIsNoCrash) {
  nlohmann::ordered_json results = Results();
  results["rows"] = nlohmann::ordered_json::array({results["rows"][3]});
  EXPECT_THAT(BenchText(results), HasSubstr("failed"));
  EXPECT_THAT(BenchPage(results), Not(HasSubstr("<svg")));
  EXPECT_THAT(BenchCsv(results), HasSubstr("model,row,status,error\r\n"));
}

}  // namespace
}  // namespace quantmill
