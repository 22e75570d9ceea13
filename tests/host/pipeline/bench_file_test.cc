#include "host/pipeline/bench_file.h"

#include <string>

#include "core/io/files.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/shared_data.h"

namespace quantmill {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr char kHead[] =
    "version: 1\n"
    "models: [{name: a, path: m}, {name: b, path: /n, dtype: f32}]\n"
    "evaluate: {text: e.txt, context: 64}\n";
constexpr char kRows[] = "rows: [{name: rtn, stages: [{use: ptq}]}]\n";

std::string BenchError(const std::string& text, const std::string& device = "") {
  const auto bench = ParseBenchText(text, "b.yaml", "/out", device);
  return bench.ok() ? "ok" : std::string(bench.status().message());
}

TEST(BenchFileTest, EveryRowOnEveryModelIsAPipeline) {
  const std::string text = std::string(kHead) +
                           "plugins: [p.so]\n"
                           "calibration: {text: c.txt, samples: 4}\n"
                           "run: {seed: 7, device: cpu}\n"
                           "rows:\n"
                           "  - {name: base}\n"
                           "  - name: g\n"
                           "    stages: [{use: gptq, options: {bits: 3}}]\n"
                           "    export: {format: gptq, tensor_parallel: 2}\n"
                           "speed: {prompt: 8, new_tokens: 4, batch: [1, 4]}\n";
  const auto bench = ParseBenchText(text, "/w/b.yaml", "/out");
  ASSERT_TRUE(bench.ok()) << bench.status();
  EXPECT_THAT(bench->rows, ElementsAre("base", "g"));
  ASSERT_EQ(bench->cells.size(), 4u);
  EXPECT_TRUE(bench->cells[0].baseline);
  EXPECT_EQ(bench->cells[0].pipeline.evaluate->text, "/w/e.txt");
  const BenchCell& cell = bench->cells[3];
  EXPECT_EQ(cell.model, "b");
  EXPECT_EQ(cell.row, "g");
  EXPECT_FALSE(cell.baseline);
  EXPECT_EQ(BenchCellPath("/out", cell), "/out/cells/b/g");
  EXPECT_EQ(cell.pipeline.model_path, "/n");
  EXPECT_EQ(cell.pipeline.model_dtype, DType::kF32);
  EXPECT_FALSE(bench->cells[1].pipeline.model_dtype.has_value());
  EXPECT_EQ(bench->cells[1].pipeline.model_path, "/w/m");
  EXPECT_EQ(cell.pipeline.seed, 7u);
  EXPECT_EQ(cell.pipeline.device, "cpu");
  EXPECT_EQ(cell.pipeline.calibration->samples, 4);
  EXPECT_EQ(cell.pipeline.export_format, "gptq");
  EXPECT_EQ(cell.pipeline.tensor_parallel, 2);
  EXPECT_EQ(cell.pipeline.export_path, "/out/cells/b/g/out");
  EXPECT_EQ(cell.pipeline.work_dir, "/out/cells/b/g/work");
  EXPECT_EQ(cell.pipeline.stages[0].location.line, 10);
  ASSERT_TRUE(bench->speed.has_value());
  EXPECT_EQ(bench->speed->prompt, 8);
  EXPECT_THAT(bench->speed->batch, ElementsAre(1, 4));
  // The file that is written for the cell says the same wherever it lies.
  const auto again = ParsePipelineText(cell.tree.dump(2), "/elsewhere/p.yaml");
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(again->model_path, "/n");
  EXPECT_EQ(again->calibration->text, "/w/c.txt");
  EXPECT_EQ(again->evaluate->text, "/w/e.txt");
  EXPECT_THAT(again->plugins, ElementsAre("/w/p.so"));
  EXPECT_EQ(again->stages[0].options.at("bits").text, "3");
  EXPECT_EQ(again->export_path, "/out/cells/b/g/out");
  EXPECT_EQ(again->work_dir, "/out/cells/b/g/work");
}

TEST(BenchFileTest, TheOriginalIsAlwaysThere) {
  const auto bench = ParseBenchText(std::string(kHead) + kRows, "b.yaml", "/out", "cuda:1");
  ASSERT_TRUE(bench.ok()) << bench.status();
  EXPECT_THAT(bench->rows, ElementsAre("original", "rtn"));
  EXPECT_TRUE(bench->cells[0].baseline);
  EXPECT_EQ(bench->cells[1].pipeline.export_format, "quantmill");
  EXPECT_EQ(bench->cells[0].pipeline.device, "cuda:1");
  EXPECT_EQ(bench->cells[1].pipeline.device, "cuda:1");
  EXPECT_FALSE(bench->speed.has_value());
}

TEST(BenchFileTest, MistakesHaveTheirPlaces) {
  const std::string head = kHead, rows = kRows;
  EXPECT_THAT(BenchError(head), HasSubstr("b.yaml:1:1: 'rows' is missing"));
  EXPECT_THAT(BenchError("version: 1\n" + rows), HasSubstr("'models' is missing"));
  EXPECT_THAT(BenchError("version: 1\nmodels: [{name: a, path: m}]\n" + rows),
              HasSubstr("'evaluate' is missing"));
  EXPECT_THAT(BenchError("version: 2\n" + head.substr(11) + rows),
              HasSubstr("b.yaml:1:10: unknown"));
  EXPECT_THAT(BenchError(head + rows + "sped: {}\n"),
              HasSubstr("b.yaml:5:1: unknown key 'sped'; did you mean 'speed'?"));
  EXPECT_THAT(BenchError(head + "rows: [{name: a, stage: [{use: ptq}]}]\n"),
              HasSubstr("b.yaml:4:18: unknown key 'stage' in 'rows.0'; did you mean 'stages'?"));
  EXPECT_THAT(BenchError(head + "rows: [{name: a, stages: [{usee: ptq}]}]\n"),
              HasSubstr("b.yaml:4:28: unknown key 'usee'"));
  EXPECT_THAT(BenchError(head + "rows: [{name: a, stages: []}]\n"),
              HasSubstr("b.yaml:4:26: 'stages'"));
  EXPECT_THAT(BenchError(head + "rows: [{name: a, stages: [{use: ptq}], export: {path: x}}]\n"),
              HasSubstr("unknown key 'path' in 'rows.0.export'"));
  EXPECT_THAT(BenchError(head + "rows: [{name: a, export: {format: gptq}}]\n"),
              HasSubstr("has nothing to export"));
  EXPECT_THAT(BenchError(head + "rows: [{name: a}, {name: b}]\n"),
              HasSubstr("both have no stages"));
  EXPECT_THAT(BenchError(head + "rows: [{name: a}, {name: a, stages: [{use: ptq}]}]\n"),
              HasSubstr("b.yaml:4:19: two rows are named 'a'"));
  EXPECT_THAT(BenchError(head + "rows: [{name: original, stages: [{use: ptq}]}]\n"),
              HasSubstr("'original' has stages"));
  for (const char* name : {"../x", ".", "a b", "''"}) {
    EXPECT_THAT(BenchError(head + "rows: [{name: " + name + ", stages: [{use: ptq}]}]\n"),
                HasSubstr("must be 1 to 64 letters"))
        << name;
  }
  EXPECT_THAT(BenchError("version: 1\nmodels: [{name: a, path: m}, {name: a, path: n}]\n" +
                         head.substr(head.find("evaluate")) + rows),
              HasSubstr("two models are named 'a'"));
  EXPECT_THAT(BenchError(head + rows + "run: {work_dir: w}\n"),
              HasSubstr("unknown key 'work_dir'"));
  EXPECT_THAT(BenchError(head + rows + "speed: {batch: [0]}\n"),
              HasSubstr("b.yaml:5:17: 'speed.batch'"));
  EXPECT_THAT(BenchError(head + rows + "speed: {batch: [2, 2]}\n"), HasSubstr("lists 2 twice"));
  EXPECT_THAT(BenchError(head + rows + "speed: {new_tokens: 1}\n"),
              HasSubstr("'speed.new_tokens'"));
  EXPECT_THAT(BenchError("- a\n"), HasSubstr("the bench must be a map"));
  // A mistake in what the cells share is said once.
  const std::string shared = BenchError(head + rows + "calibration: {text: self, sample: 4}\n");
  EXPECT_THAT(shared, HasSubstr("unknown key 'sample' in 'calibration'"));
  EXPECT_THAT(shared, Not(HasSubstr("\n")));
}

TEST(BenchFileTest, TheBenchesOfTheTreeAreRead) {
  const std::string path = testing::SourcePath("configs/bench/quickstart.yaml");
  const auto bench = ParseBenchFile(path, "/out");
  ASSERT_TRUE(bench.ok()) << bench.status();
  EXPECT_GE(bench->rows.size(), 8u);
}

}  // namespace
}  // namespace quantmill
