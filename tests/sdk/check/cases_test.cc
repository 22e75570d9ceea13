// Cases of transforms, reparametrizations, quantizers, kernels and formats on plugins that are
// right, and on plugins with one thing wrong: the right case must fail, for the right rule.
#include <memory>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "host/plugins/registry.h"
#include "host/worker/formats.h"
#include "sdk/check/case.h"
#include "tests/sdk/check/offences.h"

namespace quantmill::check {
namespace {

using ::testing::HasSubstr;

class CasesTest : public ::testing::Test {
 protected:
  void SetUp() override { host_ = *MakeCpuBackend(2); }

  // The verdict of one case on the only method of a plugin.
  Verdict Run(const std::string& file, const std::string& name) {
    const absl::StatusOr<std::vector<LoadedMethod>> methods = LoadPlugin(file);
    if (!methods.ok()) return Failed("", std::string(methods.status().message()));
    PluginFormats formats(*methods, *host_);
    Subject subject;
    subject.path = file;
    subject.plugin = methods->front().plugin;
    subject.method = methods->front().method;
    subject.backend = subject.host = host_.get();
    subject.formats = &formats;
    for (const Case& one : AllCases()) {
      if (one.name == name) return one.run(subject);
    }
    return Failed("", "there is no case " + name);
  }
  Verdict RunFake(const std::string& plugin, const std::string& name) {
    return Run(QM_CASE_PLUGIN_DIR "/libqm_" + plugin + ".so", name);
  }

  // Every quick case of a group: passed or skipped.
  void ExpectGood(const std::string& file, const std::string& group) {
    int seen = 0;
    for (const Case& one : AllCases()) {
      if (one.name.rfind(group + ".", 0) != 0 || one.slow) continue;
      const Verdict verdict = Run(file, one.name);
      EXPECT_TRUE(verdict.state == State::kPassed || verdict.state == State::kSkipped)
          << one.name << ": " << StateName(verdict.state) << ", " << verdict.text;
      ++seen;
    }
    EXPECT_GT(seen, 0);
  }

  std::unique_ptr<Backend> host_;
};

TEST_F(CasesTest, PluginsThatAreRightPass) {
  const std::string fakes = QM_CASE_PLUGIN_DIR "/libqm_";
  for (const char* plugin : {"transform_smooth", "transform_rotates"}) {
    SCOPED_TRACE(plugin);
    ExpectGood(fakes + plugin + ".so", "transform");
  }
  for (const char* group : {"abi", "options", "memory", "quantize", "kernel", "format"}) {
    ExpectGood(fakes + "rows_right.so", group);
  }
  ExpectGood(fakes + "tune_right.so", "tune");
  ExpectGood(fakes + "adapter_right.so", "adapter");
  ExpectGood(fakes + "adapter_right.so", "reparam");
  for (const char* plugin : {"reparam_low_rank", "reparam_gain", "reparam_weight_gain"}) {
    SCOPED_TRACE(plugin);
    ExpectGood(fakes + plugin + ".so", "reparam");
  }
}

TEST_F(CasesTest, BuiltInPluginsPass) {
  const std::string built_in = QM_PLUGIN_DIR "/libqm_";
  ExpectGood(built_in + "ptq.so", "quantize");
  ExpectGood(built_in + "gptq.so", "quantize");
  ExpectGood(built_in + "affine.so", "kernel");
  ExpectGood(built_in + "affine.so", "format");
}

TEST_F(CasesTest, FindWhatIsWrong) {
  for (const Offence& offence : kCallOffences) {
    SCOPED_TRACE(std::string(offence.plugin) + ", " + offence.name);
    const Verdict verdict = RunFake(offence.plugin, offence.name);
    EXPECT_EQ(StateName(verdict.state), StateName(offence.state)) << verdict.text;
    EXPECT_EQ(verdict.rule, offence.rule) << verdict.text;
    EXPECT_THAT(verdict.text, HasSubstr(offence.text));
  }
}

// What is wrong with one function leaves the cases of the others alone.
TEST_F(CasesTest, OnlyTheRightCaseFails) {
  EXPECT_EQ(RunFake("reparam_wrong_vjp", "reparam.finalize_agrees").state, State::kPassed);
  EXPECT_EQ(RunFake("reparam_wrong_finalize", "reparam.vjp_matches_differences").state,
            State::kPassed);
  EXPECT_EQ(RunFake("transform_clips_hard", "transform.edits_are_valid").state, State::kPassed);
}

}  // namespace
}  // namespace quantmill::check
