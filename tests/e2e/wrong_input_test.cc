// What the program says to wrong input: one clear error, the right exit code, nothing written, the
// input untouched.
#include <filesystem>
#include <fstream>
#include <functional>

#include "gmock/gmock.h"
#include "tests/crash/run_fixture.h"
#include "tests/support/shared_data.h"

namespace quantmill::testing {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;

namespace fs = std::filesystem;

constexpr char kPtq[] = "  - {use: ptq}\n";
constexpr char kGptq[] = "  - {use: gptq}\n";

class WrongInputTest : public RunFixture {
 protected:
  void SetUp() override {
    RunFixture::SetUp();
    fs::copy(model_, Path("model"), fs::copy_options::recursive);
    model_ = Path("model");
  }

  void Write(const std::string& name, const std::string& content) {
    std::ofstream(Path(name), std::ios::binary) << content;
  }
  nlohmann::ordered_json Config() {
    std::ifstream file(Path("model/config.json"));
    return nlohmann::ordered_json::parse(file);
  }
  void EditConfig(const std::function<void(nlohmann::ordered_json*)>& edit) {
    nlohmann::ordered_json config = Config();
    edit(&config);
    Write("model/config.json", config.dump());
  }

  // plan and run refuse the pipeline with this text; nothing appears and the model stays.
  void ExpectRefused(const std::string& text, const std::string& stages = kPtq,
                     const std::string& extra = "", const std::string& format = "quantmill") {
    ExpectPipeline(3, text, Pipeline("p", stages, format, extra));
  }
  void ExpectPipeline(int exit_code, const std::string& text, const std::string& path,
                      const std::vector<std::string>& more = {}) {
    const auto before = Tree(directory_);
    for (const char* command : {"plan", "run"}) {
      std::vector<std::string> arguments = {command, path};
      arguments.insert(arguments.end(), more.begin(), more.end());
      const ProgramResult result = Program(arguments);
      EXPECT_EQ(result.exit_code, exit_code) << command << ": " << result.err;
      EXPECT_EQ(result.out, "");
      EXPECT_THAT(result.err, AllOf(StartsWith("error: "), HasSubstr(text))) << command;
    }
    auto after = Tree(directory_);
    after.erase("stdout");
    after.erase("stderr");
    auto expected = before;
    expected.erase("stdout");
    expected.erase("stderr");
    EXPECT_EQ(after, expected) << "something was written";
    EXPECT_FALSE(fs::exists(Path("p.work")));
  }
  void ExpectError(int exit_code, const std::string& text,
                   const std::vector<std::string>& arguments) {
    const ProgramResult result = Program(arguments);
    EXPECT_EQ(result.exit_code, exit_code) << result.err;
    EXPECT_THAT(result.err, AllOf(HasSubstr("error: "), HasSubstr(text)));
    EXPECT_EQ(result.out, "") << text;
  }
  // Every command that reads a model.
  void ExpectBadModel(const std::string& text) {
    ExpectRefused(text);
    ExpectError(1, text, {"eval", model_, "--text", Path("calib.txt"), "--context", "64"});
    ExpectError(1, text, {"generate", model_, "--prompt", "x"});
    ExpectError(1, text, {"verify", model_});
  }
};

TEST_F(WrongInputTest, Models) {
  const std::string weights = Tree(model_)["model.safetensors"];
  fs::remove(Path("model/model.safetensors"));
  ExpectBadModel("it has neither model.safetensors nor model.safetensors.index.json");
  Write("model/model.safetensors", weights.substr(0, weights.size() - 1000));
  ExpectBadModel("but the file holds only");
  Write("model/model.safetensors", "\xff\xff\xff\xff\xff\xff\xff\x7f" + weights.substr(8));
  ExpectBadModel("its header claims 9223372036854775807 bytes");
  std::string lying = weights;  // one more byte for a tensor than its shape needs
  const size_t digit = lying.find("\"data_offsets\":[") + 16;
  ASSERT_LT(digit, lying.size());
  lying[digit] = '9';
  Write("model/model.safetensors", lying);
  ExpectBadModel("data");
  fs::remove(Path("model/model.safetensors"));
  Write("model/model.safetensors.index.json",
        R"({"weight_map": {"model.embed_tokens.weight": "model-00001-of-00002.safetensors"}})");
  ExpectBadModel("model-00001-of-00002.safetensors");
}

TEST_F(WrongInputTest, Configs) {
  const nlohmann::ordered_json good = Config();
  EditConfig([](auto* config) { config->erase("hidden_size"); });
  ExpectBadModel("hidden_size is missing");
  Write("model/config.json", good.dump());
  EditConfig([](auto* config) { (*config)["model_type"] = "foo"; });
  ExpectBadModel("supported are llama, mistral");
  Write("model/config.json", good.dump());
  EditConfig([](auto* config) { (*config)["num_hidden_layers"] = 5; });
  ExpectBadModel("tensor model.layers.4.input_layernorm.weight is missing");
  Write("model/config.json", "{");
  ExpectBadModel("config.json; parse error at line 1");
  fs::remove(Path("model/config.json"));
  ExpectBadModel("config.json");
  fs::remove_all(model_);
  ExpectBadModel(model_);
}

TEST_F(WrongInputTest, TokenizersAreMissedWhereTheyAreNeeded) {
  fs::remove(Path("model/tokenizer.json"));
  const std::string text = "cannot read " + Path("model/tokenizer.json");
  ExpectError(1, text, {"eval", model_, "--text", Path("calib.txt"), "--context", "64"});
  ExpectError(1, text, {"generate", model_, "--prompt", "x"});
  ExpectRefused(text, kGptq, kCalibration);
  EXPECT_EQ(Program({"verify", model_}).exit_code, 0);
}

TEST_F(WrongInputTest, CalibrationTexts) {
  ExpectRefused("p.yaml:4:21: 'calibration.text' does not exist", kGptq,
                "calibration: {text: none.txt, samples: 4, sequence_length: 64}\n");
  Write("empty.txt", "");
  ExpectRefused("empty.txt; there is no text in it", kGptq,
                "calibration: {text: empty.txt, samples: 4, sequence_length: 64}\n");
  Write("short.txt", "hello");
  ExpectRefused("4 windows of 64 need 256", kGptq,
                "calibration: {text: short.txt, samples: 4, sequence_length: 64}\n");
  Write("binary.txt", std::string("PAR1\0\0\0\x15", 8));
  ExpectRefused("NUL byte", kGptq,
                "calibration: {text: binary.txt, samples: 4, sequence_length: 64}\n");
  for (const char* text : {"self", "calib.txt"}) {
    ExpectRefused(
        "'calibration.sequence_length' is 5000; the model takes at most 2048", kGptq,
        "calibration: {text: " + std::string(text) + ", samples: 1, sequence_length: 5000}\n");
  }
  ExpectRefused("'evaluate.context' is 4096", kPtq, "evaluate: {text: calib.txt, context: 4096}\n");
  ExpectRefused("needs calibration data for hessian", kGptq);
}

TEST_F(WrongInputTest, StagesAndFormats) {
  ExpectRefused("group_size 100 does not divide", "  - {use: ptq, options: {group_size: 100}}\n");
  ExpectRefused("matches no layer; the nearest name is 'q_proj'",
                "  - {use: ptq, layers: ['*.q_prj']}\n");
  ExpectRefused("did you mean 'gptq'?", "  - {use: gptz}\n");
  ExpectRefused("did you mean 'bits'?", "  - {use: ptq, options: {bit: 4}}\n");
  ExpectRefused("did you mean 'mse'?", "  - {use: ptq, options: {variant: msee}}\n");
  ExpectRefused("did you mean 'gptq'?", kPtq, "", "gptqq");
}

TEST_F(WrongInputTest, HostileYaml) {
  const std::string bomb =
      "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\n"
      "c: &c [*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c,*c]\n"
      "e: &e [*d,*d,*d,*d,*d,*d,*d,*d]\nf: [*e,*e,*e,*e,*e,*e,*e,*e]\n";
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"", "the file is empty"},
      {"version: 1\n\tmodel: {path: m}\n", "p.yaml:2:1: illegal tab"},
      {"version: 1\nversion: 1\n", "p.yaml:2:1: key 'version' is given twice"},
      {"version: 1\nmodel: {path: m\nstages: [\n", "p.yaml:3:"},
      {"- a\n- b\n", "the pipeline must be a map"},
      {"version: 1\nstages: {use: ptq}\n", "'stages' must be a list of stages, not a map"},
      {bomb, "more than 50000 values"},
      {"a: &a\n  b: *a\n", "nested deeper than 32 levels"},
      {std::string(20000, '['), "values are nested too deeply"},
      {std::string(100, '\0'), "NUL byte"},
      {"version: 1\n---\nversion: 1\n", "a second document begins here"}};
  for (const auto& [yaml, text] : cases) {
    Write("p.yaml", yaml);
    ExpectPipeline(2, text, Path("p.yaml"));
  }
  ExpectPipeline(2, "cannot read", Path("none.yaml"));
}

TEST_F(WrongInputTest, CommandLines) {
  const std::string pipeline = Pipeline("p", kPtq);
  ExpectPipeline(2, "did you mean 'options'?", pipeline, {"--set", "stages.0.optons.bits=3"});
  ExpectPipeline(2, "unknown device 'gpu'", pipeline, {"--device", "gpu"});
  ExpectPipeline(3, "cannot use device cuda:1000", pipeline, {"--device", "cuda:1000"});
  ExpectPipeline(2, "cannot be written", pipeline, {"--json", "/nonexistent/r.json"});
  ExpectPipeline(3, "there is no such file", pipeline, {"--plugin", Path("none.so")});
  Write("garbage.so", "garbage");
  ExpectPipeline(3, "cannot use plugin", pipeline, {"--plugin", Path("garbage.so")});
  ExpectError(2, "did you mean --resume?", {"run", pipeline, "--resum"});
  ExpectError(2, "did you mean 'run'?", {"rnu"});
  ExpectError(2, "did you mean 'gptq'?", {"describe", "gptw"});
}

// Relative to where the program runs; both commands take the same folders.
TEST_F(WrongInputTest, RelativeWorkDirectories) {
  const std::string pipeline = Pipeline("p", kPtq);
  const ProgramResult plan = Program({"plan", pipeline, "--work-dir", "relative.work"});
  EXPECT_EQ(plan.exit_code, 0) << plan.err;
  ExpectPipeline(3, "holds the model or the work directory", pipeline,
                 {"--work-dir", fs::relative(Path("p.out/work")).string()});
}

TEST_F(WrongInputTest, Outputs) {
  const std::string pipeline = Pipeline("p", kPtq);
  fs::create_directory(Path("p.out"));
  Write("p.out/foreign", "x");
  ExpectPipeline(3, "p.yaml:6:35: 'export.path' exists already", pipeline);
  ExpectPipeline(3, "this pipeline did not write it", pipeline, {"--resume"});
  fs::remove_all(Path("p.out"));
  ASSERT_EQ(Program({"run", pipeline}).exit_code, 0);
  const auto written = Tree(Path("p.out"));
  ExpectError(3, "--resume", {"run", pipeline});
  EXPECT_EQ(Tree(Path("p.out")), written);
}

TEST_F(WrongInputTest, DamagedOutputs) {
  const std::string pipeline = Pipeline("p", kPtq, "gptq");
  ASSERT_EQ(Program({"run", pipeline}).exit_code, 0);
  const auto written = Tree(Path("p.out"));
  std::string weights = written.at("model.safetensors");
  weights[weights.size() / 2] ^= 1;
  Write("p.out/model.safetensors", weights);
  ExpectError(1, "model.safetensors is not what was written", {"verify", Path("p.out")});
  ExpectError(1, "model.safetensors is not what was written", {"run", pipeline, "--resume"});
  fs::remove(Path("p.out/model.safetensors"));
  ExpectError(1, "model.safetensors is missing", {"verify", Path("p.out")});
  fs::remove_all(Path("p.out"));
  EXPECT_EQ(Program({"run", pipeline, "--resume"}).exit_code, 0);
  EXPECT_EQ(Tree(Path("p.out")), written);
  Write("p.out/config.json", written.at("config.json") + "\n");
  const ProgramResult edited = Program({"verify", Path("p.out")});
  EXPECT_EQ(edited.exit_code, 0);
  EXPECT_THAT(edited.err, HasSubstr("warning: " + Path("p.out") +
                                    "/config.json was changed after it was written"));
}

TEST_F(WrongInputTest, EvalAndGenerate) {
  Write("short.txt", "hello");
  ExpectError(1, "short.txt: text has 3 tokens", {"eval", model_, "--text", Path("short.txt")});
  ExpectError(2, "takes 2 to 2048 tokens",
              {"eval", model_, "--text", Path("calib.txt"), "--context", "4096"});
  ExpectError(1, "cannot open model " + Path("none"),
              {"eval", model_, "--text", Path("calib.txt"), "--reference", Path("none")});
  std::ifstream file(Path("calib.txt"));
  const std::string text((std::istreambuf_iterator<char>(file)), {});
  std::string plain;
  for (char c : text) plain += c == '\'' ? ' ' : c;
  ExpectError(2, "--prompt has", {"generate", model_, "--prompt", plain.substr(0, 20000)});
  for (const char* value : {"-1", "nan", "inf"}) {
    ExpectError(2, "--temperature", {"generate", model_, "--prompt", "x", "--temperature", value});
  }
  for (const char* value : {"0", "2", "-1"}) {
    ExpectError(2, "--top-p", {"generate", model_, "--prompt", "x", "--top-p", value});
  }
}

TEST_F(WrongInputTest, Inspect) {
  Write("garbage.bin", std::string(100, 'x'));
  ExpectError(1, "neither a checkpoint directory", {"inspect", Path("garbage.bin")});
  ExpectError(2, "it is no file", {"check", directory_});
  Write("garbage.safetensors", std::string(100, 'x'));
  ExpectError(1, "its header claims", {"inspect", Path("garbage.safetensors")});
  fs::create_directory(Path("empty"));
  ExpectError(1, "it holds no config.json", {"inspect", Path("empty")});
  ExpectError(1, "it does not exist", {"inspect", Path("none")});
}

}  // namespace
}  // namespace quantmill::testing
