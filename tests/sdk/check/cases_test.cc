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

// A plugin with one thing wrong, the case that finds it, and what it says.
struct Offence {
  const char* plugin;
  const char* name;
  const char* rule;
  const char* text;
};

TEST_F(CasesTest, FindWhatIsWrong) {
  constexpr Offence kOffences[] = {
      {"transform_unknown_target", "transform.edits_are_valid", "QM-C-007", "no such site"},
      {"transform_zero_scale", "transform.edits_are_valid", "QM-C-007", "channel 3 is 0"},
      {"transform_shears", "transform.edits_are_valid", "QM-C-007", "not orthogonal"},
      {"transform_tiny_scale", "transform.preserving_edits_preserve", "QM-C-007", "output changed"},
      {"transform_clips_hard", "transform.loss_does_not_increase", "QM-C-007", "off by"},
      {"tune_alone", "tune.results_fit", "QM-C-012", "beside qm.quantize-linear/1"},
      {"tune_short", "tune.results_fit", "QM-C-012", "dtype and shape must stay"},
      {"tune_unknown_name", "tune.results_fit", "QM-C-012", "'scales'"},
      {"tune_nan", "tune.results_fit", "QM-P-010", "not in its format"},
      {"tune_edit_weight", "tune.results_fit", "QM-C-012", "no norm or bias"},
      {"tune_beyond", "tune.results_fit", "QM-C-012", "the block has 7 linears"},
      {"tune_worse", "tune.not_worse", "QM-C-012", "the tuned one by"},
      {"tune_all_packed", "tune.some_slots_dense", "QM-C-012", "left dense"},
      {"tune_restless", "tune.same_bytes_twice", "QM-P-011", "'scale' of item 0"},
      {"tune_stay", "tune.cancel", "QM-P-008", "QM_CANCELLED is expected"},
      {"tune_greedy", "tune.scratch_bound", "QM-P-015", "plan() said 1024"},
      {"tune_excuse", "tune.no_services", "QM-P-018", "the block's vjp"},
      {"reparam_not_identity", "reparam.identity_at_init", "QM-C-008", "NMSE 0.25"},
      {"reparam_impure", "reparam.pure", "QM-C-009", "other bytes"},
      {"reparam_needs_saved", "reparam.saved_within_bound", "QM-P-012", "no room"},
      {"reparam_saves_too_much", "reparam.saved_within_bound", "QM-P-014", "the saved bytes"},
      {"reparam_overwrites", "reparam.vjp_accumulates", "QM-C-009", "'gain' is overwritten"},
      {"reparam_wrong_vjp", "reparam.vjp_matches_differences", "QM-C-009", "'gain': vjp gives"},
      {"reparam_bad_name", "reparam.same_params_in_both_phases", "QM-C-013", "'gain.of.inputs'"},
      {"reparam_other_phase", "reparam.same_params_in_both_phases", "QM-C-013", "'factor'"},
      {"reparam_restless_init", "reparam.same_init_twice", "QM-P-011", "'gain'"},
      {"reparam_needs_weight", "reparam.over_packed_base", "QM-P-012", "no weight"},
      {"reparam_all_or_nothing", "reparam.unwanted_gradients", "QM-C-009", "not wanted"},
      {"adapter_forgets_alpha", "adapter.round_trip", "QM-C-014", "forward gives other bytes"},
      {"adapter_drops_alpha", "adapter.round_trip", "QM-C-014", "written again"},
      {"adapter_not_json", "adapter.round_trip", "QM-C-014", "no JSON object: alpha = 2"},
      {"adapter_no_type", "adapter.round_trip", "QM-C-014", "'peft_type'"},
      {"adapter_unknown_option", "adapter.round_trip", "QM-C-014", "'alfa'"},
      {"adapter_takes_broken", "adapter.refuses_foreign", "QM-C-014", "an error is expected"},
      {"adapter_takes_all", "adapter.refuses_foreign", "QM-C-014", "of another kind"},
      {"reparam_wrong_finalize", "reparam.finalize_agrees", "QM-C-010", "NMSE"},
  };
  for (const Offence& offence : kOffences) {
    SCOPED_TRACE(offence.plugin);
    const Verdict verdict = RunFake(offence.plugin, offence.name);
    EXPECT_EQ(verdict.state, State::kFailed) << verdict.text;
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
