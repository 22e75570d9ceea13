#include "core/model/dense_source.h"

#include <cstring>
#include <fstream>
#include <functional>
#include <string>

#include "core/io/files.h"
#include "core/io/safetensors_writer.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/shared_data.h"

namespace quantmill {
namespace {

using ::testing::HasSubstr;

constexpr char kConfig[] = R"({"model_type":"qwen2","hidden_size":8,"intermediate_size":12,
  "num_hidden_layers":2,"num_attention_heads":2,"num_key_value_heads":1,"vocab_size":10,
  "tie_word_embeddings":TIED})";

std::string ConfigText(bool tied) {
  std::string text = kConfig;
  return text.replace(text.find("TIED"), 4, tied ? "true" : "false");
}

// A model whose tensors hold 0, 1, 2, ...; `change` edits the declarations before they are written.
std::string WriteModel(
    bool tied, const std::function<void(std::vector<TensorDeclaration>*)>& change = nullptr) {
  const std::string directory = testing::MakeTempDir();
  EXPECT_TRUE(WriteFile(directory + "/config.json", ConfigText(tied)).ok());
  std::vector<TensorDeclaration> tensors;
  for (const TensorSpec& spec : RequiredTensors(ReadModelConfig(directory).value())) {
    tensors.push_back({spec.name, DType::kF32, spec.shape});
  }
  if (change != nullptr) change(&tensors);
  auto writer = CheckpointWriter::Create(directory, tensors).value();
  for (const TensorDeclaration& tensor : tensors) {
    std::string bytes(tensor.bytes(), '\0');
    for (size_t i = 0; tensor.dtype == DType::kF32 && i < bytes.size() / 4; ++i) {
      const float value = static_cast<float>(i);
      std::memcpy(bytes.data() + 4 * i, &value, 4);
    }
    EXPECT_TRUE(writer->Append(tensor.name, bytes).ok());
  }
  EXPECT_TRUE(writer->Finish().ok());
  return directory;
}

TensorDeclaration& Named(std::vector<TensorDeclaration>* tensors, const std::string& name) {
  for (TensorDeclaration& tensor : *tensors) {
    if (tensor.name == name) return tensor;
  }
  ADD_FAILURE() << name;
  return tensors->front();
}

std::string OpenError(const std::string& directory) {
  const auto source = DenseSource::Open(directory);
  return source.ok() ? "" : std::string(source.status().message());
}

TEST(DenseSourceTest, LoadsBlocksAndEnds) {
  const auto backend = MakeCpuBackend(1).value();
  const auto source = DenseSource::Open(WriteModel(false)).value();
  const BlockWeights block = source->LoadBlock(1, *backend).value();
  EXPECT_EQ(block.q.dense.shape(), (Shape{8, 8}));
  EXPECT_EQ(block.q.bias.shape(), (Shape{8}));
  EXPECT_EQ(block.k.dense.shape(), (Shape{4, 8}));
  EXPECT_TRUE(block.o.bias.empty());
  EXPECT_TRUE(block.q_norm.empty());
  EXPECT_EQ(block.down.dense.shape(), (Shape{8, 12}));
  EXPECT_EQ(block.down.dense.as<float>()[95], 95.0f);
  EXPECT_TRUE(block.down.dense.read_only());
  EXPECT_EQ(block.input_norm.as<float>()[7], 7.0f);
  EXPECT_EQ(source->Embedding()->shape(), (Shape{10, 8}));
  EXPECT_EQ(source->FinalNorm(*backend)->shape(), (Shape{8}));
  EXPECT_EQ(source->Head(*backend)->dense.shape(), (Shape{10, 8}));
  source->ReleaseBlock(1);
  EXPECT_EQ(block.down.dense.as<float>()[95], 95.0f);
  EXPECT_EQ(source->LoadBlock(2, *backend).status().code(), absl::StatusCode::kOutOfRange);
  EXPECT_EQ(source->LoadBlock(-1, *backend).status().code(), absl::StatusCode::kOutOfRange);
}

TEST(DenseSourceTest, TiedHeadIsTheEmbeddingEvenIfTheFileHasAHead) {
  const auto backend = MakeCpuBackend(1).value();
  const std::string directory = WriteModel(true, [](auto* tensors) {
    tensors->push_back({"lm_head.weight", DType::kF32, Shape{10, 8}});
  });
  const auto source = DenseSource::Open(directory).value();
  EXPECT_EQ(source->Head(*backend)->dense.data(), source->Embedding()->data());
}

TEST(DenseSourceTest, ErrorsNameTensorAndReason) {
  const std::string down = "model.layers.0.mlp.down_proj.weight";
  const std::string missing =
      OpenError(WriteModel(false, [](auto* tensors) { tensors->pop_back(); }));
  EXPECT_THAT(missing, HasSubstr("tensor lm_head.weight is missing"));
  const std::string shape = OpenError(WriteModel(true, [&](auto* tensors) {
    Named(tensors, down).shape = Shape{12, 8};
  }));
  EXPECT_THAT(shape,
              HasSubstr("tensor " + down + " has shape [12, 8], but config.json asks for [8, 12]"));
  EXPECT_THAT(shape, HasSubstr("model.safetensors"));
  const std::string dtype =
      OpenError(WriteModel(true, [&](auto* tensors) { Named(tensors, down).dtype = DType::kI8; }));
  EXPECT_THAT(dtype, HasSubstr("has dtype I8"));
  const std::string many = OpenError(WriteModel(true, [](auto* tensors) { tensors->resize(3); }));
  EXPECT_THAT(many, HasSubstr("and 22 other tensors are wrong too"));
}

TEST(DenseSourceTest, SkippedNamesAreNotRequired) {
  const std::string directory = WriteModel(true, [](auto* tensors) { tensors->pop_back(); });
  const auto checkpoint = Checkpoint::Open(directory).value();
  const ModelConfig config = ReadModelConfig(directory).value();
  EXPECT_FALSE(CheckRequiredTensors(config, *checkpoint).ok());
  EXPECT_TRUE(CheckRequiredTensors(config, *checkpoint, [](const std::string& name) {
                return name == "model.norm.weight";
              }).ok());
}

int64_t ResidentFileKilobytes() {
  std::ifstream status("/proc/self/status");
  for (std::string word; status >> word;) {
    int64_t value = 0;
    if (word == "RssFile:" && status >> value) return value;
  }
  return -1;
}

TEST(DenseSourceTest, ReleasedBlocksLeaveMemory) {
  QM_SHARED_OR_SKIP(model, "models/small-llama");
  const auto backend = MakeCpuBackend(1).value();
  const auto source = DenseSource::Open(model).value();
  const int64_t before = ResidentFileKilobytes();
  int64_t peak = 0;
  for (int64_t block = 0; block < source->config().layers; ++block) {
    const BlockWeights weights = source->LoadBlock(block, *backend).value();
    int64_t sum = 0;
    for (const LinearSlot& slot : BlockSlots(source->config(), block)) {
      BlockWeights copy = weights;
      const Tensor& dense = copy.At(slot)->dense;
      for (int64_t i = 0; i < dense.bytes(); i += 512) sum += dense.as<char>()[i];
    }
    EXPECT_NE(sum, 0);
    peak = std::max(peak, ResidentFileKilobytes() - before);
    source->ReleaseBlock(block);
  }
  // A block has 3.1 MB; ten of them would be 31.
  EXPECT_GT(peak, 2000);
  EXPECT_LT(peak, 12000);
}

}  // namespace
}  // namespace quantmill
