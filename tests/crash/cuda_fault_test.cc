// A kernel of a plugin that writes to an illegal address: the call is named, another process goes
// on with what is finished, and on_error decides about the layer.
#include <filesystem>
#include <fstream>

#include "core/tensor/backend.h"
#include "gmock/gmock.h"
#include "tests/crash/run_fixture.h"

namespace quantmill::testing {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr char kLoss[] =
    "plugin org.example.cuda-offender 0.1.0 left the GPU unusable (sticky CUDA error) in "
    "quantize-linear.run on model.layers.1.mlp.down_proj";

class CudaFaultTest : public RunFixture {
 protected:
  void SetUp() override {
    const auto made = MakeCudaBackend(0, DType::kF32);
    if (!made.ok()) GTEST_SKIP() << made.status().message();
    RunFixture::SetUp();
  }
  ProgramResult RunWith(const std::string& name, const std::string& on_error) {
    const std::string stage =
        "  - {name: main, use: org.example.cuda-offender, on_error: " + on_error +
        ", overrides: [{layers: ['" + std::string(kBadLayer) + "'], options: {fault: true}}]}\n";
    return RunPipeline(Pipeline(name, stage),
                       {"--device", "cuda:0", "--json", Path(name + ".json")});
  }
  nlohmann::json ReadJson(const std::string& name) {
    std::ifstream file(Path(name));
    return nlohmann::json::parse(file, nullptr, false);
  }
};

TEST_F(CudaFaultTest, StopNamesTheCallAndKeepsTheRest) {
  const ProgramResult result = RunWith("p", "stop");
  EXPECT_EQ(result.exit_code, 1);
  EXPECT_THAT(result.err, AllOf(HasSubstr(kLoss), HasSubstr("retrying once"), HasSubstr("twice"),
                                HasSubstr("1 finished units are kept")));
  const std::string hint = "quantmill replay ";
  const size_t at = result.err.find(hint);
  ASSERT_NE(at, std::string::npos) << result.err;
  std::string bundle = result.err.substr(at + hint.size());
  bundle = bundle.substr(0, bundle.find_first_of(" \n"));
  const ProgramResult replay = Program({"replay", bundle});
  EXPECT_EQ(replay.exit_code, 1) << replay.err;
  EXPECT_THAT(replay.out,
              AllOf(HasSubstr("device   cuda:0"), HasSubstr("crashed: left the GPU unusable")));
  const ProgramResult in_process = Program({"replay", bundle, "--in-process"});
  EXPECT_EQ(in_process.exit_code, 1) << in_process.err;
  EXPECT_THAT(in_process.out, HasSubstr("crashed: the device is lost"));
}

TEST_F(CudaFaultTest, KeepDenseGoesOn) {
  const ProgramResult result = RunWith("p", "keep-dense");
  ASSERT_EQ(result.exit_code, 0) << result.err;
  EXPECT_THAT(result.err, AllOf(HasSubstr(kLoss), HasSubstr("stays dense")));
  EXPECT_THAT(ReadJson("p.json")["unquantized"].dump(), HasSubstr(kBadLayer));
}

TEST_F(CudaFaultTest, UseGoesOnWithTheOtherMethod) {
  const ProgramResult result = RunWith("p", "{use: ptq, options: {bits: 8}}");
  ASSERT_EQ(result.exit_code, 0) << result.err;
  EXPECT_THAT(result.err, AllOf(HasSubstr(kLoss), HasSubstr("goes to ptq")));
  const auto slots =
      nlohmann::json::parse(Tree(Path("p.out"))["quantmill_provenance.json"])["slots"];
  EXPECT_THAT(slots[kBadLayer].dump(), HasSubstr("\"ptq\""));
}

TEST_F(CudaFaultTest, TryReportsItAndGoesOnWithTheOthers) {
  const ProgramResult result =
      Program({"try", Offender(), "--option", "fault=true", "--device", "cuda:0", "--shape",
               "32x64", "--beside", "ptq", "--json", Path("t.json")});
  EXPECT_EQ(result.exit_code, 1) << result.err;
  for (const auto& row : ReadJson("t.json")["rows"]) {
    const bool bad = row["method"] == "org.example.cuda-offender";
    EXPECT_EQ(row["outcome"], bad ? "crashed" : "ok") << row;
    if (bad) {
      EXPECT_THAT(row["text"].get<std::string>(),
                  HasSubstr("left the GPU unusable (sticky CUDA error) in quantize-linear.run"));
    }
  }
}

}  // namespace
}  // namespace quantmill::testing
