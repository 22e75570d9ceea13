// What a valid pipeline resolves to, and the checks that need files or plans. Errors of the
// checker itself: tests/pipeline/*.yaml.
#include "host/pipeline/check.h"

#include <filesystem>

#include "core/io/files.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/host/pipeline/fixture.h"
#include "tests/support/shared_data.h"

namespace quantmill {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

absl::StatusOr<PipelinePlan> Check(const std::string& stages,
                                   const std::string& format = "quantmill") {
  const auto pipeline = ParsePipelineText("version: 1\nmodel: {path: m}\nstages: " + stages +
                                              "\nexport: {format: " + format + ", path: o}\n",
                                          "/p.yaml");
  if (!pipeline.ok()) return pipeline.status();
  return CheckPipeline(*pipeline, testing::FakeCatalog(), testing::FakeModel());
}

TEST(CheckPipelineTest, ResolvesSlotsAndOptions) {
  const auto plan = Check(
      "[{use: gptq, options: {bits: 3, damp: 0.5}, overrides: [{layers: ['*.down_proj'], options: "
      "{bits: 8}}, {layers: ['*.0.*'], options: {bits: 2}}]}]");
  ASSERT_TRUE(plan.ok()) << plan.status();
  ASSERT_EQ(plan->slots.size(), 14u);
  ASSERT_EQ(plan->stages.size(), 1u);
  const PlannedStage& stage = plan->stages[0];
  EXPECT_TRUE(stage.packs);
  EXPECT_THAT(stage.tables, ElementsAre(QM_EXT_QUANTIZE_LINEAR));
  ASSERT_EQ(stage.slots.size(), 14u);
  for (size_t i = 0; i < 14; ++i) {
    const std::string& name = plan->slots[static_cast<size_t>(stage.slots[i])].name;
    const bool down = name.find("down_proj") != std::string::npos;
    const bool first = name.find("layers.0.") != std::string::npos;
    // The first override that matches wins.
    EXPECT_EQ(stage.options[i].at("bits"), down ? "8" : first ? "2" : "3") << name;
    EXPECT_EQ(stage.options[i].at("damp"), "0.5");
    EXPECT_EQ(stage.options[i].at("group_size"), "128");
    EXPECT_EQ(stage.options[i].at("symmetric"), "false");
    EXPECT_EQ(plan->packed_by[i], 0);
  }
}

TEST(CheckPipelineTest, TransformThenQuantize) {
  const auto plan = Check("[{use: awq.scale, layers: ['*.mlp.*']}, {use: gptq}]");
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_FALSE(plan->stages[0].packs);
  EXPECT_EQ(plan->stages[0].slots.size(), 6u);
  EXPECT_THAT(plan->stages[0].tables, ElementsAre(QM_EXT_BLOCK_TRANSFORM));
  EXPECT_THAT(plan->packed_by, ::testing::Each(1));
}

TEST(CheckPipelineTest, PlainNameRunsEveryTable) {
  const auto plan = Check("[{use: awq}]");
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_THAT(plan->stages[0].tables, ElementsAre(QM_EXT_BLOCK_TRANSFORM, QM_EXT_QUANTIZE_LINEAR));
}

TEST(CheckPipelineTest, RequantizeLetsTheLastStageWin) {
  const auto plan = Check("[{use: gptq}, {use: ptq, layers: ['*.o_proj'], requantize: true}]");
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->packed_by[3], 1);  // o_proj
  EXPECT_EQ(plan->packed_by[0], 0);
}

TEST(CheckPipelineTest, HeadTakesPartOnlyWhenNamed) {
  EXPECT_EQ(Check("[{use: gptq}]")->slots.size(), 14u);
  const auto plan = Check("[{use: gptq, layers: ['*', lm_head]}]");
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->slots.size(), 15u);
  EXPECT_EQ(plan->slots.back().name, "lm_head");
  EXPECT_EQ(plan->stages[0].slots.size(), 15u);
}

TEST(CheckPipelineTest, OptionalStageMayMatchNothing) {
  const auto plan = Check("[{use: gptq}, {use: ptq, layers: ['*.experts.*'], optional: true}]");
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_TRUE(plan->stages[1].slots.empty());
}

TEST(CheckPipelineTest, FallbackOptionsAreResolved) {
  const auto plan = Check("[{use: gptq, on_error: {use: ptq, options: {bits: 8}}}]");
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->stages[0].fallback_options.at("bits"), "8");
  EXPECT_EQ(plan->stages[0].fallback_options.at("variant"), "rtn");
}

TEST(CheckPipelineTest, EmptyCatalogSaysWhereItLooked) {
  const auto pipeline = ParsePipelineText(
      "version: 1\nmodel: {path: m}\nstages: [{use: gptq}]\nexport: {format: dense, path: o}\n",
      "/p.yaml");
  Catalog catalog;
  catalog.searched = {"/nowhere"};
  EXPECT_THAT(CheckPipeline(*pipeline, catalog, testing::FakeModel()).status().message(),
              HasSubstr("no plugins were found in /nowhere"));
  PluginInfo broken;
  broken.path = "/nowhere/libqm_gptq.so";
  broken.rejected = "manifest is stale";
  catalog.plugins.push_back(broken);
  EXPECT_THAT(CheckPipeline(*pipeline, catalog, testing::FakeModel()).status().message(),
              HasSubstr("/nowhere/libqm_gptq.so was rejected: manifest is stale"));
}

TEST(CheckCalibrationTest, NamesTheStageThatNeedsData) {
  const auto plan = Check("[{use: gptq}]");
  SlotEstimate estimate;
  EXPECT_TRUE(CheckCalibration(*plan, {estimate}).ok());
  estimate.statistics = {"hessian"};
  EXPECT_THAT(std::string(CheckCalibration(*plan, {estimate, estimate}).message()),
              ::testing::StartsWith("/p.yaml:3:10: stage 'gptq' (gptq) needs calibration data for "
                                    "hessian; add calibration: {text: FILE}"));
}

TEST(CheckExportFormatsTest, TargetMustHoldTheFormat) {
  const auto plan = Check("[{use: gptq}]", "gptq");
  ASSERT_TRUE(plan.ok()) << plan.status();
  const Catalog catalog = testing::FakeCatalog();
  SlotEstimate estimate;
  estimate.format_id = "qm.fmt.affine-int/1";
  EXPECT_TRUE(CheckExportFormats(*plan, {estimate}, catalog).ok());
  estimate.format_id = "qm.fmt.codebook/1";
  EXPECT_EQ(CheckExportFormats(*plan, {estimate}, catalog).message(),
            "/p.yaml:4:18: gptq cannot hold qm.fmt.codebook/1, which stage 'gptq' makes of "
            "model.layers.0.self_attn.q_proj; export to quantmill, dense");
}

TEST(CheckFilesTest, EveryPathIsChecked) {
  const std::string folder = testing::MakeTempDir();
  std::filesystem::create_directory(folder + "/m");
  std::filesystem::create_directory(folder + "/exists");
  const auto pipeline = ParsePipelineText(
      "version: 1\nmodel: {path: m}\ncalibration: {text: no.txt}\nstages: [{use: gptq}]\n"
      "export: {format: gptq, path: exists}\nevaluate: {text: m}\n",
      folder + "/p.yaml");
  ASSERT_TRUE(pipeline.ok()) << pipeline.status();
  const std::string text(CheckFiles(*pipeline, false).message());
  EXPECT_THAT(text, HasSubstr("p.yaml:2:15: 'model.path' holds no config.json"));
  EXPECT_THAT(text, HasSubstr("p.yaml:3:21: 'calibration.text' does not exist"));
  EXPECT_THAT(text, HasSubstr("p.yaml:5:30: 'export.path' exists already"));
  EXPECT_THAT(text, HasSubstr("p.yaml:6:18: 'evaluate.text' is a directory"));
  EXPECT_THAT(std::string(CheckFiles(*pipeline, true).message()),
              ::testing::Not(HasSubstr("exists already")));
}

TEST(CheckFilesTest, OutputMayNotHoldTheModel) {
  const std::string folder = testing::MakeTempDir();
  std::filesystem::create_directory(folder + "/m");
  ASSERT_TRUE(WriteFile(folder + "/m/config.json", "{}").ok());
  auto pipeline = ParsePipelineText(
      "version: 1\nmodel: {path: m}\nstages: [{use: gptq}]\nexport: {format: gptq, path: .}\n",
      folder + "/p.yaml");
  ASSERT_TRUE(pipeline.ok());
  EXPECT_THAT(CheckFiles(*pipeline, true).message(), HasSubstr("holds the model"));
  pipeline->export_path = folder + "/new/out";
  pipeline->work_dir = folder + "/new/work";
  EXPECT_TRUE(CheckFiles(*pipeline, false).ok()) << CheckFiles(*pipeline, false);
}

TEST(FormatPlanTest, GroupsSlotsOfOneRole) {
  const auto plan =
      Check("[{use: gptq, overrides: [{layers: ['*.down_proj'], options: {bits: 8}}]}]");
  ASSERT_TRUE(plan.ok()) << plan.status();
  PlanReport report;
  for (int slot = 0; slot < 14; ++slot) {
    SlotEstimate estimate;
    estimate.slot = slot;
    estimate.format_id = "qm.fmt.affine-int/1";
    estimate.bits_per_weight = slot % 7 == 6 ? 8.25 : 4.25;
    estimate.statistics = {"hessian"};
    report.slots.push_back(estimate);
  }
  report.warnings = {"slow"};
  const nlohmann::ordered_json json = PlanToJson(*plan, report);
  ASSERT_EQ(json["rows"].size(), 7u);  // one per role
  EXPECT_EQ(json["rows"][6]["layers"], "mlp.down");
  EXPECT_EQ(json["rows"][6]["count"], 2);
  EXPECT_EQ(json["rows"][6]["bits_per_weight"], 8.25);
  EXPECT_EQ(json["packed_layers"], 14);
  const std::string text = FormatPlan(*plan, report);
  EXPECT_THAT(text, HasSubstr("bits=8 group_size=128"));
  EXPECT_THAT(text, HasSubstr("affine-int/1"));
  EXPECT_THAT(text, HasSubstr("warning: slow"));
}

}  // namespace
}  // namespace quantmill
