// Adapters: trained over a quantized model, written in PEFT's files, merged, and run again.
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>

#include "core/io/safetensors_reader.h"
#include "core/io/safetensors_writer.h"
#include "gmock/gmock.h"
#include "tests/crash/run_fixture.h"

namespace quantmill::testing {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

namespace fs = std::filesystem;

constexpr char kPtq[] = "  - {use: ptq, options: {bits: 4, group_size: 64}}\n";

std::string Oftq(const std::string& options = "", const std::string& train = "", int steps = 8) {
  return "  - {use: oftq, options: {" + options +
         "}, train: {data: calib.txt, batch: 2, sequence_length: 64, lr: 1e-3, steps: " +
         std::to_string(steps) + train + "}}\n";
}

class AdapterTest : public RunFixture {
 protected:
  nlohmann::json Json(const std::string& name) {
    std::ifstream file(Path(name));
    return nlohmann::json::parse(file, nullptr, false);
  }
  void Train(const std::string& name, const std::string& stages, const std::string& format) {
    const ProgramResult result = RunPipeline(Pipeline(name, stages, format, kShortEvaluate),
                                             {"--json", Path(name + ".json")});
    ASSERT_EQ(result.exit_code, 0) << result.err;
  }
  ProgramResult Eval(const std::string& model, const std::vector<std::string>& more) {
    std::vector<std::string> arguments = {
        "eval",      model, "--reference", model_, "--text", Path("calib.txt"), "--context", "64",
        "--windows", "8",   "--device",    "cpu",  "--json", Path("eval.json")};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return Program(arguments);
  }
  nlohmann::json Scores(const std::string& model, const std::string& adapter) {
    const ProgramResult result =
        Eval(model, adapter.empty() ? std::vector<std::string>{}
                                    : std::vector<std::string>{"--adapter", adapter});
    EXPECT_EQ(result.exit_code, 0) << result.err;
    return result.exit_code == 0 ? Json("eval.json") : nlohmann::json({{"kl_mean", -1}});
  }
  void ExpectRefused(const std::string& adapter, const std::vector<std::string>& texts) {
    const ProgramResult result = Eval(model_, {"--adapter", adapter});
    EXPECT_THAT(result.exit_code, ::testing::AnyOf(1, 2, 3)) << result.err;
    EXPECT_THAT(result.err, HasSubstr("error: "));
    for (const std::string& text : texts) EXPECT_THAT(result.err, HasSubstr(text));
  }
  void EditConfig(const std::string& adapter, const std::function<void(nlohmann::json&)>& edit) {
    nlohmann::json config = Json(adapter + "/adapter_config.json");
    edit(config);
    std::ofstream(Path(adapter + "/adapter_config.json")) << config.dump();
  }
};

// What a plan says of memory must hold, beside what all adapters cost alike: the bytes that a
// method saves and the inputs that rotations keep, of one block where blocks run again on the way
// back, and the gradients on their way through an adapter.
TEST_F(AdapterTest, PlansCountWhatIsKeptBesideATape) {
  constexpr double kRows = 512 * 256, kBlocks = 4, kLinears = 7;  // of a micro-batch; of the model
  constexpr double kInputs = 6 * 128 + 384, kWidest = 384;        // features of a block's linears
  const auto planned = [&](const std::string& name, const std::string& options,
                           const std::string& train) {
    const std::string stage =
        "  - {use: oftq, options: {" + options +
        "}, train: {data: calib.txt, batch: 512, sequence_length: 256, steps: 1" + train + "}}\n";
    const ProgramResult result =
        Program({"plan", Pipeline(name, kPtq + stage), "--json", Path(name + ".json")});
    EXPECT_EQ(result.exit_code, 0) << result.err;
    return result.exit_code == 0 ? Json(name + ".json")["peak_host_bytes"].get<double>() : 0.0;
  };
  const double few = planned("few", "method: lora, rank: 8", "");
  const double many = planned("many", "method: lora, rank: 40", "");
  const double saved = kRows * 32 * 4 * kLinears;  // one f32 per row and rank
  EXPECT_NEAR(many - few, saved, 0.15 * saved);    // parameters and the program's own memory
  const double few_kept = planned("few_kept", "method: lora, rank: 8", ", checkpointing: false");
  const double many_kept = planned("many_kept", "method: lora, rank: 40", ", checkpointing: false");
  EXPECT_NEAR(many_kept - few_kept, kBlocks * saved, 0.15 * saved);
  const double turned = kRows * 4 * (kInputs + kWidest) - kRows * 8 * 4 * kLinears;
  EXPECT_NEAR(planned("oft", "method: oft", "") - few, turned, 0.05 * turned);
}

TEST_F(AdapterTest, LiesBesideTheOutputAndRunsOverIt) {
  Train("p", std::string(kPtq) + Oftq(), "gptq_v2");
  const nlohmann::json own = Json("p.json")["evaluation"];
  const nlohmann::json with = Scores(Path("p.out"), Path("p.out/adapter"));
  EXPECT_EQ(with["kl_mean"], own["kl_mean"]);
  EXPECT_EQ(with["perplexity"], own["perplexity"]);
  EXPECT_LT(with["kl_mean"], Scores(Path("p.out"), "")["kl_mean"]);
  EXPECT_EQ(Json("p.out/adapter/adapter_config.json")["peft_type"], "OFT");
  EXPECT_EQ(Json("p.json")["adapters"], nlohmann::json::array({Path("p.out/adapter")}));
  // The model under it is what the first stage makes alone.
  ASSERT_EQ(RunPipeline(Pipeline("q", kPtq, "gptq_v2")).exit_code, 0);
  EXPECT_EQ(Tree(Path("p.out"))["model.safetensors"], Tree(Path("q.out"))["model.safetensors"]);
  // And twice the same.
  Train("r", std::string(kPtq) + Oftq(), "gptq_v2");
  EXPECT_EQ(Tree(Path("p.out/adapter")), Tree(Path("r.out/adapter")));
}

TEST_F(AdapterTest, OfTwoStagesLieInFoldersOfTheirNames) {
  Train("p", kPtq + Oftq("", ", loss: lm", 2) + Oftq("method: lora", "", 2), "quantmill");
  EXPECT_EQ(Json("p.json")["adapters"],
            nlohmann::json::array({Path("p.out/adapter-oftq"), Path("p.out/adapter-oftq-2")}));
  EXPECT_EQ(Json("p.out/adapter-oftq/adapter_config.json")["peft_type"], "OFT");
  EXPECT_EQ(Json("p.out/adapter-oftq-2/adapter_config.json")["peft_type"], "LORA");
}

TEST_F(AdapterTest, AloneAsPeft) {
  for (const char* method : {"oft", "lora"}) {
    const std::string name = method;
    const std::string options = "method: " + name + ", target: 'q_proj,v_proj', block: 16, rank: 4";
    Train(name, Oftq(options, ", loss: lm"), "peft");
    const auto files = Tree(Path(name + ".out"));
    EXPECT_TRUE(files.count("adapter_model.safetensors"));
    EXPECT_FALSE(files.count("model.safetensors"));
    const nlohmann::json config = Json(name + ".out/adapter_config.json");
    EXPECT_EQ(config["target_modules"], nlohmann::json({"q_proj", "v_proj"}));
    const auto tensors =
        SafetensorsFile::Open(Path(name + ".out/adapter_model.safetensors")).value();
    const size_t each = name == "oft" ? 1 : 2;
    EXPECT_EQ(tensors->entries().size(), 4 * 2 * each);
    const std::string first = "base_model.model.model.layers.0.self_attn.q_proj.";
    EXPECT_TRUE(tensors->Get(first + (name == "oft" ? "oft_R" : "lora_A") + ".weight").ok());
    const nlohmann::json own = Json(name + ".json")["evaluation"];
    const nlohmann::json scores = Scores(model_, Path(name + ".out"));
    EXPECT_EQ(scores["kl_mean"], own["kl_mean"]);
    EXPECT_GT(scores["kl_mean"], 0.0);
  }
}

// Rounding to the model's own dtype is all that merging may add.
TEST_F(AdapterTest, MergedIsTheAdapterOverTheModel) {
  for (const char* method : {"oft", "lora"}) {
    const std::string name = method;
    const std::string options = "method: " + name;
    Train(name, Oftq(options, ", loss: lm"), "peft");
    Train(name + "-merged", Oftq(options + ", merge: true", ", loss: lm"), "dense");
    EXPECT_FALSE(fs::exists(Path(name + "-merged.out/adapter")));
    const nlohmann::json apart = Scores(model_, Path(name + ".out"));
    const nlohmann::json merged = Scores(Path(name + "-merged.out"), "");
    EXPECT_NEAR(merged["nll"], apart["nll"], 2e-3) << name;
    // Nearer to the model with its adapter than that is to the original.
    const ProgramResult between =
        Program({"eval", Path(name + "-merged.out"), "--reference", model_, "--text",
                 Path("calib.txt"), "--context", "64", "--windows", "8", "--device", "cpu"});
    EXPECT_EQ(between.exit_code, 0) << between.err;
    EXPECT_NEAR(merged["kl_mean"], apart["kl_mean"], 0.05 * apart["kl_mean"].get<double>()) << name;
  }
}

TEST_F(AdapterTest, GeneratesWithIt) {
  Train("p", Oftq("", ", loss: lm"), "peft");
  const auto text = [&](const std::vector<std::string>& more) {
    std::vector<std::string> arguments = {"generate", model_, "--prompt",     "The mill",
                                          "--device", "cpu",  "--max-tokens", "8"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    const ProgramResult result = Program(arguments);
    EXPECT_EQ(result.exit_code, 0) << result.err;
    return result.out;
  };
  const std::string with = text({"--adapter", Path("p.out")});
  EXPECT_EQ(with, text({"--adapter", Path("p.out")}));
  EXPECT_NE(with, text({}));
  // The CPU computes in f32 whatever is asked for.
  EXPECT_EQ(with, text({"--adapter", Path("p.out"), "--dtype", "bf16"}));
}

TEST_F(AdapterTest, ChatsWithIt) {
  Train("p", Oftq("", ", loss: lm", 16), "peft");
  const auto reply = [&](const std::string& more) {
    const ProgramResult result =
        Shell("printf 'The mill\\n' | " QM_PROGRAM " chat " + model_ +
              " --device cpu --max-tokens 12 --json " + Path("chat.json") + more);
    EXPECT_EQ(result.exit_code, 0) << result.err;
    return Json("chat.json")["replies"].at(0).get<std::string>();
  };
  const std::string with = reply(" --adapter " + Path("p.out"));
  const ProgramResult generated =
      Program({"generate", model_, "--prompt", "The mill", "--device", "cpu", "--max-tokens", "12",
               "--adapter", Path("p.out"), "--json", Path("generate.json")});
  EXPECT_EQ(generated.exit_code, 0) << generated.err;
  EXPECT_EQ(with, Json("generate.json")["text"].get<std::string>());
  EXPECT_NE(with, reply(""));
  EXPECT_EQ(with, reply(" --dtype bf16 --adapter " + Path("p.out")));
}

TEST_F(AdapterTest, ComputeTypesThatDoNotExistAreRefused) {
  const std::vector<std::vector<std::string>> commands = {
      {"chat", model_},
      {"generate", model_, "--prompt", "x"},
      {"eval", model_, "--text", Path("calib.txt")}};
  for (std::vector<std::string> command : commands) {
    command.insert(command.end(), {"--device", "cpu", "--dtype", "f64"});
    const ProgramResult result = Program(command);
    EXPECT_EQ(result.exit_code, 2) << command[0];
    EXPECT_THAT(result.err, HasSubstr("use auto, f32, bf16 or f16")) << command[0];
  }
}

TEST_F(AdapterTest, WrongFilesAreNamed) {
  Train("p", Oftq("method: lora, target: q_proj", "", 1), "peft");
  const auto copy = [&](const std::string& name) {
    fs::copy(Path("p.out"), Path(name), fs::copy_options::recursive);
  };
  ExpectRefused(Path("nowhere"), {"nowhere holds no adapter_config.json", "name the directory"});
  ExpectRefused(model_, {"holds no adapter_config.json"});
  copy("no_tensors");
  fs::remove(Path("no_tensors/adapter_model.safetensors"));
  ExpectRefused(Path("no_tensors"), {"holds no adapter_model.safetensors"});
  copy("kind");
  EditConfig("kind", [](nlohmann::json& config) { config["peft_type"] = "VERA"; });
  ExpectRefused(Path("kind"), {"kind: no installed method runs an adapter of type VERA"});
  copy("number");
  EditConfig("number", [](nlohmann::json& config) { config["peft_type"] = 5; });
  ExpectRefused(Path("number"), {"number", "peft_type"});
  copy("nothing");
  EditConfig("nothing", [](nlohmann::json& config) { config.erase("peft_type"); });
  ExpectRefused(Path("nothing"), {"nothing", "peft_type"});
  copy("dora");
  EditConfig("dora", [](nlohmann::json& config) { config["use_dora"] = true; });
  ExpectRefused(Path("dora"), {"use_dora", "not supported"});
  // A config of other tensors.
  copy("rank");
  EditConfig("rank", [](nlohmann::json& config) { config["r"] = 4; });
  ExpectRefused(Path("rank"),
                {"model.layers.0.self_attn.q_proj has no parameter 'lora_A'", "the file has"});
  copy("oft");
  EditConfig("oft", [](nlohmann::json& config) {
    config = {{"peft_type", "OFT"}, {"oft_block_size", 32}, {"r", 0}};
  });
  ExpectRefused(Path("oft"), {"has 2 parameters", "adapter_config.json"});
  // Adapters of other models: linears that this one has not, and of another width.
  const auto of = [&](const std::string& name, const std::string& module, int64_t in) {
    copy(name);
    const std::string full = "base_model.model." + module;
    auto writer = SafetensorsWriter::Create(Path(name + "/adapter_model.safetensors"),
                                            {{full + ".lora_A.weight", DType::kF32, {8, in}},
                                             {full + ".lora_B.weight", DType::kF32, {in, 8}}})
                      .value();
    ASSERT_TRUE(
        writer->Write(full + ".lora_A.weight", Tensor::HostZeros(DType::kF32, {8, in}).value())
            .ok());
    ASSERT_TRUE(
        writer->Write(full + ".lora_B.weight", Tensor::HostZeros(DType::kF32, {in, 8}).value())
            .ok());
    ASSERT_TRUE(writer->Finish().ok());
  };
  of("deeper", "model.layers.40.self_attn.q_proj", 128);
  ExpectRefused(Path("deeper"), {"the model has no linear 'model.layers.40.self_attn.q_proj'",
                                 "use the adapter with the model it was made for"});
  of("wider", "model.layers.0.self_attn.q_proj", 4096);
  ExpectRefused(Path("wider"), {"model.layers.0.self_attn.q_proj has no parameter 'lora_A'", "4096",
                                "use the adapter with the model it was made for"});
  copy("text");
  std::ofstream(Path("text/adapter_config.json")) << "{\"peft_type\": ";
  ExpectRefused(Path("text"), {"text/adapter_config.json"});
  copy("cut");
  fs::resize_file(Path("cut/adapter_model.safetensors"), 100);
  ExpectRefused(Path("cut"), {"cut/adapter_model.safetensors"});
}

}  // namespace
}  // namespace quantmill::testing
