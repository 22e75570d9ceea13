// What a run measures, against the slow reference fed with the weights that should have been in
// place: inputs of the model as quantized so far or of the original, measured once per block or
// again after every group.
#include <filesystem>
#include <fstream>
#include <set>

#include "core/io/safetensors_reader.h"
#include "core/io/safetensors_writer.h"
#include "core/model/graph.h"
#include "core/text/documents.h"
#include "core/text/tokenizer.h"
#include "tests/core/model/compare.h"
#include "tests/core/model/slow_statistics.h"
#include "tests/crash/run_fixture.h"
#include "tests/support/shared_data.h"

namespace quantmill::testing {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kWindows = 2, kLength = 24, kVocab = 2048;

class StreamsTest : public RunFixture {
 protected:
  // A random f32 model with the tokenizer of the quickstart's.
  void UseModel(const std::string& type, const nlohmann::ordered_json& changes = {}) {
    const std::string tokenizer = model_ + "/tokenizer.json";
    config_ = SmallConfig(type, {{"vocab_size", kVocab}});
    if (!changes.is_null()) config_.update(changes);
    original_ = MakeRandomModel(config_, 3);
    model_ = Path("model");
    fs::create_directory(model_);
    fs::copy(tokenizer, model_);
    std::ofstream(model_ + "/config.json") << config_.dump();
    std::vector<TensorDeclaration> declarations;
    for (const auto& [name, tensor] : original_->tensors()) {
      declarations.push_back({name, tensor.dtype(), tensor.shape()});
    }
    const auto writer = CheckpointWriter::Create(model_, declarations).value();
    for (const auto& [name, tensor] : original_->tensors()) {
      ASSERT_TRUE(writer->Write(name, tensor).ok());
    }
    ASSERT_TRUE(writer->Finish().ok());
    const auto reader = Tokenizer::FromDirectory(model_).value();
    const auto tokens = TokenizeFile(*reader, Path("calib.txt"), {}).value();
    windows_ = CutWindows(tokens, {.length = kLength, .count = kWindows}).value();
  }

  void Run(const std::string& options) {
    records_ = Path("records");
    fs::create_directory(records_);
    const std::string path =
        Pipeline("p",
                 "  - {use: org.example.recorder, options: {directory: " + records_ + ", " +
                     options + "}}\n",
                 "quantmill",
                 "calibration: {text: calib.txt, samples: " + std::to_string(kWindows) +
                     ", sequence_length: " + std::to_string(kLength) + "}\n");
    const ProgramResult result = Program({"run", path, "--plugin", QM_RECORDER});
    ASSERT_EQ(result.exit_code, 0) << result.err;
    for (int64_t block = 0; block < Config().layers; ++block) {
      for (const LinearSlot& slot : BlockSlots(Config(), block)) slots_.push_back(slot);
    }
  }

  const ModelConfig& Config() const { return original_->config(); }

  // A record of the plugin as a tensor of that shape.
  Tensor Record(const LinearSlot& slot, const std::string& what, const Shape& shape) const {
    Tensor tensor = Tensor::Host(DType::kF32, shape).value();
    std::ifstream file(records_ + "/" + slot.name + "." + what, std::ios::binary);
    file.read(static_cast<char*>(tensor.data()), tensor.bytes());
    EXPECT_EQ(file.gcount(), tensor.bytes()) << slot.name << "." << what;
    return tensor;
  }

  // The original with the recorded weights of the slots that `in_place` accepts.
  template <typename Predicate>
  MemorySource Model(Predicate in_place) const {
    auto tensors = original_->tensors();
    for (const LinearSlot& slot : slots_) {
      if (!in_place(slot)) continue;
      Tensor& weight = tensors[slot.name + ".weight"];
      weight = Record(slot, "weight", weight.shape());
    }
    return MemorySource(Config(), std::move(tensors));
  }

  // Inputs of every linear with those weights in place.
  template <typename Predicate>
  std::map<std::string, Matrix> Inputs(Predicate in_place) const {
    return SlowInputs(config_, Model(in_place), windows_);
  }

  void ExpectRecord(const LinearSlot& slot, const std::string& what, const Matrix& expected) const {
    SCOPED_TRACE(slot.name + " " + what);
    const int64_t k = slot.in_features;
    // Sums over the windows' rows of products of inputs that went through up to two blocks.
    const double tolerance = FloatTolerance(kWindows * kLength, 40, MaxAbs(expected));
    ExpectNear(Record(slot, what, Shape({k, k})), expected, tolerance);
  }

  nlohmann::ordered_json config_;
  std::unique_ptr<MemorySource> original_;
  Tensor windows_;
  std::string records_;
  std::vector<LinearSlot> slots_;
};

bool Nothing(const LinearSlot&) { return false; }

TEST_F(StreamsTest, QuantizedInputsAreThoseOfTheBlocksBefore) {
  UseModel("llama");
  Run("inputs: quantized, cross: true");
  const auto original = Inputs(Nothing);
  for (const LinearSlot& slot : slots_) {
    const auto inputs = Inputs([&](const LinearSlot& other) { return other.block < slot.block; });
    const Matrix& x = inputs.at(slot.name);
    ExpectRecord(slot, "hessian", Gram(x, x));
    ExpectRecord(slot, "cross", Gram(Subtract(original.at(slot.name), x), x));
  }
}

TEST_F(StreamsTest, OriginalInputsAreThoseOfTheUntouchedModel) {
  UseModel("qwen2");
  Run("inputs: original");
  const auto original = Inputs(Nothing);
  for (const LinearSlot& slot : slots_) {
    const Matrix& x = original.at(slot.name);
    ExpectRecord(slot, "hessian", Gram(x, x));
  }
}

TEST_F(StreamsTest, SequentialSeesTheGroupsBeforeInTheSameBlock) {
  UseModel("qwen3");
  Run("sequential: true, cross: true");
  const auto original = Inputs(Nothing);
  for (const LinearSlot& slot : slots_) {
    const auto inputs = Inputs([&](const LinearSlot& other) {
      return other.block < slot.block ||
             (other.block == slot.block && other.input_group < slot.input_group);
    });
    const Matrix& x = inputs.at(slot.name);
    ExpectRecord(slot, "hessian", Gram(x, x));
    ExpectRecord(slot, "cross", Gram(Subtract(original.at(slot.name), x), x));
  }
}

// Every expert measures the rows that were routed to it, and what is written computes the logits
// of the slow reference with the recorded weights.
TEST_F(StreamsTest, ExpertsOfQwen3) {
  UseModel("qwen3_moe", {{"num_experts", 4},
                         {"num_experts_per_tok", 2},
                         {"moe_intermediate_size", 24},
                         {"norm_topk_prob", true},
                         {"decoder_sparse_step", 1},
                         {"mlp_only_layers", nlohmann::ordered_json::array({0})}});
  Run("inputs: quantized");
  std::set<std::string> experts;
  for (const LinearSlot& slot : slots_) {
    const auto inputs = Inputs([&](const LinearSlot& other) { return other.block < slot.block; });
    const auto x = inputs.find(slot.name);
    if (x == inputs.end()) continue;  // an expert no row was routed to
    if (slot.role.starts_with("expert")) experts.insert(slot.name);
    ExpectRecord(slot, "hessian", Gram(x->second, x->second));
  }
  EXPECT_GE(experts.size(), 3u * 3u) << "a test that shows nothing";

  const std::vector<int32_t> ids(windows_.as<int32_t>(), windows_.as<int32_t>() + kLength);
  const Shape shape({1, kLength});
  const auto writer =
      SafetensorsWriter::Create(Path("ids.safetensors"), {{"input_ids", DType::kI32, shape}})
          .value();
  ASSERT_TRUE(writer->Write("input_ids", Tensor::FromI32(shape, ids)).ok());
  ASSERT_TRUE(writer->Finish().ok());
  const ProgramResult result = Program({"eval", Path("p.out"), "--device", "cpu", "--tokens",
                                        Path("ids.safetensors"), "--logits", Path("logits")});
  ASSERT_EQ(result.exit_code, 0) << result.err;
  const Tensor logits = SafetensorsFile::Open(Path("logits")).value()->Get("logits").value();
  const SlowResult slow =
      RunSlowReference(config_, Model([](const LinearSlot&) { return true; }).Matrices(), ids);
  ExpectNear(logits, slow.logits, FloatTolerance(64, 40, MaxAbs(slow.logits)));
}

}  // namespace
}  // namespace quantmill::testing
