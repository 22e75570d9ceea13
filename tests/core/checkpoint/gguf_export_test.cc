// Models written as GGUF and read back: weights, configuration, tokenizer.
#include "core/checkpoint/gguf_export.h"

#include <cstring>
#include <filesystem>

#include "core/checkpoint/open_model.h"
#include "core/eval/logits.h"
#include "core/io/files.h"
#include "core/io/gguf_file.h"
#include "core/io/gguf_tensors.h"
#include "core/io/json.h"
#include "core/model/dense_source.h"
#include "core/text/tokenizer.h"
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

bool SameValues(const Tensor& a, const Tensor& b) {
  if (!(a.shape() == b.shape())) return false;
  for (int64_t i = 0; i < a.elements(); ++i) {
    if (LoadFloat(a, i) != LoadFloat(b, i)) return false;
  }
  return true;
}

class GgufExport : public ::testing::Test {
 protected:
  void SetUp() override {
    base_ = testing::MakeTempDir();
    original_ = base_ + "/original";
    std::filesystem::create_directory(original_);
    testing::WriteTestModel(original_);
    std::filesystem::remove(original_ + "/tokenizer.json");
    backend_ = *MakeCpuBackend(1);
  }

  absl::StatusOr<ExportResult> Export(TestSource& source, const std::string& original) {
    ExportOptions options;
    options.original = original;
    options.target = "gguf";
    options.output = base_ + "/out";
    options.provenance = {{"version", 1}};
    return ExportCheckpoint(options, source, &registry_, *backend_);
  }

  std::string base_, original_;
  std::unique_ptr<Backend> backend_;
  AffineRegistry registry_;
};

TestSource MixedForGguf() {
  TestSource source({4, 32, Zero::kNone});
  source.dense.insert("model.layers.1.self_attn.o_proj");
  source.params_of["model.layers.0.mlp.down_proj"] = {8, 32, Zero::kNone};
  source.params_of["model.layers.1.self_attn.k_proj"] = {4, 32, Zero::kInt};
  return source;
}

TEST_F(GgufExport, GivesThePackedWeightsAndEveryOtherTensorBack) {
  TestSource source = MixedForGguf();
  const auto result = Export(source, original_);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_TRUE(FileExists(base_ + "/out/model.gguf"));
  EXPECT_TRUE(FileExists(base_ + "/out/quantmill_provenance.json"));
  EXPECT_FALSE(FileExists(base_ + "/out/config.json"));
  const auto opened = OpenModel(base_ + "/out", &registry_);
  ASSERT_TRUE(opened.ok()) << opened.status();
  ASSERT_NE((*opened)->quantization(), nullptr);
  EXPECT_EQ((*opened)->quantization()->target(), "gguf");
  const ModelConfig config = *ReadModelConfig(original_);
  const auto before = *Checkpoint::Open(original_), after = *Checkpoint::Open(base_ + "/out");
  for (const LinearSlot& slot : AllSlots(config)) {
    SCOPED_TRACE(slot.name);
    const std::string name = slot.name + ".weight";
    const auto expected = *source.Packed(slot);
    const auto packed = (*opened)->LoadPacked(slot.name);
    if (expected == nullptr) {
      EXPECT_TRUE(SameBytes(*before->Get(name), *after->Get(name)));
      EXPECT_EQ(packed.status().code(), absl::StatusCode::kNotFound);
      continue;
    }
    ASSERT_TRUE(packed.ok()) << packed.status();
    EXPECT_EQ(packed->format_json, expected->format_json);
    Tensor made = *Tensor::Host(DType::kF32, {slot.out_features, slot.in_features});
    Tensor read = *Tensor::Host(DType::kF32, made.shape());
    ASSERT_TRUE(DequantizeAffineIntReference(*expected, &made).ok());
    ASSERT_TRUE(DequantizeAffineIntReference(*packed, &read).ok());
    EXPECT_TRUE(SameBytes(made, read));
    // By the file's own rule; minima of Q4_1 are rounded to F16: 11 bits of at most 15 steps.
    const Tensor dense = *after->Get(name);
    const bool exact = expected->format_json.find("\"zero\":\"int\"") == std::string::npos;
    for (int64_t i = 0; i < made.elements(); ++i) {
      const float step = std::abs(made.as<float>()[i]) + 15 * 0.5f;
      ASSERT_NEAR(dense.as<float>()[i], made.as<float>()[i], exact ? 0 : step * 0x1p-11f) << i;
    }
  }
  for (const TensorSpec& spec : RequiredTensors(config)) {
    if (before->Find(spec.name)->entry->shape.size() != 1) continue;
    EXPECT_EQ((*after->Get(spec.name)).dtype(), DType::kF32);
    EXPECT_TRUE(SameValues(*before->Get(spec.name), *after->Get(spec.name))) << spec.name;
  }
  for (const char* name : {"model.embed_tokens.weight", "lm_head.weight"}) {
    EXPECT_TRUE(SameBytes(*before->Get(name), *after->Get(name))) << name;
  }
}

TEST_F(GgufExport, DenseMatricesOfAnF16ModelStayF16) {
  const std::string half = base_ + "/half";
  std::filesystem::create_directory(half);
  testing::WriteTestModel(half, DType::kF16);
  std::filesystem::remove(half + "/tokenizer.json");
  TestSource source = MixedForGguf();
  ASSERT_TRUE(Export(source, half).ok());
  const auto before = *Checkpoint::Open(half), after = *Checkpoint::Open(base_ + "/out");
  for (const char* name :
       {"model.embed_tokens.weight", "lm_head.weight", "model.layers.1.self_attn.o_proj.weight"}) {
    EXPECT_EQ((*after->Get(name)).dtype(), DType::kF16) << name;
    EXPECT_TRUE(SameBytes(*before->Get(name), *after->Get(name))) << name;
  }
}

// Row 1 of a head of 16 rows is stored where the second pair begins: at 2.
TEST_F(GgufExport, StoresQueriesAndKeysInterleaved) {
  TestSource source = MixedForGguf();
  for (const char* name : {"q_proj", "k_proj", "v_proj"}) {
    source.dense.insert(std::string("model.layers.0.self_attn.") + name);
  }
  ASSERT_TRUE(Export(source, original_).ok());
  const auto file = *GgufFile::Open(base_ + "/out/model.gguf");
  const auto original = *Checkpoint::Open(original_);
  const auto row = [&](const char* tensor, int64_t index) {
    const GgufTensor& found = *file->header().FindTensor(tensor);
    return std::string(file->data(found) + index * 128, 128);
  };
  const auto expected = [&](const char* name, int64_t index) {
    const Tensor tensor = *original->Get(name);
    return std::string(tensor.as<char>() + index * 128, 128);
  };
  const char* q = "model.layers.0.self_attn.q_proj.weight";
  EXPECT_EQ(row("blk.0.attn_q.weight", 2), expected(q, 1));
  EXPECT_EQ(row("blk.0.attn_q.weight", 1), expected(q, 8));
  EXPECT_EQ(row("blk.0.attn_q.weight", 16 + 15), expected(q, 16 + 15));
  EXPECT_EQ(row("blk.0.attn_k.weight", 16 + 3),
            expected("model.layers.0.self_attn.k_proj.weight", 16 + 9));
  EXPECT_EQ(row("blk.0.attn_v.weight", 1), expected("model.layers.0.self_attn.v_proj.weight", 1));
}

TEST_F(GgufExport, WritesTheMetadataReadersNeed) {
  TestSource source = MixedForGguf();
  ASSERT_TRUE(Export(source, original_).ok());
  const auto file = *GgufFile::Open(base_ + "/out/model.gguf");
  const GgufHeader& header = file->header();
  EXPECT_EQ(header.version, 3u);
  EXPECT_EQ(header.Text("general.architecture"), "llama");
  EXPECT_EQ(header.Number("general.quantization_version", 0), 2);
  EXPECT_EQ(header.Number("general.file_type", 0), 2);  // mostly Q4_0
  EXPECT_EQ(header.Number("llama.block_count", 0), 2);
  EXPECT_EQ(header.Number("llama.embedding_length", 0), 64);
  EXPECT_EQ(header.Number("llama.feed_forward_length", 0), 96);
  EXPECT_EQ(header.Number("llama.attention.head_count", 0), 4);
  EXPECT_EQ(header.Number("llama.attention.head_count_kv", 0), 2);
  EXPECT_EQ(header.Number("llama.rope.dimension_count", 0), 16);
  EXPECT_EQ(header.Number("llama.context_length", 0), 64);
  EXPECT_EQ(static_cast<float>(header.Number("llama.attention.layer_norm_rms_epsilon", 0)), 1e-5f);
  EXPECT_EQ(header.Text("tokenizer.ggml.model"), "none");
  EXPECT_THAT(std::string(Tokenizer::FromDirectory(base_ + "/out").status().message()),
              HasSubstr("holds no tokenizer"));
}

TEST_F(GgufExport, EqualInputsGiveEqualBytesAndFailuresLeaveNothing) {
  TestSource source = MixedForGguf(), again = MixedForGguf();
  ASSERT_TRUE(Export(source, original_).ok());
  const std::string first = *ReadFile(base_ + "/out/model.gguf");
  std::filesystem::remove_all(base_ + "/out");
  ASSERT_TRUE(Export(again, original_).ok());
  EXPECT_EQ(*ReadFile(base_ + "/out/model.gguf"), first);
  std::filesystem::remove_all(base_ + "/out");

  TestSource wrong({4, 64, Zero::kNone});
  EXPECT_THAT(std::string(Export(wrong, original_).status().message()),
              HasSubstr("group_size: 32"));
  TestSource failing = MixedForGguf();
  failing.fail_on_second_use = "model.layers.1.mlp.up_proj";
  EXPECT_EQ(Export(failing, original_).status().code(), absl::StatusCode::kDataLoss);
  EXPECT_FALSE(FileExists(base_ + "/out"));
  EXPECT_FALSE(FileExists(base_ + "/out.tmp"));
}

TEST_F(GgufExport, RefusesModelsThatLlamaCppWouldComputeOtherwise) {
  const auto error = [&](const std::string& text) {
    EXPECT_TRUE(WriteFile(original_ + "/config.json", text).ok());
    return std::string(CheckGgufExport(original_, *ReadModelConfig(original_)).message());
  };
  const std::string sizes = R"("hidden_size":64,"intermediate_size":96,"num_hidden_layers":2,
      "num_attention_heads":4,"num_key_value_heads":2,"max_position_embeddings":64,"vocab_size":32)";
  EXPECT_EQ(error(R"({"model_type":"llama",)" + sizes + "}"), "");
  EXPECT_THAT(error(R"({"model_type":"mistral","sliding_window":32,)" + sizes + "}"),
              HasSubstr("a GGUF file cannot hold a sliding window"));
}

class GgufArchitectures : public GgufExport, public ::testing::WithParamInterface<const char*> {};

TEST_P(GgufArchitectures, ComputeTheSameAfterwards) {
  QM_SHARED_OR_SKIP(model, std::string("models/") + GetParam());
  TestSource source({8, 32, Zero::kNone});
  const auto result = Export(source, model);
  ASSERT_TRUE(result.ok()) << result.status();
  const ModelConfig before = *ReadModelConfig(model);
  const auto after = ReadModelConfig(base_ + "/out");
  ASSERT_TRUE(after.ok()) << after.status();
  EXPECT_EQ(after->model_type, before.model_type);
  EXPECT_EQ(after->rope.type, before.rope.type);
  EXPECT_EQ(after->rope.theta, before.rope.theta);
  EXPECT_EQ(after->rope.factor, before.rope.factor);
  EXPECT_EQ(after->rope.original_positions, before.rope.original_positions);
  EXPECT_EQ(after->rms_norm_eps, before.rms_norm_eps);
  EXPECT_EQ(after->head_dim, before.head_dim);
  EXPECT_EQ(after->tied_embeddings, before.tied_embeddings);
  EXPECT_EQ(after->qkv_bias, before.qkv_bias);
  EXPECT_EQ(after->experts_per_token, before.experts_per_token);
  EXPECT_EQ(after->max_positions, before.max_positions);
  // Dequantized as a whole it is the model that the dense target would be.
  ExportOptions options;
  options.original = model;
  options.target = "quantmill";
  options.output = base_ + "/native";
  ASSERT_TRUE(ExportCheckpoint(options, source, &registry_, *backend_).ok());
  const auto native = OpenModel(base_ + "/native", &registry_);
  const auto gguf = DenseSource::Open(base_ + "/out");
  ASSERT_TRUE(native.ok()) << native.status();
  ASSERT_TRUE(gguf.ok()) << gguf.status();
  const Tensor ids = Tensor::FromI32({1, 6}, {1, 5, 9, 200, 3, 77});
  const Tensor wanted = *ComputeLogits(*backend_, **native, ids);
  const Tensor logits = *ComputeLogits(*backend_, **gguf, ids);
  EXPECT_TRUE(SameBytes(wanted, logits));
}

INSTANTIATE_TEST_SUITE_P(Shared, GgufArchitectures,
                         ::testing::Values("arch/llama3-rope", "arch/mixtral", "arch/qwen2",
                                           "tiny-llama"));

}  // namespace
}  // namespace quantmill
