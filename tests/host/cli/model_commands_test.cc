// The commands eval and generate, as the program runs them.
#include <cmath>
#include <fstream>
#include <string>
#include <vector>

#include "core/io/safetensors_reader.h"
#include "core/io/safetensors_writer.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "host/cli/command.h"
#include "nlohmann/json.hpp"
#include "tests/support/shared_data.h"

namespace quantmill {
namespace {

using ::testing::HasSubstr;

struct CommandRun {
  int exit_code = 0;
  std::string errors;
  nlohmann::json json;  // null when the command wrote none
};

CommandRun RunCommand(std::vector<std::string> args) {
  const std::string file = testing::MakeTempDir() + "/result.json";
  args.insert(args.end(), {"--device", "cpu", "--json", file});
  ::testing::internal::CaptureStderr();
  ::testing::internal::CaptureStdout();
  CommandRun run;
  run.exit_code = RunCommandLine(AllCommands(), args);
  ::testing::internal::GetCapturedStdout();
  run.errors = ::testing::internal::GetCapturedStderr();
  std::ifstream in(file);
  if (in) run.json = nlohmann::json::parse(in);
  return run;
}

TEST(EvalCommandTest, ScoresATextAgainstItsReference) {
  QM_SHARED_OR_SKIP(model, "models/tiny-llama");
  QM_SHARED_OR_SKIP(text, "data/valid.txt");
  const CommandRun run = RunCommand(
      {"eval", model, "--reference", model, "--text", text, "--context", "256", "--windows", "4"});
  ASSERT_EQ(run.exit_code, kExitDone) << run.errors;
  EXPECT_EQ(run.json.at("windows"), 4);
  EXPECT_EQ(run.json.at("context"), 256);
  EXPECT_EQ(run.json.at("tokens"), 4 * 255);
  EXPECT_NEAR(std::log(run.json.at("perplexity").get<double>()), run.json.at("nll"), 1e-12);
  EXPECT_EQ(run.json.at("kl_mean"), 0.0);
  EXPECT_EQ(run.json.at("top1_agreement"), 1.0);
  EXPECT_EQ(run.json.at("ppl_ratio"), 1.0);
}

TEST(EvalCommandTest, WritesLogitsOfGivenIds) {
  QM_SHARED_OR_SKIP(model, "models/arch/qwen2");  // has no tokenizer, and needs none
  const std::string reference = model + "/reference.safetensors";
  const std::string output = testing::MakeTempDir() + "/logits.safetensors";
  const CommandRun run = RunCommand({"eval", model, "--tokens", reference, "--logits", output});
  ASSERT_EQ(run.exit_code, kExitDone) << run.errors;
  const Tensor actual = SafetensorsFile::Open(output).value()->Get("logits").value();
  const Tensor expected = SafetensorsFile::Open(reference).value()->Get("logits").value();
  ASSERT_EQ(actual.shape(), expected.shape());
  for (int64_t i = 0; i < actual.elements(); ++i) {
    ASSERT_NEAR(actual.as<float>()[i], expected.as<float>()[i], 1e-3);
  }
}

TEST(EvalCommandTest, ScoresAnswersOfRecords) {
  const std::string records = testing::MakeTempDir() + "/records.json";
  std::ofstream(records) << R"([{"instruction": "Say it.", "output": "The stone turns."},
                                {"instruction": "Again.", "input": "Now", "output": "It turns."}])";
  const std::string model = testing::SourcePath("configs/quickstart/tiny-llama");
  const CommandRun run =
      RunCommand({"eval", model, "--text", records, "--answers", "--context", "256"});
  ASSERT_EQ(run.exit_code, kExitDone) << run.errors;
  EXPECT_EQ(run.json.at("windows"), 2);
  EXPECT_EQ(run.json.at("answers_cut"), 0);
  EXPECT_EQ(run.json.at("answers_left_out"), 0);
  // Two short answers and the token behind each.
  EXPECT_GT(run.json.at("tokens"), 6);
  EXPECT_LT(run.json.at("tokens"), 30);
}

TEST(EvalCommandTest, WrongUsage) {
  QM_SHARED_OR_SKIP(model, "models/tiny-llama");
  QM_SHARED_OR_SKIP(text, "data/valid.txt");
  EXPECT_EQ(RunCommand({"eval", model}).exit_code, kExitUsage);
  EXPECT_EQ(RunCommand({"eval", model, "--tokens", "a"}).exit_code, kExitUsage);
  EXPECT_EQ(RunCommand({"eval", model, "--tokens", "a", "--logits", "b", "--answers"}).exit_code,
            kExitUsage);
  EXPECT_EQ(RunCommand({"eval", model, "--text", text, "--tokens", "a", "--logits", "b"}).exit_code,
            kExitUsage);
  const CommandRun context = RunCommand({"eval", model, "--text", text, "--context", "4096"});
  EXPECT_EQ(context.exit_code, kExitUsage);
  EXPECT_THAT(context.errors, HasSubstr("this model takes 2 to 2048 tokens"));
  EXPECT_EQ(RunCommand({"eval", model, "--text", text, "--windows", "-1"}).exit_code, kExitUsage);
}

TEST(EvalCommandTest, FilesThatCannotBeUsed) {
  QM_SHARED_OR_SKIP(model, "models/tiny-llama");
  const std::string directory = testing::MakeTempDir();
  EXPECT_EQ(RunCommand({"eval", model, "--text", directory + "/none.txt"}).exit_code, kExitFailed);
  EXPECT_EQ(RunCommand({"eval", directory, "--text", directory + "/none.txt"}).exit_code,
            kExitFailed);
  const std::string ids = directory + "/ids.safetensors";
  const auto writer = SafetensorsWriter::Create(ids, {{"input_ids", DType::kF32, {1, 2}}}).value();
  ASSERT_TRUE(writer->Write("input_ids", Tensor::FromF32({1, 2}, {1, 2})).ok());
  ASSERT_TRUE(writer->Finish().ok());
  const CommandRun run =
      RunCommand({"eval", model, "--tokens", ids, "--logits", directory + "/out.safetensors"});
  EXPECT_EQ(run.exit_code, kExitFailed);
  EXPECT_THAT(run.errors, HasSubstr("store the ids as int32 [1, T]"));
}

TEST(GenerateCommandTest, ContinuesAPromptGreedily) {
  QM_SHARED_OR_SKIP(model, "models/tiny-llama");
  std::ifstream file(model + "/reference.json");
  const auto greedy = nlohmann::json::parse(file).at("greedy");
  const std::string prompt = greedy.at("prompt");
  const CommandRun run = RunCommand({"generate", model, "--prompt", prompt, "--max-tokens", "30"});
  ASSERT_EQ(run.exit_code, kExitDone) << run.errors;
  const std::string text = greedy.at("text");
  const std::string continuation = text.substr(text.find(prompt) + prompt.size());
  const std::string actual = run.json.at("text");
  EXPECT_EQ(run.json.at("tokens"), 30);
  EXPECT_EQ(actual, continuation.substr(0, actual.size()));
  EXPECT_GT(actual.size(), 40u);
}

TEST(GenerateCommandTest, SamplingIsReproducible) {
  QM_SHARED_OR_SKIP(model, "models/tiny-llama");
  const auto sample = [&](const std::string& seed) {
    return RunCommand({"generate", model, "--prompt", "The", "--max-tokens", "16", "--temperature",
                       "1", "--top-p", "0.9", "--seed", seed})
        .json.at("ids");
  };
  const auto first = sample("1");
  EXPECT_EQ(sample("1"), first);
  EXPECT_NE(sample("2"), first);
}

TEST(GenerateCommandTest, WrongUsage) {
  QM_SHARED_OR_SKIP(model, "models/tiny-llama");
  EXPECT_EQ(RunCommand({"generate", model}).exit_code, kExitUsage);
  for (const auto& [option, value] : std::vector<std::pair<std::string, std::string>>{
           {"--max-tokens", "0"}, {"--temperature", "-1"}, {"--top-p", "0"}, {"--top-p", "1.5"}}) {
    EXPECT_EQ(RunCommand({"generate", model, "--prompt", "x", option, value}).exit_code, kExitUsage)
        << option << " " << value;
  }
}

}  // namespace
}  // namespace quantmill
