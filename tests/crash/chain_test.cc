// awq whole and in parts, before other methods: every kind of decoder, every target, runs that are
// cut off and continued.
#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <set>

#include "core/io/safetensors_reader.h"
#include "core/io/safetensors_writer.h"
#include "gmock/gmock.h"
#include "tests/crash/run_fixture.h"
#include "tests/support/shared_data.h"

namespace quantmill::testing {
namespace {

using ::testing::AllOf;
using ::testing::Contains;
using ::testing::HasSubstr;
using ::testing::Not;

namespace fs = std::filesystem;

constexpr char kAwq[] = "  - {use: awq, options: {group_size: 64}}\n";
constexpr char kSelf[] = "calibration: {text: self, samples: 2, sequence_length: 48}\n";
class ChainTest : public RunFixture {
 protected:
  nlohmann::json Run(const std::string& name, const std::string& stages, const std::string& target,
                     const std::string& extra) {
    const ProgramResult result =
        RunPipeline(Pipeline(name, stages, target, extra), {"--json", Path("r.json")});
    EXPECT_EQ(result.exit_code, 0) << name << "\n" << result.err;
    last_ = result.err;
    std::ifstream file(Path("r.json"));
    return nlohmann::json::parse(file, nullptr, false);
  }
  // All edits of a run.
  std::set<std::string> Edits(const std::string& output) {
    const auto slots =
        nlohmann::json::parse(Tree(Path(output))["quantmill_provenance.json"])["slots"];
    std::set<std::string> edits;
    for (const auto& slot : slots) {
      for (const auto& record : slot) {
        if (!record.contains("edits")) continue;
        for (const auto& edit : record["edits"]) edits.insert(edit.get<std::string>());
      }
    }
    return edits;
  }

  std::vector<float> Logits(const std::string& model) {
    std::vector<int32_t> ids;
    for (int32_t i = 0; i < 24; ++i) ids.push_back((i * 37 + 5) % 500);
    auto writer = SafetensorsWriter::Create(Path("ids.safetensors"),
                                            {{"input_ids", DType::kI32, Shape({1, 24})}});
    EXPECT_TRUE(writer.ok()) << writer.status();
    EXPECT_TRUE((*writer)->Write("input_ids", Tensor::FromI32(Shape({1, 24}), ids)).ok());
    EXPECT_TRUE((*writer)->Finish().ok());
    const ProgramResult result =
        Program({"eval", model, "--device", "cpu", "--tokens", Path("ids.safetensors"), "--logits",
                 Path("logits.safetensors")});
    EXPECT_EQ(result.exit_code, 0) << result.err;
    const auto file = SafetensorsFile::Open(Path("logits.safetensors"));
    if (!file.ok()) return {};
    const Tensor logits = (*file)->Get("logits").value();
    return {logits.as<float>(), logits.as<float>() + logits.elements()};
  }
  // Root mean square of the difference over that of `a`.
  static double Difference(const std::vector<float>& a, const std::vector<float>& b) {
    EXPECT_EQ(a.size(), b.size());
    double error = 0, energy = 0;
    for (size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
      error += (double{a[i]} - b[i]) * (double{a[i]} - b[i]);
      energy += double{a[i]} * a[i];
    }
    return std::sqrt(error / energy);
  }

  std::string last_;  // what the last run said
};

TEST_F(ChainTest, AwqIsBetterThanRoundingAndReadsBack) {
  const std::string calibration = std::string(kCalibration) + kEvaluate;
  const auto plain =
      Run("plain", "  - {use: ptq, options: {group_size: 64}}\n", "quantmill", calibration);
  const double bar = plain["evaluation"]["kl_mean"];
  for (const char* target : {"awq", "compressed-tensors", "gptq_v2", "quantmill"}) {
    const auto result = Run(target, kAwq, target, calibration);
    EXPECT_LT(result["evaluation"]["kl_mean"], bar) << target;
    EXPECT_THAT(result["checks"].dump(), HasSubstr("agree with the model in memory"));
    EXPECT_EQ(result["stages"][0]["slots"], 28);
  }
  const auto config = nlohmann::json::parse(Tree(Path("awq.out"))["config.json"]);
  EXPECT_EQ(config["quantization_config"]["quant_method"], "awq");
  EXPECT_EQ(config["quantization_config"]["version"], "gemm");
}

TEST_F(ChainTest, EveryKindOfDecoder) {
  for (const char* name : {"llama3-rope", "qwen2", "mixtral"}) {
    SCOPED_TRACE(name);
    QM_SHARED_OR_SKIP(model, std::string("models/arch/") + name);
    model_ = model;
    const auto result = Run(name, kAwq, "awq", kSelf);
    EXPECT_THAT(result["checks"].dump(), HasSubstr("agree with the model in memory"));
    const std::set<std::string> edits = Edits(std::string(name) + ".out");
    // Grouped queries in all three, biases in one.
    EXPECT_THAT(edits, Contains("scale model.layers.0.self_attn.v_proj"));
    EXPECT_THAT(edits, Contains("scale model.layers.0.input_layernorm"));
    EXPECT_THAT(edits, Contains(HasSubstr("clip model.layers.1")));
    EXPECT_THAT(edits, Not(Contains(HasSubstr("clip model.layers.0.self_attn.q_proj"))));
  }
  const std::set<std::string> edits = Edits("mixtral.out");
  EXPECT_THAT(edits, Contains("scale model.layers.0.post_attention_layernorm"));
  EXPECT_THAT(edits, Contains(HasSubstr("scale model.layers.0.block_sparse_moe.experts.")));
  EXPECT_THAT(last_, Not(HasSubstr("of 8 experts, 8 saw no calibration row")));
}

// The router reads the norm that is divided: were it not rescaled, other experts would answer.
TEST_F(ChainTest, ScalesAloneComputeTheSame) {
  std::vector<std::string> models = {model_};
  for (const char* name : {"mixtral", "qwen2"}) {
    if (const auto path = SharedPath(std::string("models/arch/") + name)) models.push_back(*path);
  }
  int index = 0;
  for (const std::string& model : models) {
    model_ = model;
    const std::string name = "m" + std::to_string(index++);
    Run(name, "  - {use: awq.scale}\n  - {use: ptq, options: {bits: 8, group_size: 32}}\n", "dense",
        kSelf);
    EXPECT_LT(Difference(Logits(model), Logits(Path(name + ".out"))), 0.03) << model;
    EXPECT_THAT(Edits(name + ".out"), Contains(HasSubstr("scale ")));
  }
}

TEST_F(ChainTest, PartsGoBeforeEveryQuantizer) {
  for (const char* method : {"ptq", "gptq", "hqq"}) {
    const std::string last =
        std::string("  - {use: ") + method + ", options: {bits: 3, group_size: 64}}\n";
    const auto result = Run(method, "  - {use: awq.scale}\n  - {use: awq.clip}\n" + last,
                            "quantmill", kCalibration);
    EXPECT_EQ(result["stages"].size(), 3u);
    const std::set<std::string> edits = Edits(std::string(method) + ".out");
    EXPECT_THAT(edits, Contains(HasSubstr("scale ")));
    EXPECT_THAT(edits, Contains(HasSubstr("clip ")));
  }
}

// A method that does not say how it rounds: the transform's own options do.
TEST_F(ChainTest, PartsPrepareForWhatTheirOwnOptionsSay) {
  constexpr char kOwn[] = "bits: 4, group_size: 64, symmetric: true";
  const auto stages = [&](const std::string& own) {
    return "  - {use: awq.scale, options: {" + own + "}}\n  - {use: awq.clip, options: {" + own +
           "}}\n  - {use: nf4}\n";
  };
  Run("own", stages(kOwn), "bitsandbytes", kCalibration);
  EXPECT_THAT(Edits("own.out"), AllOf(Contains(HasSubstr("scale ")), Contains(HasSubstr("clip "))));
  const ProgramResult refused =
      Program({"plan", Pipeline("none", stages("grid: 4"), "bitsandbytes", kCalibration)});
  EXPECT_EQ(refused.exit_code, 3);
  EXPECT_THAT(refused.err, HasSubstr("bits: 4, group_size: 64, symmetric: true before nf4"));
}

TEST_F(ChainTest, CutOffAnywhereAndContinuedGivesTheSameBytes) {
  const std::string stages =
      "  - {use: awq.scale, options: {windows: 2}}\n  - {use: awq.clip}\n"
      "  - {use: gptq, options: {group_size: 64}, layers: ['*.self_attn.*', '*.mlp.*']}\n";
  const std::string pipeline = Pipeline("p", stages, "compressed-tensors", kCalibration);
  ASSERT_EQ(RunPipeline(pipeline).exit_code, 0);
  const auto expected = Tree(Path("p.out"));
  const std::string journal = Tree(Path("p.work"))["journal.jsonl"];
  const size_t lines = static_cast<size_t>(std::count(journal.begin(), journal.end(), '\n'));
  ASSERT_GE(lines, 24u);
  for (size_t kept = 0; kept < lines; kept += 5) {
    fs::remove_all(Path("p.out"));
    std::istringstream in(journal);
    std::ofstream out(Path("p.work/journal.jsonl"));
    std::string line;
    for (size_t i = 0; i < kept && std::getline(in, line); ++i) out << line << "\n";
    out.close();
    const ProgramResult resumed = RunPipeline(pipeline, {"--resume"});
    ASSERT_EQ(resumed.exit_code, 0) << kept << resumed.err;
    EXPECT_EQ(Tree(Path("p.out")), expected) << "after " << kept << " lines";
  }
}

TEST_F(ChainTest, RefusedBeforeWork) {
  const auto refused = [&](const std::string& name, const std::string& stages,
                           const std::string& format, const std::string& text,
                           const std::string& extra = kCalibration) {
    const ProgramResult result = RunPipeline(Pipeline(name, stages, format, extra));
    EXPECT_EQ(result.exit_code, 3) << result.err;
    EXPECT_THAT(result.err, HasSubstr(text));
  };
  refused("a", "  - {use: awq.scale}\n", "dense", "later stage");
  refused("b", "  - {use: awq}\n", "awq", "calibration", "");
  refused("c", "  - {use: awq, options: {bits: 3, group_size: 64}}\n", "awq", "4-bit");
  refused("d", "  - {use: awq, options: {grid: 1}}\n", "awq", "grid");
  refused("e", "  - {use: awq.scale, layers: ['*.q_proj']}\n  - {use: ptq}\n", "quantmill",
          "q, k and v");
  refused("f", "  - {use: awq}\n  - {use: gptq}\n", "quantmill", "awq");
  refused("g", "  - {use: awq.clamp}\n", "quantmill", "awq.scale");
  refused("h", "  - {use: gptq, options: {act_order: true}}\n", "awq", "static_groups");
}

}  // namespace
}  // namespace quantmill::testing
