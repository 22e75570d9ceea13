// Exports a small model in every target, opens it again, and compares.
#include <cstring>
#include <filesystem>
#include <fstream>

#include "core/checkpoint/open_model.h"
#include "core/io/checkpoint_files.h"
#include "core/io/files.h"
#include "core/io/json.h"
#include "core/io/safetensors_writer.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/core/checkpoint/test_model.h"
#include "tests/core/cpu/support.h"
#include "tests/support/shared_data.h"

namespace quantmill {
namespace {

using testing::AffineRegistry;
using ::testing::HasSubstr;
using testing::SameBytes;
using testing::TestSource;
using Zero = AffineIntParams::Zero;

class ExportOpen : public ::testing::Test {
 protected:
  void SetUp() override {
    base_ = testing::MakeTempDir();
    std::filesystem::create_directory(base_ + "/original");
    testing::WriteTestModel(base_ + "/original");
    backend_ = *MakeCpuBackend(1);
    config_ = *ReadModelConfig(base_ + "/original");
  }
  void TearDown() override { std::filesystem::remove_all(base_); }

  ExportOptions Options(const std::string& target, const std::string& name = "out") {
    ExportOptions options;
    options.original = base_ + "/original";
    options.target = target;
    options.output = base_ + "/" + name;
    return options;
  }
  absl::StatusOr<ExportResult> Export(const ExportOptions& options, TestSource source) {
    return ExportCheckpoint(options, source, &registry_, *backend_);
  }
  // Everything but the original is gone.
  void ExpectNothingLeft() {
    int entries = 0;
    for (const auto& entry : std::filesystem::directory_iterator(base_)) {
      ++entries;
      EXPECT_EQ(entry.path().filename(), "original");
    }
    EXPECT_EQ(entries, 1);
  }
  std::map<std::string, std::string> Files(const std::string& directory) {
    std::map<std::string, std::string> files;
    for (const auto& entry : std::filesystem::directory_iterator(directory)) {
      files[entry.path().filename()] = *ReadFile(entry.path());
    }
    return files;
  }

  std::string base_;
  std::unique_ptr<Backend> backend_;
  AffineRegistry registry_;
  ModelConfig config_;
};

void ExpectSameWeight(const PackedWeight& a, const PackedWeight& b) {
  EXPECT_EQ(a.format_json, b.format_json);
  ASSERT_EQ(a.tensors.size(), b.tensors.size());
  for (const NamedTensor& named : a.tensors) {
    ASSERT_NE(b.Find(named.name), nullptr) << named.name;
    EXPECT_TRUE(SameBytes(named.tensor, *b.Find(named.name))) << named.name;
  }
}

TestSource MixedForExport() {
  TestSource source({4, 32, Zero::kInt});
  source.dense.insert("model.layers.1.self_attn.o_proj");
  source.params_of["model.layers.0.mlp.down_proj"] = {8, -1, Zero::kNone};
  return source;
}

TEST_F(ExportOpen, EveryTargetGivesThePackedWeightsBack) {
  for (const std::string target : {"quantmill", "gptq", "gptq_v2", "compressed-tensors"}) {
    SCOPED_TRACE(target);
    TestSource source = MixedForExport();
    const auto result = Export(Options(target, target), source);
    ASSERT_TRUE(result.ok()) << result.status();
    EXPECT_EQ(result->packed_slots, 13);
    EXPECT_EQ(result->dense_slots, 2);
    EXPECT_GT(result->bits_per_weight, 4);
    EXPECT_LT(result->bits_per_weight, 8);
    const auto opened = OpenModel(base_ + "/" + target, &registry_);
    ASSERT_TRUE(opened.ok()) << opened.status();
    for (int64_t block = 0; block < 2; ++block) {
      auto weights = (*opened)->LoadBlock(block, *backend_);
      ASSERT_TRUE(weights.ok()) << weights.status();
      for (const LinearSlot& slot : BlockSlots(config_, block)) {
        SCOPED_TRACE(slot.name);
        const auto expected = *source.Packed(slot);
        const auto packed = (*opened)->LoadPacked(slot.name);
        const LinearWeight* linear = weights->At(slot);
        ASSERT_NE(linear, nullptr);
        if (expected == nullptr) {
          EXPECT_EQ(packed.status().code(), absl::StatusCode::kNotFound);
          EXPECT_EQ(linear->dense.dtype(), DType::kBF16);
          continue;
        }
        ASSERT_TRUE(packed.ok()) << packed.status();
        ExpectSameWeight(*expected, *packed);
        Tensor dense = *Tensor::Host(DType::kF32, linear->dense.shape());
        ASSERT_TRUE(DequantizeAffineIntReference(*expected, &dense).ok());
        EXPECT_TRUE(SameBytes(dense, linear->dense));
      }
    }
    EXPECT_TRUE((*opened)->Head(*backend_).ok());
    EXPECT_TRUE((*opened)->Embedding().ok());
    EXPECT_TRUE((*opened)->FinalNorm(*backend_).ok());
  }
}

TEST_F(ExportOpen, KeepsWeightsPackedOnRequestAndNeedsNoRegistryForTheNativeFormat) {
  ASSERT_TRUE(Export(Options("quantmill"), MixedForExport()).ok());
  const auto opened = OpenModel(base_ + "/out", nullptr, PackedMode::kKeepPacked);
  ASSERT_TRUE(opened.ok()) << opened.status();
  const auto weights = (*opened)->LoadBlock(0, *backend_);
  ASSERT_TRUE(weights.ok()) << weights.status();
  EXPECT_TRUE(weights->q.dense.empty());
  ASSERT_NE(weights->q.packed, nullptr);
  ASSERT_NE(weights->q.kernel, nullptr);
}

TEST_F(ExportOpen, DenseTargetHoldsTheDequantizedValuesInTheOriginalDtype) {
  TestSource source = MixedForExport();
  const auto result = Export(Options("dense"), source);
  ASSERT_TRUE(result.ok()) << result.status();
  const auto checkpoint = Checkpoint::Open(base_ + "/out");
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const LinearSlot slot = BlockSlots(config_, 0)[0];
  Tensor expected = *Tensor::Host(DType::kBF16, {slot.out_features, slot.in_features});
  ASSERT_TRUE(DequantizeAffineIntReference(**source.Packed(slot), &expected).ok());
  EXPECT_TRUE(SameBytes(expected, *(*checkpoint)->Get(slot.name + ".weight")));
  EXPECT_FALSE(ReadOrderedJson(base_ + "/out/config.json")->contains("quantization_config"));
  EXPECT_TRUE(OpenModel(base_ + "/out", nullptr).ok());
}

TEST_F(ExportOpen, CopiesUnchangedTensorsAndTakesChangedOnes) {
  TestSource source = MixedForExport();
  const std::string norm = "model.layers.1.input_layernorm.weight";
  source.changed[norm] = Tensor::FromF32({64}, std::vector<float>(64, 1.25f));
  ASSERT_TRUE(Export(Options("gptq"), source).ok());
  const auto original = *Checkpoint::Open(base_ + "/original");
  const auto written = *Checkpoint::Open(base_ + "/out");
  for (const char* name :
       {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight",
        "model.layers.0.input_layernorm.weight", "model.layers.1.self_attn.o_proj.weight"}) {
    EXPECT_TRUE(SameBytes(*original->Get(name), *written->Get(name))) << name;
  }
  const Tensor changed = *written->Get(norm);
  EXPECT_EQ(changed.dtype(), DType::kBF16);
  EXPECT_EQ(changed.as<uint16_t>()[63], F32ToBF16(1.25f));
  EXPECT_FALSE(written->Has("model.layers.0.self_attn.q_proj.weight"));
}

TEST_F(ExportOpen, WritesConfigsAndCopiesTheOtherFiles) {
  ExportOptions options = Options("gptq");
  options.provenance = {{"stages", {"rtn"}}};
  ASSERT_TRUE(Export(options, MixedForExport()).ok());
  const auto original = *ReadOrderedJson(base_ + "/original/config.json");
  auto config = *ReadOrderedJson(base_ + "/out/config.json");
  EXPECT_EQ(config.begin().key(), "zeta_first");
  EXPECT_EQ(config["quantization_config"], *ReadOrderedJson(base_ + "/out/quantize_config.json"));
  config.erase("quantization_config");
  EXPECT_EQ(config.dump(), original.dump());
  EXPECT_EQ(*ReadFile(base_ + "/out/tokenizer.json"), "{\"any\": 1}");
  EXPECT_TRUE(FileExists(base_ + "/out/generation_config.json"));
  EXPECT_FALSE(FileExists(base_ + "/out/notes.txt"));
  EXPECT_TRUE(FileExists(base_ + "/out/quantmill_provenance.json"));
  EXPECT_FALSE(std::filesystem::exists(base_ + "/out.tmp"));
}

TEST_F(ExportOpen, EqualInputsGiveEqualBytesAndShardsHoldTheSame) {
  ASSERT_TRUE(Export(Options("gptq", "a"), MixedForExport()).ok());
  ASSERT_TRUE(Export(Options("gptq", "b"), MixedForExport()).ok());
  EXPECT_EQ(Files(base_ + "/a"), Files(base_ + "/b"));
  ExportOptions options = Options("gptq", "sharded");
  options.shard_bytes = 20000;
  ASSERT_TRUE(Export(options, MixedForExport()).ok());
  EXPECT_TRUE(FileExists(base_ + "/sharded/model.safetensors.index.json"));
  const auto one = *Checkpoint::Open(base_ + "/a");
  const auto many = *Checkpoint::Open(base_ + "/sharded");
  ASSERT_EQ(one->tensors().size(), many->tensors().size());
  for (const auto& tensor : one->tensors()) {
    EXPECT_TRUE(SameBytes(*one->Get(tensor.entry->name), *many->Get(tensor.entry->name)));
  }
}

TEST_F(ExportOpen, CountsSizes) {
  const auto result = Export(Options("quantmill"), TestSource({4, 32, Zero::kInt}));
  ASSERT_TRUE(result.ok());
  // 4 bits, an F16 scale and a U8 zero point per 32 weights.
  EXPECT_DOUBLE_EQ(result->bits_per_weight, 4 + (16 + 8) / 32.0);
  int64_t bytes = 0;
  for (const auto& [name, content] : Files(base_ + "/out")) bytes += content.size();
  EXPECT_EQ(result->size_bytes, bytes);
  EXPECT_EQ(
      result->original_bytes,
      static_cast<int64_t>(std::filesystem::file_size(base_ + "/original/model.safetensors")));
}

TEST_F(ExportOpen, LeavesNothingBehindOnFailure) {
  TestSource failing = MixedForExport();
  failing.fail_on_second_use = "model.layers.1.mlp.up_proj";
  EXPECT_EQ(Export(Options("gptq"), failing).status().code(), absl::StatusCode::kDataLoss);
  ExpectNothingLeft();

  TestSource zero({4, 32, Zero::kInt});
  zero.smallest_zero = 0;
  const auto refused = Export(Options("gptq"), zero).status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(refused.message()), HasSubstr("gptq_v2"));
  ExpectNothingLeft();

  ExportOptions cancelled = Options("quantmill");
  cancelled.progress = [](double) { return true; };
  EXPECT_EQ(Export(cancelled, MixedForExport()).status().code(), absl::StatusCode::kCancelled);
  ExpectNothingLeft();

  TestSource wrong = MixedForExport();
  wrong.changed["model.norm.weight"] = Tensor::FromF32({2}, {1, 2});
  EXPECT_EQ(Export(Options("quantmill"), wrong).status().code(),
            absl::StatusCode::kInvalidArgument);
  ExpectNothingLeft();
}

TEST_F(ExportOpen, RefusesWhatItWouldOverwriteAndWhatItDoesNotKnow) {
  std::filesystem::create_directory(base_ + "/out");
  EXPECT_EQ(Export(Options("gptq"), MixedForExport()).status().code(),
            absl::StatusCode::kAlreadyExists);
  EXPECT_EQ(Export(Options("other", "x"), MixedForExport()).status().code(),
            absl::StatusCode::kInvalidArgument);
  TestSource source = MixedForExport();
  EXPECT_EQ(ExportCheckpoint(Options("gptq", "x"), source, nullptr, *backend_).status().code(),
            absl::StatusCode::kFailedPrecondition);
}

// Rewrites the exported weights without `dropped` and with `added` copied from another tensor.
void Rewrite(const std::string& directory, const std::string& dropped, const std::string& added) {
  const auto checkpoint = *Checkpoint::Open(directory);
  std::vector<TensorDeclaration> declarations;
  std::vector<NamedTensor> tensors;
  for (const auto& tensor : checkpoint->tensors()) {
    if (tensor.entry->name == dropped) continue;
    tensors.push_back({tensor.entry->name, *checkpoint->Get(tensor.entry->name)});
  }
  if (!added.empty()) tensors.push_back({added, tensors[0].tensor});
  for (const auto& t : tensors)
    declarations.push_back({t.name, t.tensor.dtype(), t.tensor.shape()});
  auto writer = CheckpointWriter::Create(directory, declarations);
  ASSERT_TRUE(writer.ok());
  for (const auto& t : tensors) ASSERT_TRUE((*writer)->Write(t.name, t.tensor).ok());
  ASSERT_TRUE((*writer)->Finish().ok());
}

TEST_F(ExportOpen, NamesMissingAndLeftOverTensors) {
  const std::string q = "model.layers.0.self_attn.q_proj";
  const auto error = [&] {
    return std::string(OpenModel(base_ + "/out", &registry_).status().message());
  };
  ASSERT_TRUE(Export(Options("gptq"), MixedForExport()).ok());
  Rewrite(base_ + "/out", q + ".scales", "");
  EXPECT_THAT(error(), HasSubstr("has no tensor " + q + ".scales"));
  std::filesystem::remove_all(base_ + "/out");

  ASSERT_TRUE(Export(Options("gptq"), MixedForExport()).ok());
  Rewrite(base_ + "/out", "", q + ".weight");
  EXPECT_THAT(error(), HasSubstr("has a tensor " + q + ".weight"));
  std::filesystem::remove_all(base_ + "/out");

  ASSERT_TRUE(Export(Options("gptq"), MixedForExport()).ok());
  Rewrite(base_ + "/out", "", "model.layers.1.self_attn.o_proj.qweight");
  EXPECT_THAT(error(), HasSubstr("is dense"));
  std::filesystem::remove_all(base_ + "/out");

  ASSERT_TRUE(Export(Options("gptq"), MixedForExport()).ok());
  Rewrite(base_ + "/out", "model.norm.weight", "");
  EXPECT_THAT(error(), HasSubstr("model.norm.weight"));
  EXPECT_THAT(std::string(OpenModel(base_ + "/nowhere", &registry_).status().message()),
              HasSubstr("nowhere"));
}

TEST_F(ExportOpen, ScatteredGroupsSurviveGptqAndCompressedTensors) {
  for (const std::string target : {"gptq_v2", "compressed-tensors"}) {
    TestSource source({4, 32, Zero::kInt});
    source.group_index = true;
    ASSERT_TRUE(Export(Options(target, target), source).ok());
    const auto opened = OpenModel(base_ + "/" + target, &registry_);
    ASSERT_TRUE(opened.ok()) << opened.status();
    const LinearSlot slot = BlockSlots(config_, 1)[3];
    ExpectSameWeight(**source.Packed(slot), *(*opened)->LoadPacked(slot.name));
  }
}

TEST_F(ExportOpen, OpensTheOriginal) {
  const auto opened = OpenModel(base_ + "/original", nullptr);
  ASSERT_TRUE(opened.ok()) << opened.status();
  EXPECT_EQ((*opened)->quantization(), nullptr);
  EXPECT_TRUE((*opened)->LoadBlock(1, *backend_).ok());
  EXPECT_EQ((*opened)->LoadPacked("lm_head").status().code(), absl::StatusCode::kNotFound);
}

}  // namespace
}  // namespace quantmill
