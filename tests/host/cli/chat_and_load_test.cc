// The command chat, and --load of the commands that run a model.
#include <filesystem>
#include <fstream>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include "core/io/files.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "host/cli/command.h"
#include "nlohmann/json.hpp"
#include "tests/support/shared_data.h"

namespace quantmill {
namespace {

using ::testing::HasSubstr;
namespace fs = std::filesystem;

struct CommandRun {
  int exit_code = 0;
  std::string errors;
  nlohmann::json json;  // null when the command wrote none
};

CommandRun RunCommand(std::vector<std::string> args, const std::string& input = "") {
  const std::string file = testing::MakeTempDir() + "/result.json";
  args.insert(args.end(), {"--device", "cpu", "--json", file});
  std::istringstream lines(input);
  std::streambuf* const standard = std::cin.rdbuf(lines.rdbuf());
  std::cin.clear();
  ::testing::internal::CaptureStderr();
  ::testing::internal::CaptureStdout();
  CommandRun run;
  run.exit_code = RunCommandLine(AllCommands(), args);
  ::testing::internal::GetCapturedStdout();
  run.errors = ::testing::internal::GetCapturedStderr();
  std::cin.rdbuf(standard);
  std::ifstream in(file);
  if (in) run.json = nlohmann::json::parse(in);
  return run;
}

// ---- --load ------------------------------------------------------------------------------------

TEST(Load, QuantizesWhileLoading) {
  QM_SHARED_OR_SKIP(model, "models/tiny-llama");
  QM_SHARED_OR_SKIP(text, "data/valid.txt");
  const auto divergence = [&](const std::vector<std::string>& load) {
    std::vector<std::string> args = {"eval", model,       "--reference", model,       "--text",
                                     text,   "--context", "256",         "--windows", "2"};
    args.insert(args.end(), load.begin(), load.end());
    const CommandRun run = RunCommand(args);
    EXPECT_EQ(run.exit_code, kExitDone) << run.errors;
    return run.json.is_null() ? -1.0 : run.json.at("kl_mean").get<double>();
  };
  EXPECT_EQ(divergence({}), 0.0);
  const double nf4 = divergence({"--load", "nf4"});
  EXPECT_GT(nf4, 0.0);
  EXPECT_LT(nf4, 1.0);
  // Eight bits are closer than four, three further away.
  EXPECT_LT(divergence({"--load", "ptq", "--load-options", "bits=8,group_size=64"}), nf4);
  EXPECT_GT(divergence({"--load", "ptq", "--load-options", "bits=3,group_size=64"}), nf4);
}

TEST(Load, GeneratesFromWhatItQuantized) {
  QM_SHARED_OR_SKIP(model, "models/tiny-llama");
  const CommandRun run = RunCommand({"generate", model, "--prompt", "The", "--max-tokens", "8",
                                     "--load", "nf4", "--load-options", "type=fp4,block_size=128"});
  ASSERT_EQ(run.exit_code, kExitDone) << run.errors;
  EXPECT_EQ(run.json.at("tokens"), 8);
}

TEST(Load, RefusesWhatCannotBeDone) {
  QM_SHARED_OR_SKIP(model, "models/tiny-llama");
  const auto error = [&](const std::vector<std::string>& load, int code) {
    std::vector<std::string> args = {"generate", model, "--prompt", "The", "--max-tokens", "1"};
    args.insert(args.end(), load.begin(), load.end());
    const CommandRun run = RunCommand(args);
    EXPECT_EQ(run.exit_code, code) << run.errors;
    return run.errors;
  };
  EXPECT_THAT(error({"--load", "nf5"}, kExitUsage), HasSubstr("did you mean 'nf4'?"));
  EXPECT_THAT(error({"--load", "nf4", "--load-options", "bits=4"}, kExitUsage), HasSubstr("bits"));
  EXPECT_THAT(error({"--load", "nf4", "--load-options", "type"}, kExitUsage),
              HasSubstr("--load-options"));
  EXPECT_THAT(error({"--load", "nf4", "--load-options", "type=int4"}, kExitUsage),
              HasSubstr("int4"));
  EXPECT_THAT(error({"--load-options", "type=fp4"}, kExitUsage), HasSubstr("--load"));
  EXPECT_THAT(error({"--load", "gptq"}, kExitFailed), HasSubstr("calibration"));
  EXPECT_THAT(error({"--load", "ptq", "--load-options", "group_size=100"}, kExitFailed),
              HasSubstr("group_size"));
}

// ---- chat --------------------------------------------------------------------------------------

TEST(Chat, AnswersEachLineAndRemembers) {
  QM_SHARED_OR_SKIP(model, "models/tiny-llama");
  const CommandRun both =
      RunCommand({"chat", model, "--max-tokens", "12"}, "The old man\n\n   \nThe sea\n");
  ASSERT_EQ(both.exit_code, kExitDone) << both.errors;
  EXPECT_EQ(both.json.at("turns"), 2);
  EXPECT_EQ(both.json.at("template"), "plain");
  EXPECT_EQ(both.json.at("lines"), nlohmann::json({"The old man", "The sea"}));
  const auto replies = both.json.at("replies").get<std::vector<std::string>>();
  // The first answer is what generate says to the same text.
  const CommandRun alone =
      RunCommand({"generate", model, "--prompt", "The old man", "--max-tokens", "12"});
  EXPECT_EQ(replies.at(0), alone.json.at("text").get<std::string>());
  // The second one is the continuation of the whole conversation.
  const CommandRun whole =
      RunCommand({"generate", model, "--prompt", "The old man" + replies.at(0) + "\nThe sea",
                  "--max-tokens", "12"});
  EXPECT_EQ(replies.at(1), whole.json.at("text").get<std::string>());
}

TEST(Chat, ForgetsOnRequestAndQuits) {
  QM_SHARED_OR_SKIP(model, "models/tiny-llama");
  const CommandRun run = RunCommand({"chat", model, "--max-tokens", "6"},
                                    "The sea\n/new\nThe sea\n/quit\nnever read\n");
  ASSERT_EQ(run.exit_code, kExitDone) << run.errors;
  EXPECT_EQ(run.json.at("turns"), 2);
  EXPECT_EQ(run.json.at("replies").at(0), run.json.at("replies").at(1));
}

TEST(Chat, StartsAnewWhenTheContextIsFull) {
  QM_SHARED_OR_SKIP(model, "models/tiny-llama");
  const std::string longer(400, 'x');
  const CommandRun run =
      RunCommand({"chat", model, "--max-tokens", "8", "--context", "24"},
                 "The old man\nlooked at the sea and\n" + longer + "\nThe old man\n");
  EXPECT_EQ(run.exit_code, kExitFailed);  // a line that no context holds
  EXPECT_THAT(run.errors, HasSubstr("forgotten"));
  EXPECT_THAT(run.errors, HasSubstr("shorten the line"));
  EXPECT_EQ(run.json.at("turns"), 3);
  EXPECT_EQ(run.json.at("replies").at(0), run.json.at("replies").at(2));
}

TEST(Chat, UsesTheTemplateOfTheModel) {
  QM_SHARED_OR_SKIP(model, "models/tiny-llama");
  const std::string copy = testing::MakeTempDir() + "/model";
  fs::copy(model, copy);
  ASSERT_TRUE(WriteFile(copy + "/chat_template.jinja", "<|im_start|> ... <|im_end|>").ok());
  const CommandRun run = RunCommand({"chat", copy, "--max-tokens", "4"}, "Hello\n");
  ASSERT_EQ(run.exit_code, kExitDone) << run.errors;
  EXPECT_EQ(run.json.at("template"), "chatml");
  const CommandRun same =
      RunCommand({"generate", model, "--max-tokens", "4", "--prompt",
                  "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"});
  EXPECT_EQ(run.json.at("replies").at(0), same.json.at("text"));
}

TEST(Chat, DrawsAnewForEachAnswerAndReproducibly) {
  QM_SHARED_OR_SKIP(model, "models/tiny-llama");
  const auto replies = [&](const std::string& seed) {
    return RunCommand({"chat", model, "--max-tokens", "12", "--temperature", "1", "--seed", seed,
                       "--load", "nf4"},
                      "The\n/new\nThe\n")
        .json.at("replies");
  };
  const auto first = replies("1");
  EXPECT_EQ(replies("1"), first);
  EXPECT_NE(first.at(0), first.at(1));
}

TEST(Chat, WrongUsage) {
  QM_SHARED_OR_SKIP(model, "models/tiny-llama");
  EXPECT_EQ(RunCommand({"chat"}).exit_code, kExitUsage);
  EXPECT_EQ(RunCommand({"chat", model, "--context", "1"}).exit_code, kExitUsage);
  EXPECT_EQ(RunCommand({"chat", model, "--max-tokens", "0"}).exit_code, kExitUsage);
  EXPECT_EQ(RunCommand({"chat", model + "-none"}).exit_code, kExitFailed);
  EXPECT_EQ(RunCommand({"chat", model}).json.at("turns"), 0);
}

}  // namespace
}  // namespace quantmill
