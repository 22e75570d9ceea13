// Plugins of other releases, minors, compilers and languages in today's host: all of them round the
// rows of the quickstart model to 8 bits, which is computed again here; and what is said of plugins
// that cannot be used.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "core/io/safetensors_reader.h"
#include "gmock/gmock.h"
#include "tests/crash/run_fixture.h"
#include "tests/support/shared_data.h"

namespace quantmill::testing {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

std::string AbiPlugin(const std::string& name) {
  return std::string(QM_ABI_PLUGIN_DIR) + "/" + name + ".so";
}

class CompatTest : public RunFixture {
 protected:
  void SetUp() override {
    RunFixture::SetUp();
    const auto model = SafetensorsFile::Open(model_ + "/model.safetensors");
    ASSERT_TRUE(model.ok()) << model.status();
    original_ = *model;
  }

  // quantmill run of NAME.yaml with these plugins, then every listed slot is checked.
  void QuantizeAndCheck(const std::string& name, const std::string& stages,
                        const std::vector<std::string>& plugins, size_t slots) {
    std::vector<std::string> arguments = {"run", Pipeline(name, stages, "quantmill", kCalibration)};
    for (const std::string& plugin : plugins) {
      arguments.insert(arguments.end(), {"--plugin", plugin});
    }
    const ProgramResult result = Program(arguments);
    ASSERT_EQ(result.exit_code, 0) << result.err;
    EXPECT_EQ(CheckSlots(Path(name + ".out")), slots);
  }

  // Compares every packed slot with round(w / step), step = max |w| / 127; their number. Codes are
  // bytes with 128 added, or int8.
  size_t CheckSlots(const std::string& directory) {
    const auto packed = SafetensorsFile::Open(directory + "/model.safetensors");
    EXPECT_TRUE(packed.ok()) << packed.status();
    if (!packed.ok()) return 0;
    size_t slots = 0;
    for (const SafetensorsEntry& entry : (*packed)->entries()) {
      const std::string suffix = ".codes";
      const std::string name(entry.name);
      if (name.size() < suffix.size() || name.substr(name.size() - suffix.size()) != suffix) {
        continue;
      }
      const std::string slot = name.substr(0, name.size() - suffix.size());
      CheckSlot(slot, *original_->Get(slot + ".weight"), *(*packed)->Get(name),
                *(*packed)->Get(slot + ".scale"));
      ++slots;
    }
    return slots;
  }

  void CheckSlot(const std::string& slot, const Tensor& weight, const Tensor& codes,
                 const Tensor& scale) {
    ASSERT_EQ(weight.dtype(), DType::kBF16) << slot;
    const int64_t n = weight.shape()[0], k = weight.shape()[1];
    ASSERT_EQ(codes.shape()[0], n) << slot;
    const bool own = codes.dtype() == DType::kI8;
    ASSERT_EQ(codes.shape()[1], own ? k : k / 4) << slot;
    const auto* bits = static_cast<const uint16_t*>(weight.data());
    const auto* bytes = static_cast<const uint8_t*>(codes.data());
    const auto* steps = static_cast<const float*>(scale.data());
    for (int64_t i = 0; i < n; ++i) {
      const auto value = [&](int64_t j) {
        const uint32_t wide = uint32_t{bits[i * k + j]} << 16;
        float x;
        std::memcpy(&x, &wide, sizeof x);
        return x;
      };
      float top = 0;
      for (int64_t j = 0; j < k; ++j) top = std::max(top, std::fabs(value(j)));
      ASSERT_EQ(steps[i], top / 127.0f) << slot << " row " << i;
      for (int64_t j = 0; j < k; ++j) {
        const int code = own ? static_cast<int8_t>(bytes[i * k + j]) : bytes[i * k + j] - 128;
        ASSERT_EQ(code, std::lrint(value(j) / steps[i])) << slot << " row " << i << " column " << j;
      }
    }
  }

  // The sample's own format: what is stored, and that its kernel computes what the built-in one
  // does with the same codes.
  void CheckOwnFormat(const std::string& name, const std::string& plugin) {
    double perplexity[2] = {};
    for (const bool own : {false, true}) {
      const std::string run = name + (own ? "rows" : "affine");
      QuantizeAndCheck(run,
                       "  - {name: main, use: org.example.sample, options: {format: " +
                           std::string(own ? "rows" : "affine") + "}}\n",
                       {plugin}, 28);
      const ProgramResult result =
          Program({"eval", Path(run + ".out"), "--plugin", plugin, "--text", Path("calib.txt"),
                   "--context", "64", "--device", "cpu", "--json", "-"});
      ASSERT_EQ(result.exit_code, 0) << result.err;
      perplexity[own] = nlohmann::json::parse(result.out)["perplexity"];
    }
    EXPECT_GT(perplexity[0], 1);
    // The same products in another order of summation.
    EXPECT_NEAR(perplexity[1] / perplexity[0], 1, 1e-4);
  }

  // `quantmill plugins` where nothing is installed: only what is named is found.
  ProgramResult PluginsOfAnEmptyTree(const std::vector<std::string>& plugins,
                                     const std::vector<std::string>& environment = {}) {
    const fs::path program = Path("bin/quantmill");
    if (!fs::exists(program)) {
      fs::create_directories(program.parent_path());
      fs::copy_file(QM_PROGRAM, program);
    }
    std::string command = "QUANTMILL_PLUGIN_PATH= XDG_CACHE_HOME='" + Path("cache") + "' ";
    for (const std::string& setting : environment) command += setting + " ";
    command += "'" + program.string() + "' plugins";
    for (const std::string& plugin : plugins) command += " --plugin '" + plugin + "'";
    return Shell(command);
  }

  std::shared_ptr<const SafetensorsFile> original_;
};

// All 28 linears by the sample, asking for its statistic, with one group of stages as in any run.
constexpr char kSampleStage[] =
    "  - {name: main, use: org.example.sample, options: {statistics: true, note: hello}}\n";

TEST_F(CompatTest, TodaysSample) {
  QuantizeAndCheck("p", kSampleStage, {AbiPlugin("today/libqm_sample")}, 28);
}

TEST_F(CompatTest, TodaysSampleWithAFormatAndKernelOfItsOwn) {
  CheckOwnFormat("p", AbiPlugin("today/libqm_sample"));
}

TEST_F(CompatTest, EveryCapsule) {
  int capsules = 0;
  for (const auto& entry : fs::directory_iterator(SourcePath("tests/abi/released"))) {
    const std::string version = entry.path().filename().string();
    SCOPED_TRACE(version);
    QuantizeAndCheck("p" + version, kSampleStage,
                     {AbiPlugin("released/" + version + "/libqm_sample")}, 28);
    CheckOwnFormat(version, AbiPlugin("released/" + version + "/libqm_sample"));
    ++capsules;
  }
  EXPECT_GE(capsules, 1);
}

TEST_F(CompatTest, NewerPluginWithLongerStructs) {
  QuantizeAndCheck("p", kSampleStage, {AbiPlugin("newer/libqm_sample")}, 28);
}

TEST_F(CompatTest, OlderPluginWithAShorterTable) {
  QuantizeAndCheck("p", kSampleStage, {AbiPlugin("older/libqm_sample")}, 28);
}

TEST_F(CompatTest, PluginOfTheNextHeadersDoesWithoutWhatThisHostLacks) {
  QuantizeAndCheck("p", kSampleStage, {AbiPlugin("next/libqm_sample")}, 28);
}

TEST_F(CompatTest, PluginInNeedOfTheNextMinorIsRefused) {
  const std::string plugin = AbiPlugin("needs_newer/libqm_sample");
  const ProgramResult result =
      Program({"run", Pipeline("p", kSampleStage, "quantmill", kCalibration), "--plugin", plugin});
  EXPECT_EQ(result.exit_code, 3);
  EXPECT_THAT(result.err, AllOf(HasSubstr(plugin), HasSubstr("it needs ABI 1."),
                                HasSubstr("this host has 1."), HasSubstr("use a newer quantmill")));
}

struct Language {
  const char* name;
  const char* method;
  const char* layers;
  const char* compiler;  // where it is not always there
};
constexpr Language kLanguages[] = {
    {"../today/libqm_sample", "org.example.sample", "'*.self_attn.q_proj', '*.self_attn.k_proj'",
     "a C compiler"},
    {"libqm_rtn_cxx", "org.example.rtn-cxx", "'*.self_attn.v_proj', '*.self_attn.o_proj'",
     "a C++ compiler"},
    {"libqm_rtn_clang", "org.example.rtn-clang", "'*.mlp.gate_proj', '*.mlp.up_proj'", "clang++"},
    {"libqm_rtn_rust", "org.example.rtn-rust", "'*.mlp.down_proj'", "rustc"}};

std::string PluginOf(const Language& language) {
  return AbiPlugin(std::string("languages/") + language.name);
}

class LanguageTest : public CompatTest, public ::testing::WithParamInterface<Language> {};

TEST_P(LanguageTest, QuantizesEveryLinear) {
  const Language& language = GetParam();
  if (!fs::exists(PluginOf(language))) GTEST_SKIP() << language.compiler << " is not installed";
  QuantizeAndCheck("p", "  - {name: main, use: " + std::string(language.method) + "}\n",
                   {PluginOf(language)}, 28);
}

INSTANTIATE_TEST_SUITE_P(All, LanguageTest, ::testing::ValuesIn(kLanguages), [](const auto& info) {
  std::string name = info.param.method;
  name = name.substr(name.rfind('.') + 1);
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
});

TEST_F(CompatTest, AllLanguagesInOnePipeline) {
  std::string stages, rest;
  std::vector<std::string> plugins;
  for (const Language& language : kLanguages) {
    if (!fs::exists(PluginOf(language))) {
      rest += (rest.empty() ? "" : ", ") + std::string(language.layers);
      continue;
    }
    stages += "  - {name: s" + std::to_string(plugins.size()) + ", use: " + language.method +
              ", layers: [" + language.layers + "]}\n";
    plugins.push_back(PluginOf(language));
  }
  ASSERT_GE(plugins.size(), 2u);
  // What has no compiler here is left to the C sample.
  if (!rest.empty())
    stages += "  - {name: rest, use: org.example.sample, layers: [" + rest + "]}\n";
  QuantizeAndCheck("p", stages, plugins, 28);
}

TEST_F(CompatTest, EmptySearchSaysWhereItLooked) {
  const ProgramResult result = PluginsOfAnEmptyTree(
      {}, {"QUANTMILL_PLUGIN_PATH='" + Path("nowhere") + ":" + directory_ + "'"});
  EXPECT_EQ(result.exit_code, 0) << result.err;
  EXPECT_THAT(result.out, AllOf(HasSubstr("No plugins found."), HasSubstr("Searched:"),
                                HasSubstr(Path("nowhere") + " (does not exist)"),
                                HasSubstr("  " + directory_ + "\n"),
                                HasSubstr(Path("lib/quantmill/plugins") + " (does not exist)")));
}

TEST_F(CompatTest, PipelineWithoutPluginsSaysWhereItLooked) {
  PluginsOfAnEmptyTree({});
  const std::string pipeline = Pipeline("p", "  - {name: main, use: ptq}\n");
  const ProgramResult result = Shell("'" + Path("bin/quantmill") + "' plan '" + pipeline + "'");
  EXPECT_EQ(result.exit_code, 3);
  EXPECT_THAT(result.err, AllOf(HasSubstr("'ptq'"), HasSubstr(Path("lib/quantmill/plugins"))));
}

TEST_F(CompatTest, EveryRejectedFileIsListedWithItsReason) {
  std::vector<std::string> files;
  for (const auto& entry : fs::directory_iterator(QM_FAKE_PLUGIN_DIR)) {
    if (entry.path().extension() != ".so") continue;
    const std::string name = entry.path().stem().string();
    if (name != "libqm_good" && name != "libqm_hang_at_load") files.push_back(entry.path());
  }
  files.push_back(AbiPlugin("needs_newer/libqm_sample"));
  files.push_back(Path("libqm_text.so"));
  std::ofstream(files.back()) << "this is no shared object\n";
  ASSERT_GE(files.size(), 15u);
  const ProgramResult result = PluginsOfAnEmptyTree(files);
  EXPECT_EQ(result.exit_code, 0) << result.err;
  for (const std::string& file : files) {
    const std::string mark = "rejected " + fs::path(file).lexically_normal().string() + ": ";
    const size_t at = result.out.find(mark);
    ASSERT_NE(at, std::string::npos) << mark << "\n" << result.out;
    EXPECT_NE(result.out[at + mark.size()], '\n') << mark << " without a reason";
  }
  EXPECT_THAT(result.out, Not(HasSubstr(" ok\n")));
}

}  // namespace
}  // namespace quantmill::testing
