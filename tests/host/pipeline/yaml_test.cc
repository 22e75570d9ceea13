#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "host/pipeline/pipeline.h"

namespace quantmill {
namespace {

using ::testing::HasSubstr;

constexpr char kMinimal[] =
    "version: 1\n"
    "model: {path: m}\n"
    "stages: [{use: gptq}]\n"
    "export: {format: gptq, path: out/}\n";

std::string PipelineError(const std::string& text, const std::vector<std::string>& sets = {}) {
  const auto pipeline = ParsePipelineText(text, "p.yaml", sets);
  return pipeline.ok() ? "ok" : std::string(pipeline.status().message());
}

TEST(PipelineYamlTest, DefaultsAreThoseOfTheContract) {
  const auto p = ParsePipelineText(
      std::string(kMinimal) + "calibration: {text: c.txt}\n" + "evaluate: {text: /e.txt}\n",
      "/w/d/p.yaml");
  ASSERT_TRUE(p.ok()) << p.status();
  EXPECT_EQ(p->model_path, "/w/d/m");
  EXPECT_FALSE(p->model_dtype.has_value());
  EXPECT_EQ(p->calibration->text, "/w/d/c.txt");
  EXPECT_EQ(p->calibration->key, "text");
  EXPECT_EQ(p->calibration->samples, 128);
  EXPECT_EQ(p->calibration->sequence_length, 2048);
  EXPECT_EQ(p->calibration->join, "\n\n");
  EXPECT_FALSE(p->calibration->random_order);
  EXPECT_EQ(p->device, "auto");
  EXPECT_EQ(p->seed, 1u);
  EXPECT_TRUE(p->inputs_quantized);
  EXPECT_EQ(p->on_error.action, OnError::Action::kStop);
  ASSERT_EQ(p->stages.size(), 1u);
  EXPECT_EQ(p->stages[0].name, "gptq");
  EXPECT_THAT(p->stages[0].layers, ::testing::ElementsAre("*"));
  EXPECT_EQ(p->export_path, "/w/d/out");
  EXPECT_EQ(p->work_dir, "/w/d/out.work");
  EXPECT_EQ(p->tensor_parallel, 1);
  EXPECT_EQ(p->evaluate->text, "/e.txt");
  EXPECT_EQ(p->evaluate->context, 2048);
  EXPECT_TRUE(p->evaluate->reference);
  EXPECT_EQ(p->locations.at("export.format").ToString(), "/w/d/p.yaml:4:18");
}

TEST(PipelineYamlTest, ReadsEveryKey) {
  const auto p = ParsePipelineText(R"(version: 1
model: {path: m, dtype: bf16}
plugins: [a.so, /b.so]
calibration: {text: self, key: body, samples: 2, sequence_length: 16, join: "", order: random, seed: 5}
run:
  device: cuda:1
  seed: 7
  work_dir: w
  inputs: original
  on_error: keep-dense
  memory: {device: 6GiB, host: 500MB}
stages:
  - {use: awq.scale, layers: "*.mlp.*"}
  - use: gptq
    name: main
    options: {bits: 3, damp: 0.02, phases: [blocks, end_to_end]}
    layers: ["*", "lm_head"]
    overrides: [{layers: ["*.down_proj"], options: {bits: 8}}]
    on_error: {use: ptq, options: {bits: 8}}
    optional: true
    requantize: true
    train: {data: t.txt, steps: 10, lr: 1e-4, checkpointing: true}
  - use: gptq
  - use: org.example.fine
export: {format: gptq, path: /o, tensor_parallel: 2}
)",
                                   "/w/p.yaml");
  ASSERT_TRUE(p.ok()) << p.status();
  EXPECT_EQ(p->model_dtype, DType::kBF16);
  EXPECT_THAT(p->plugins, ::testing::ElementsAre("/w/a.so", "/b.so"));
  EXPECT_EQ(p->calibration->text, "self");
  EXPECT_TRUE(p->calibration->random_order);
  EXPECT_EQ(p->device_memory_limit, int64_t{6} << 30);
  EXPECT_EQ(p->host_memory_limit, 500000000);
  EXPECT_FALSE(p->inputs_quantized);
  EXPECT_EQ(p->stages[0].use, "awq.scale");
  EXPECT_EQ(p->stages[0].name, "awq.scale");
  EXPECT_EQ(p->stages[0].on_error.action, OnError::Action::kKeepDense);
  const Stage& main = p->stages[1];
  EXPECT_EQ(main.name, "main");
  EXPECT_EQ(main.options.at("bits").text, "3");
  EXPECT_EQ(main.options.at("bits").location.ToString(), "/w/p.yaml:16:21");
  EXPECT_EQ(main.options.at("phases").text, "blocks,end_to_end");
  EXPECT_EQ(main.overrides[0].options.at("bits").text, "8");
  EXPECT_EQ(main.on_error.use, "ptq");
  EXPECT_TRUE(main.optional && main.requantize);
  EXPECT_EQ(main.train["data"], "/w/t.txt");
  EXPECT_EQ(main.train["lr"], 1e-4);
  EXPECT_EQ(p->stages[2].name, "gptq");
  EXPECT_EQ(p->stages[3].use, "org.example.fine");
}

TEST(PipelineYamlTest, NamesAreMadeUnique) {
  const auto p = ParsePipelineText(
      "version: 1\nmodel: {path: m}\nstages: [{use: a}, {use: a}, {use: a, name: a-2}]\n"
      "export: {format: gptq, path: o}\n",
      "p.yaml");
  ASSERT_TRUE(p.ok()) << p.status();
  EXPECT_EQ(p->stages[0].name, "a");
  EXPECT_EQ(p->stages[1].name, "a-3");
}

TEST(PipelineYamlTest, SetChangesAndAdds) {
  const auto p =
      ParsePipelineText(kMinimal, "/w/p.yaml",
                        {"stages.0.options.bits=3", "stages.gptq.options.damp=0.1", "run.seed=9",
                         "model.path=/other", "stages.0.layers=[a, b]", "calibration.text=self"});
  ASSERT_TRUE(p.ok()) << p.status();
  EXPECT_EQ(p->stages[0].options.at("bits").text, "3");
  EXPECT_EQ(p->stages[0].options.at("damp").text, "0.1");
  EXPECT_EQ(p->seed, 9u);
  EXPECT_EQ(p->model_path, "/other");
  EXPECT_THAT(p->stages[0].layers, ::testing::ElementsAre("a", "b"));
  EXPECT_EQ(p->calibration->text, "self");
}

TEST(PipelineYamlTest, SetErrorsNameTheFlag) {
  EXPECT_THAT(PipelineError(kMinimal, {"run.sed=1"}),
              HasSubstr("--set run.sed=1: unknown key 'sed'"));
  EXPECT_THAT(PipelineError(kMinimal, {"run.seed=x"}), HasSubstr("--set run.seed=x: 'run.seed'"));
  EXPECT_THAT(PipelineError(kMinimal, {"seed"}), HasSubstr("write --set a.b=value"));
  EXPECT_THAT(PipelineError(kMinimal, {"=1"}), HasSubstr("write --set a.b=value"));
  EXPECT_THAT(PipelineError(kMinimal, {"run..seed=1"}), HasSubstr("an empty key"));
  EXPECT_THAT(PipelineError(kMinimal, {"stages.4.use=a"}), HasSubstr("there is no entry 4"));
  EXPECT_THAT(PipelineError(kMinimal, {"stages.foo.use=a"}), HasSubstr("no entry is named 'foo'"));
  EXPECT_THAT(PipelineError(kMinimal, {"version.x=1"}), HasSubstr("cannot be set inside '1'"));
  EXPECT_THAT(PipelineError(kMinimal, {"run={"}), HasSubstr("--set run={"));
}

TEST(PipelineYamlTest, AllErrorsAreReportedInFileOrder) {
  const std::string error = PipelineError(
      "version: 2\n"
      "model: {pth: m}\n"
      "stages: [{use: gptq, optinal: true}]\n"
      "export: {format: gptq, path: o, tensor_parallel: 0}\n");
  EXPECT_EQ(error,
            "p.yaml:1:10: unknown version; this quantmill reads version 1\n"
            "p.yaml:2:8: 'model.path' is missing; name the checkpoint's directory\n"
            "p.yaml:2:9: unknown key 'pth' in 'model'; did you mean 'path'?\n"
            "p.yaml:3:22: unknown key 'optinal' in 'stages.0'; did you mean 'optional'?\n"
            "p.yaml:4:50: 'export.tensor_parallel' must be in 1 .. 1024, not 0");
}

TEST(PipelineYamlTest, HostileInputIsRefusedQuickly) {
  EXPECT_THAT(PipelineError(""), HasSubstr("is empty"));
  EXPECT_THAT(PipelineError(std::string(2 << 20, ' ')), HasSubstr("the limit is"));
  EXPECT_THAT(PipelineError(std::string("a\0b", 3)), HasSubstr("NUL"));
  EXPECT_NE(PipelineError(std::string(100000, '[')), "ok");
  EXPECT_NE(PipelineError(std::string(100000, '{')), "ok");
  EXPECT_THAT(PipelineError("a: " + std::string(40, '[') + std::string(40, ']')),
              HasSubstr("nested"));
  std::string bomb = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n";
  for (int i = 1; i < 12; ++i) {
    const std::string last = "*a" + std::to_string(i - 1);
    bomb += "a" + std::to_string(i) + ": &a" + std::to_string(i) + " [" + last;
    for (int j = 0; j < 9; ++j) bomb += "," + last;
    bomb += "]\n";
  }
  EXPECT_THAT(PipelineError(bomb), HasSubstr("values"));
  EXPECT_THAT(PipelineError("a: 1\n---\nb: 2\n"), HasSubstr("second document"));
  // yaml-cpp finds an endless row of empty documents in these.
  EXPECT_THAT(PipelineError(",a: 1\n"), HasSubstr("p.yaml:1:1: this is not the beginning"));
  EXPECT_THAT(PipelineError("\n  , b\n"), HasSubstr("p.yaml:2:3: this is not the beginning"));
  EXPECT_THAT(PipelineError("version: 1\nstages: [{train: {steps: \xb8}}]\n"),
              HasSubstr("p.yaml:2:26: this is no UTF-8 text"));
  EXPECT_THAT(PipelineError("a: \"\\ud800\"\n"), HasSubstr("p.yaml:1:"));
  EXPECT_THAT(PipelineError("- 1\n- 2\n"), HasSubstr("must be a map"));
  EXPECT_THAT(PipelineError("? [a]\n: 1\n"), HasSubstr("a key must be a plain word"));
  EXPECT_THAT(PipelineError("a: *nobody\n"), HasSubstr("p.yaml:1:"));
  EXPECT_THAT(PipelineError("a: 'x\n"), HasSubstr("p.yaml:"));
  EXPECT_THAT(PipelineError("\t: 1\n"), HasSubstr("p.yaml:"));
}

TEST(PipelineYamlTest, MissingFile) {
  EXPECT_EQ(ParsePipelineFile("/nonexistent/p.yaml").status().code(), absl::StatusCode::kNotFound);
}

}  // namespace
}  // namespace quantmill
