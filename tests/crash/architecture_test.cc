// Whole runs over every kind of decoder, written as every target and read back.
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>

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

constexpr char kSelf[] = "calibration: {text: self, samples: 2, sequence_length: 48}\n";
constexpr char kGptq[] = "  - {use: gptq, options: {bits: 4, group_size: 32}}\n";
constexpr char kPtq[] = "  - {use: ptq, options: {bits: 8, group_size: 64}}\n";

class ArchitectureTest : public RunFixture {
 protected:
  void SetUp() override {
    RunFixture::SetUp();
    std::vector<int32_t> ids;
    for (int32_t i = 0; i < 24; ++i) ids.push_back((i * 37 + 5) % 500);
    auto writer = SafetensorsWriter::Create(Path("ids.safetensors"),
                                            {{"input_ids", DType::kI32, Shape({1, 24})}});
    ASSERT_TRUE(writer.ok()) << writer.status();
    ASSERT_TRUE((*writer)->Write("input_ids", Tensor::FromI32(Shape({1, 24}), ids)).ok());
    ASSERT_TRUE((*writer)->Finish().ok());
  }

  // The run's JSON; null after a failure, which is reported.
  nlohmann::json Run(const std::string& name, const std::string& stages,
                     const std::string& target) {
    const ProgramResult result =
        RunPipeline(Pipeline(name, stages, target, kSelf), {"--json", Path("r.json")});
    EXPECT_EQ(result.exit_code, 0) << name << "\n" << result.err;
    std::ifstream file(Path("r.json"));
    return nlohmann::json::parse(file, nullptr, false);
  }

  std::vector<float> Logits(const std::string& model) {
    const ProgramResult result =
        Program({"eval", model, "--device", "cpu", "--tokens", Path("ids.safetensors"), "--logits",
                 Path("logits.safetensors")});
    EXPECT_EQ(result.exit_code, 0) << result.err;
    const auto file = SafetensorsFile::Open(Path("logits.safetensors"));
    if (!file.ok()) return {};
    const Tensor logits = (*file)->Get("logits").value();
    return {logits.as<float>(), logits.as<float>() + logits.elements()};
  }

  // Largest difference over the root mean square of `a`.
  static double Difference(const std::vector<float>& a, const std::vector<float>& b) {
    EXPECT_EQ(a.size(), b.size());
    double largest = 0, energy = 0;
    for (size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
      largest = std::max(largest, std::abs(static_cast<double>(a[i]) - b[i]));
      energy += static_cast<double>(a[i]) * a[i];
    }
    return largest / std::sqrt(energy / static_cast<double>(a.size()));
  }

  // A copy of the model in which the tensor is all zeros.
  void ZeroTensor(const std::string& tensor) {
    fs::copy(model_, Path("model"), fs::copy_options::recursive);
    model_ = Path("model");
    const std::string path = model_ + "/model.safetensors";
    fs::permissions(path, fs::perms::owner_write, fs::perm_options::add);
    std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
    uint64_t header_size = 0;
    file.read(reinterpret_cast<char*>(&header_size), 8);
    std::string header(header_size, ' ');
    file.read(header.data(), static_cast<std::streamsize>(header_size));
    const auto offsets = nlohmann::json::parse(header)[tensor]["data_offsets"];
    const auto begin = offsets[0].get<uint64_t>(), end = offsets[1].get<uint64_t>();
    file.seekp(static_cast<std::streamoff>(8 + header_size + begin));
    file << std::string(end - begin, '\0');
  }
};

// `run` compares what it wrote with the model it has in memory. Targets whose scales have the same
// dtype hold the same values, so that `eval` computes the same from them; those of
// compressed-tensors are in bf16, and a dense one has bf16 weights.
TEST_F(ArchitectureTest, EveryTargetComputesWhatTheRunHadInMemory) {
  for (const std::string name : {"mixtral", "qwen2", "llama3-rope"}) {
    QM_SHARED_OR_SKIP(model, "models/arch/" + name);
    model_ = model;
    for (const char* stages : {kPtq, kGptq}) {
      const std::string kind = name + (stages == kPtq ? "-ptq-" : "-gptq-");
      for (const std::string target : {"quantmill", "gptq_v2", "compressed-tensors", "dense"}) {
        const nlohmann::json result = Run(kind + target, stages, target);
        EXPECT_THAT(result["checks"].dump(), HasSubstr("agree with the model in memory")) << kind;
      }
      const std::vector<float> expected = Logits(Path(kind + "quantmill.out"));
      EXPECT_EQ(expected.size(), 24u * 512);
      EXPECT_LT(Difference(expected, Logits(Path(kind + "gptq_v2.out"))), 1e-5) << kind;
      EXPECT_EQ(Logits(Path(kind + "compressed-tensors.out")).size(), expected.size());
    }
  }
}

TEST_F(ArchitectureTest, BiasesStayAsTheyAre) {
  QM_SHARED_OR_SKIP(model, "models/arch/qwen2");
  model_ = model;
  const auto original = SafetensorsFile::Open(model + "/model.safetensors");
  ASSERT_TRUE(original.ok()) << original.status();
  for (const std::string target : {"gptq_v2", "compressed-tensors", "quantmill"}) {
    Run(target, kPtq, target);
    const auto written = SafetensorsFile::Open(Path(target + ".out/model.safetensors"));
    ASSERT_TRUE(written.ok()) << written.status();
    int biases = 0;
    for (const char* part : {"q_proj", "k_proj", "v_proj"}) {
      const std::string bias = std::string("model.layers.1.self_attn.") + part + ".bias";
      const Tensor a = (*original)->Get(bias).value(), b = (*written)->Get(bias).value();
      ASSERT_EQ(a.bytes(), b.bytes());
      biases += std::memcmp(a.data(), b.data(), static_cast<size_t>(a.bytes())) == 0;
    }
    EXPECT_EQ(biases, 3) << target;
  }
}

TEST_F(ArchitectureTest, RoutersStayDenseAndAreListed) {
  QM_SHARED_OR_SKIP(model, "models/arch/mixtral");
  model_ = model;
  for (const std::string target : {"gptq_v2", "compressed-tensors"}) {
    const nlohmann::json result = Run(target, kPtq, target);
    EXPECT_THAT(result["unquantized"], Contains("model.layers.1.block_sparse_moe.gate"));
    const std::string config = Tree(Path(target + ".out"))["config.json"];
    EXPECT_THAT(config, HasSubstr("block_sparse_moe")) << target;
    const auto written = SafetensorsFile::Open(Path(target + ".out/model.safetensors"));
    ASSERT_TRUE(written.ok()) << written.status();
    EXPECT_TRUE((*written)->Get("model.layers.1.block_sparse_moe.gate.weight").ok());
  }
}

TEST_F(ArchitectureTest, ExpertsWithoutRowsAreRoundedCountedAndReported) {
  QM_SHARED_OR_SKIP(model, "models/arch/mixtral");
  model_ = model;
  // With equal router logits every token goes to the first two of four experts.
  ZeroTensor("model.layers.0.block_sparse_moe.gate.weight");
  const nlohmann::json result = Run("g", kGptq, "quantmill");
  EXPECT_EQ(result["experts"], 8);
  EXPECT_EQ(result["experts_without_rows"], 2);
  EXPECT_EQ(result["expert_rows_min"], 0);
  EXPECT_THAT(result["warnings"].dump(),
              AllOf(HasSubstr("2 saw no calibration row"),
                    HasSubstr("model.layers.0.block_sparse_moe.experts.2")));
  // What no row reached is rounded to nearest: as ptq does it.
  Run("p", "  - {use: ptq, options: {bits: 4, group_size: 32}}\n", "quantmill");
  const auto gptq = SafetensorsFile::Open(Path("g.out/model.safetensors"));
  const auto ptq = SafetensorsFile::Open(Path("p.out/model.safetensors"));
  ASSERT_TRUE(gptq.ok() && ptq.ok());
  auto same = [&](const std::string& name) {
    const Tensor a = (*gptq)->Get(name).value(), b = (*ptq)->Get(name).value();
    return a.bytes() == b.bytes() &&
           std::memcmp(a.data(), b.data(), static_cast<size_t>(a.bytes())) == 0;
  };
  const std::string experts = "model.layers.0.block_sparse_moe.experts.";
  for (const char* slot : {"2.w1", "2.w2", "2.w3", "3.w1", "3.w2", "3.w3"}) {
    EXPECT_TRUE(same(experts + slot + ".codes")) << slot;
  }
  EXPECT_FALSE(same(experts + "0.w1.codes"));
}

TEST_F(ArchitectureTest, HeadIsQuantizedWhereAPatternNamesIt) {
  QM_SHARED_OR_SKIP(model, "models/arch/mixtral");
  model_ = model;
  const std::string stages =
      "  - {use: ptq, layers: ['*', lm_head], options: {bits: 8, group_size: 64}}\n";
  const nlohmann::json native = Run("n", stages, "quantmill");
  EXPECT_THAT(native["unquantized"], Not(Contains("lm_head")));
  const std::vector<float> expected = Logits(Path("n.out"));
  for (const std::string target : {"gptq_v2", "compressed-tensors"}) {
    const nlohmann::json result = Run(target, stages, target);
    EXPECT_THAT(result["unquantized"], Not(Contains("lm_head"))) << target;
    EXPECT_THAT(result["checks"].dump(), HasSubstr("agree with the model in memory")) << target;
    const std::vector<float> read = Logits(Path(target + ".out"));
    // Scales of the same dtype as in the native format, or bf16.
    if (target == "gptq_v2") {
      EXPECT_LT(Difference(expected, read), 1e-5);
    }
    const auto written = SafetensorsFile::Open(Path(target + ".out/model.safetensors"));
    ASSERT_TRUE(written.ok()) << written.status();
    EXPECT_FALSE((*written)->Get("lm_head.weight").ok());
  }
}

TEST_F(ArchitectureTest, TiedHeadIsRefusedBeforeWork) {
  QM_SHARED_OR_SKIP(model, "models/arch/qwen2");
  model_ = model;
  for (const std::string target : {"gptq_v2", "compressed-tensors", "quantmill"}) {
    const ProgramResult result = RunPipeline(Pipeline(
        target, "  - {use: ptq, layers: ['*', lm_head], options: {group_size: 64}}\n", target));
    EXPECT_EQ(result.exit_code, 3) << target;
    EXPECT_THAT(result.err, AllOf(HasSubstr("lm_head"), HasSubstr("tie_word_embeddings")))
        << result.err;
  }
  const ProgramResult result = RunPipeline(Pipeline(
      "g", "  - {use: gptq, layers: [lm_head], options: {group_size: 64}}\n", "quantmill", kSelf));
  EXPECT_EQ(result.exit_code, 3) << result.err;
}

}  // namespace
}  // namespace quantmill::testing
