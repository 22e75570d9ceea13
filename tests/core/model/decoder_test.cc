#include "core/model/decoder.h"

#include <map>
#include <memory>
#include <ostream>
#include <set>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/core/model/compare.h"
#include "tests/core/model/random_model.h"
#include "tests/core/model/slow_reference.h"

namespace quantmill {
namespace {

using ::nlohmann::ordered_json;
using testing::ExpectNear;
using testing::FloatTolerance;
using ::testing::HasSubstr;
using testing::MakeRandomModel;
using testing::MaxAbs;
using testing::MemorySource;
using testing::RandomIds;
using testing::SmallConfig;

constexpr int64_t kHidden = 32;
constexpr int64_t kVocab = 64;

// Keeps what it sees.
class Recorder : public BlockObserver {
 public:
  absl::Status OnInput(int input_group, const Tensor& x) override {
    order.push_back(input_group);
    inputs[input_group] = x;
    return absl::OkStatus();
  }
  std::vector<int> order;
  std::map<int, Tensor> inputs;
};

// A model on the CPU with everything needed to run it.
struct Rig {
  explicit Rig(std::unique_ptr<MemorySource> model, int64_t positions = 64)
      : source(std::move(model)),
        backend(MakeCpuBackend(2).value()),
        rope(MakeRopeTables(source->config(), positions, *backend).value()) {
    for (int64_t i = 0; i < source->config().layers; ++i) {
      blocks.push_back(source->LoadBlock(i, *backend).value());
    }
  }
  const ModelConfig& config() const { return source->config(); }
  Tensor Embed(const std::vector<int32_t>& ids) {
    const int64_t rows = static_cast<int64_t>(ids.size());
    Tensor hidden = Tensor::Host(DType::kF32, {rows, config().hidden_size}).value();
    const Tensor table = source->Embedding().value();
    EXPECT_TRUE(backend->Embed(table, Tensor::FromI32({rows}, ids), &hidden).ok());
    return hidden;
  }
  absl::Status Run(int64_t block, const BlockRun& run, Tensor* hidden) {
    return RunBlock(*backend, config(), blocks[static_cast<size_t>(block)], block, rope, run,
                    hidden);
  }
  Tensor Logits(const Tensor& hidden) {
    Tensor logits = Tensor::Host(DType::kF32, {hidden.dim(0), config().vocab_size}).value();
    const LinearWeight head = source->Head(*backend).value();
    const Tensor norm = source->FinalNorm(*backend).value();
    EXPECT_TRUE(RunHead(*backend, config(), norm, head, hidden, &logits).ok());
    return logits;
  }

  std::unique_ptr<MemorySource> source;
  std::unique_ptr<Backend> backend;
  RopeTables rope;
  std::vector<BlockWeights> blocks;
};

Tensor HostCopy(const Tensor& tensor) {
  return Tensor::FromF32(
      tensor.shape(),
      absl::MakeConstSpan(tensor.as<float>(), static_cast<size_t>(tensor.elements())));
}

testing::Matrix ToMatrix(const Tensor& tensor) {
  testing::Matrix matrix;
  for (int64_t i = 0; i < tensor.dim(0); ++i) {
    const float* row = tensor.as<float>() + i * tensor.dim(1);
    matrix.emplace_back(row, row + tensor.dim(1));
  }
  return matrix;
}

// ---- against the slow reference -----------------------------------------------------------------

struct Architecture {
  std::string name;
  ordered_json config;
};

void PrintTo(const Architecture& architecture, std::ostream* out) { *out << architecture.name; }

std::vector<Architecture> Architectures() {
  const ordered_json llama3 = {{"rope_type", "llama3"},
                               {"factor", 8.0},
                               {"low_freq_factor", 1.0},
                               {"high_freq_factor", 4.0},
                               {"original_max_position_embeddings", 32}};
  const ordered_json experts = {{"num_experts", 6},
                                {"num_experts_per_tok", 2},
                                {"moe_intermediate_size", 24},
                                {"decoder_sparse_step", 1},
                                {"mlp_only_layers", ordered_json::array()},
                                {"norm_topk_prob", true}};
  ordered_json plain_experts = experts;
  plain_experts["norm_topk_prob"] = false;
  plain_experts["mlp_only_layers"] = {0};
  return {
      {"Llama", SmallConfig("llama")},
      {"LlamaTied", SmallConfig("llama", {{"tie_word_embeddings", true}})},
      {"LlamaBiases", SmallConfig("llama", {{"attention_bias", true}, {"mlp_bias", true}})},
      {"LlamaLinearRope",
       SmallConfig("llama", {{"rope_scaling", {{"rope_type", "linear"}, {"factor", 4.0}}}})},
      {"Llama3Rope", SmallConfig("llama", {{"rope_scaling", llama3}})},
      {"MistralSlidingWindow", SmallConfig("mistral", {{"sliding_window", 5}})},
      {"Qwen2", SmallConfig("qwen2", {{"head_dim", 8}, {"use_sliding_window", false}})},
      {"Qwen3", SmallConfig("qwen3", {{"use_sliding_window", false}})},
      {"Mixtral", SmallConfig("mixtral", {{"num_local_experts", 4}, {"num_experts_per_tok", 2}})},
      {"Qwen3Moe", SmallConfig("qwen3_moe", experts)},
      {"Qwen3MoeFirstLayerDense", SmallConfig("qwen3_moe", plain_experts)},
  };
}

class DecoderArchitecture : public ::testing::TestWithParam<Architecture> {};

TEST_P(DecoderArchitecture, AgreesWithSlowReference) {
  Rig rig(MakeRandomModel(GetParam().config, 7));
  const std::vector<int32_t> ids = RandomIds(13, kVocab, 3);
  const testing::SlowResult expected =
      testing::RunSlowReference(GetParam().config, rig.source->Matrices(), ids);
  Tensor hidden = rig.Embed(ids);
  for (int64_t block = 0; block < 2; ++block) {
    ASSERT_TRUE(rig.Run(block, BlockRun{}, &hidden).ok());
    const auto& reference = expected.hidden[static_cast<size_t>(block + 1)];
    // A block is about a dozen sums over at most 64 terms.
    ExpectNear(hidden, reference, FloatTolerance(64, 12 * (block + 1), MaxAbs(reference)));
  }
  ExpectNear(rig.Logits(hidden), expected.logits, FloatTolerance(64, 26, MaxAbs(expected.logits)));
}

TEST_P(DecoderArchitecture, ObserverSeesTheInputsOfEverySlot) {
  Rig rig(MakeRandomModel(GetParam().config, 8));
  const std::vector<int32_t> ids = RandomIds(9, kVocab, 4);
  const testing::SlowResult expected =
      testing::RunSlowReference(GetParam().config, rig.source->Matrices(), ids);
  Tensor hidden = rig.Embed(ids);
  for (int64_t block = 0; block < 2; ++block) {
    Recorder recorder;
    BlockRun run;
    run.observer = &recorder;
    ASSERT_TRUE(rig.Run(block, run, &hidden).ok());
    std::set<int> groups;
    for (const LinearSlot& slot : BlockSlots(rig.config(), block)) {
      groups.insert(slot.input_group);
      ASSERT_TRUE(recorder.inputs.contains(slot.input_group)) << slot.name;
      const auto found = expected.inputs.find(slot.name);
      const testing::Matrix rows =
          found == expected.inputs.end() ? testing::Matrix() : found->second;
      ExpectNear(recorder.inputs[slot.input_group], rows, FloatTolerance(64, 24, MaxAbs(rows)));
    }
    EXPECT_EQ(recorder.order, std::vector<int>(groups.begin(), groups.end()));
  }
}

// The last positions computed in pieces on a cache equal the run over all positions at once.
TEST_P(DecoderArchitecture, CacheGivesTheSameHiddenStates) {
  Rig rig(MakeRandomModel(GetParam().config, 9));
  const std::vector<int32_t> ids = RandomIds(16, kVocab, 5);
  Tensor whole = rig.Embed(ids);
  for (int64_t block = 0; block < 2; ++block) {
    Tensor pieces = HostCopy(whole);
    ASSERT_TRUE(rig.Run(block, BlockRun{}, &whole).ok());
    const Shape shape = {20, rig.config().kv_features()};
    KvCache cache{Tensor::HostZeros(DType::kF32, shape).value(),
                  Tensor::HostZeros(DType::kF32, shape).value(), 0};
    int64_t begin = 0;
    for (int64_t count : {6, 1, 1, 7, 1}) {
      BlockRun run;
      run.first_position = begin;
      run.cache = &cache;
      Tensor piece = pieces.Rows(begin, begin + count);
      ASSERT_TRUE(rig.Run(block, run, &piece).ok());
      begin += count;
      EXPECT_EQ(cache.length, begin);
    }
    const testing::Matrix expected = ToMatrix(whole);
    ExpectNear(pieces, expected, FloatTolerance(64, 12, MaxAbs(expected)));
  }
}

INSTANTIATE_TEST_SUITE_P(All, DecoderArchitecture, ::testing::ValuesIn(Architectures()),
                         [](const auto& info) { return info.param.name; });

// ---- batches
// -------------------------------------------------------------------------------------

TEST(DecoderTest, SequencesOfABatchDoNotSeeEachOther) {
  Rig rig(MakeRandomModel(SmallConfig("llama"), 1));
  const std::vector<int32_t> ids = RandomIds(21, kVocab, 6);
  Tensor together = rig.Embed(ids);
  const Tensor before = HostCopy(together);
  BlockRun run;
  run.batch = 3;
  ASSERT_TRUE(rig.Run(0, run, &together).ok());
  for (int64_t b = 0; b < 3; ++b) {
    Tensor alone = HostCopy(before.Rows(7 * b, 7 * b + 7));
    ASSERT_TRUE(rig.Run(0, BlockRun{}, &alone).ok());
    const testing::Matrix expected = ToMatrix(alone);
    ExpectNear(together.Rows(7 * b, 7 * b + 7), expected, FloatTolerance(64, 12, MaxAbs(expected)));
  }
}

TEST(DecoderTest, CacheOfABatch) {
  Rig rig(MakeRandomModel(SmallConfig("qwen3"), 2));
  constexpr int64_t kBatch = 2, kLength = 6, kCapacity = 8;
  const Tensor start = rig.Embed(RandomIds(kBatch * kLength, kVocab, 7));
  Tensor whole = HostCopy(start);
  BlockRun all;
  all.batch = kBatch;
  ASSERT_TRUE(rig.Run(0, all, &whole).ok());
  const Shape shape = {kBatch * kCapacity, rig.config().kv_features()};
  KvCache cache{Tensor::HostZeros(DType::kF32, shape).value(),
                Tensor::HostZeros(DType::kF32, shape).value(), 0};
  for (int64_t position = 0; position < kLength; ++position) {
    Tensor step = Tensor::Host(DType::kF32, {kBatch, kHidden}).value();
    const Tensor rows = Tensor::FromI32(
        {kBatch}, {static_cast<int32_t>(position), static_cast<int32_t>(kLength + position)});
    ASSERT_TRUE(rig.backend->GatherRows(start, rows, &step).ok());
    BlockRun run;
    run.batch = kBatch;
    run.first_position = position;
    run.cache = &cache;
    ASSERT_TRUE(rig.Run(0, run, &step).ok());
    for (int64_t b = 0; b < kBatch; ++b) {
      const testing::Matrix expected =
          ToMatrix(whole.Rows(b * kLength + position, b * kLength + position + 1));
      ExpectNear(step.Rows(b, b + 1), expected, FloatTolerance(64, 12, MaxAbs(expected)));
    }
  }
}

// ---- observer
// ------------------------------------------------------------------------------------

TEST(DecoderTest, StopsRightAfterTheGroup) {
  Rig rig(MakeRandomModel(
      SmallConfig("mixtral", {{"num_local_experts", 3}, {"num_experts_per_tok", 1}}), 3));
  for (int last : {0, 1, 2, 3, 6, 7}) {
    Tensor hidden = rig.Embed(RandomIds(4, kVocab, 8));
    Recorder recorder;
    BlockRun run;
    run.observer = &recorder;
    run.stop_after_group = last;
    ASSERT_TRUE(rig.Run(0, run, &hidden).ok());
    ASSERT_EQ(recorder.order.size(), static_cast<size_t>(last + 1));
    EXPECT_EQ(recorder.order.back(), last);
  }
}

TEST(DecoderTest, ErrorOfTheObserverEndsTheRun) {
  class Refusing : public BlockObserver {
    absl::Status OnInput(int, const Tensor&) override { return absl::CancelledError("enough"); }
  };
  Rig rig(MakeRandomModel(SmallConfig("llama"), 3));
  Tensor hidden = rig.Embed({1, 2});
  Refusing observer;
  BlockRun run;
  run.observer = &observer;
  EXPECT_TRUE(absl::IsCancelled(rig.Run(0, run, &hidden)));
}

TEST(DecoderTest, ExpertsNobodyChoseAreObservedWithoutRows) {
  Rig rig(MakeRandomModel(
      SmallConfig("mixtral", {{"num_local_experts", 8}, {"num_experts_per_tok", 2}}), 4));
  Tensor hidden = rig.Embed({5});
  Recorder recorder;
  Routing routing;
  BlockRun run;
  run.observer = &recorder;
  run.routing = &routing;
  ASSERT_TRUE(rig.Run(0, run, &hidden).ok());
  ASSERT_EQ(recorder.order.size(), 18u);
  std::set<int> chosen = {routing.experts.as<int32_t>()[0], routing.experts.as<int32_t>()[1]};
  for (int expert = 0; expert < 8; ++expert) {
    const int64_t rows = chosen.contains(expert) ? 1 : 0;
    EXPECT_EQ(recorder.inputs[2 + 2 * expert].shape(), Shape({rows, kHidden}));
    EXPECT_EQ(recorder.inputs[3 + 2 * expert].shape(), Shape({rows, 48}));
  }
}

TEST(DecoderTest, RoutingCanBeGiven) {
  Rig rig(MakeRandomModel(
      SmallConfig("mixtral", {{"num_local_experts", 4}, {"num_experts_per_tok", 2}}), 5));
  Routing own;
  BlockRun run;
  run.routing = &own;
  Tensor hidden = rig.Embed({5, 9, 11});
  const Tensor start = HostCopy(hidden);
  ASSERT_TRUE(rig.Run(0, run, &hidden).ok());
  // Its own choice given back changes nothing; another choice does.
  Tensor again = HostCopy(start);
  ASSERT_TRUE(rig.Run(0, run, &again).ok());
  ExpectNear(again, ToMatrix(hidden), 0);
  Routing other{Tensor::FromI32({3, 2}, {0, 1, 0, 1, 0, 1}),
                Tensor::FromF32({3, 2}, {0.5f, 0.5f, 0.5f, 0.5f, 0.5f, 0.5f})};
  run.routing = &other;
  Recorder recorder;
  run.observer = &recorder;
  Tensor forced = HostCopy(start);
  ASSERT_TRUE(rig.Run(0, run, &forced).ok());
  EXPECT_EQ(recorder.inputs[2].dim(0), 3);
  EXPECT_EQ(recorder.inputs[4].dim(0), 3);
  EXPECT_EQ(recorder.inputs[6].dim(0), 0);

  other.experts = Tensor::FromI32({3, 2}, {0, 1, 0, 4, 0, 1});
  EXPECT_TRUE(absl::IsInvalidArgument(rig.Run(0, run, &forced)));
  other.experts = Tensor::FromI32({1, 2}, {0, 1});
  EXPECT_TRUE(absl::IsInvalidArgument(rig.Run(0, run, &forced)));
}

// ---- packed weights
// --------------------------------------------------------------------------------

// "Packs" a weight as its negation, so that a path that forgets the kernel is noticed.
class NegatedKernel : public PackedKernel {
 public:
  explicit NegatedKernel(Backend& backend) : backend_(backend) {}
  absl::Status Dequantize(const PackedWeight& weight, Tensor* out) override {
    ++dequantized;
    const Tensor& stored = weight.tensors[0].tensor;
    for (int64_t i = 0; i < stored.elements(); ++i) {
      out->as<float>()[i] = -stored.as<float>()[i];
    }
    return absl::OkStatus();
  }
  absl::StatusOr<PackedWeight> Prepack(const PackedWeight& weight) override { return weight; }
  absl::Status MatMul(const PackedWeight& weight, const Tensor& x, Tensor* out) override {
    if (!product.ok()) return product;
    ++multiplied;
    Tensor dense = Tensor::Host(DType::kF32, {weight.out_features, weight.in_features}).value();
    const absl::Status status = Dequantize(weight, &dense);
    --dequantized;
    return status.ok() ? backend_.Linear(x, dense, Tensor(), out) : status;
  }

  absl::Status product;
  int multiplied = 0, dequantized = 0;

 private:
  Backend& backend_;
};

LinearWeight Negated(const LinearWeight& dense, std::shared_ptr<NegatedKernel> kernel) {
  Tensor stored = HostCopy(dense.dense);
  for (int64_t i = 0; i < stored.elements(); ++i) stored.as<float>()[i] *= -1;
  auto packed = std::make_shared<PackedWeight>();
  packed->format_id = "test.fmt.negated/1";
  packed->tensors.push_back({"codes", stored});
  packed->out_features = stored.dim(0);
  packed->in_features = stored.dim(1);
  LinearWeight weight;
  weight.packed = packed;
  weight.kernel = kernel;
  weight.bias = dense.bias;
  return weight;
}

class PackedDecoderTest : public ::testing::Test {
 protected:
  PackedDecoderTest()
      : rig_(MakeRandomModel(SmallConfig("llama", {{"attention_bias", true}, {"mlp_bias", true}}),
                             6)),
        kernel_(std::make_shared<NegatedKernel>(*rig_.backend)) {}

  void PackEverything() {
    for (const LinearSlot& slot : BlockSlots(rig_.config(), 0)) {
      LinearWeight* weight = rig_.blocks[0].At(slot);
      *weight = Negated(*weight, kernel_);
    }
  }

  Rig rig_;
  std::shared_ptr<NegatedKernel> kernel_;
};

TEST_F(PackedDecoderTest, ProductOfTheKernelAndBias) {
  Tensor dense = rig_.Embed({3, 1, 4, 1, 5});
  Tensor packed = HostCopy(dense);
  ASSERT_TRUE(rig_.Run(0, BlockRun{}, &dense).ok());
  PackEverything();
  ASSERT_TRUE(rig_.Run(0, BlockRun{}, &packed).ok());
  EXPECT_EQ(kernel_->multiplied, 7);
  EXPECT_EQ(kernel_->dequantized, 0);
  const testing::Matrix expected = ToMatrix(dense);
  ExpectNear(packed, expected, FloatTolerance(64, 12, MaxAbs(expected)));
}

TEST_F(PackedDecoderTest, DequantizesWhereTheKernelHasNoProduct) {
  Tensor dense = rig_.Embed({3, 1, 4, 1, 5});
  Tensor packed = HostCopy(dense);
  ASSERT_TRUE(rig_.Run(0, BlockRun{}, &dense).ok());
  PackEverything();
  kernel_->product = absl::UnimplementedError("not these shapes");
  ASSERT_TRUE(rig_.Run(0, BlockRun{}, &packed).ok());
  EXPECT_EQ(kernel_->multiplied, 0);
  EXPECT_EQ(kernel_->dequantized, 7);
  const testing::Matrix expected = ToMatrix(dense);
  ExpectNear(packed, expected, FloatTolerance(64, 12, MaxAbs(expected)));
}

TEST_F(PackedDecoderTest, OtherErrorsOfTheKernelAreReturned) {
  Tensor hidden = rig_.Embed({3, 1});
  PackEverything();
  kernel_->product = absl::InternalError("broken kernel");
  const absl::Status status = rig_.Run(0, BlockRun{}, &hidden);
  EXPECT_TRUE(absl::IsInternal(status));
  EXPECT_THAT(std::string(status.message()), HasSubstr("broken kernel"));
}

TEST_F(PackedDecoderTest, MissingWeightIsAnError) {
  Tensor hidden = rig_.Embed({3, 1});
  rig_.blocks[0].up = LinearWeight();
  const absl::Status status = rig_.Run(0, BlockRun{}, &hidden);
  EXPECT_TRUE(absl::IsFailedPrecondition(status));
  EXPECT_THAT(std::string(status.message()), HasSubstr("neither a dense weight nor a packed"));
}

// ---- bad input
// ---------------------------------------------------------------------------------------

TEST(DecoderTest, FullCache) {
  Rig rig(MakeRandomModel(SmallConfig("llama"), 1));
  const Shape shape = {3, rig.config().kv_features()};
  KvCache cache{Tensor::HostZeros(DType::kF32, shape).value(),
                Tensor::HostZeros(DType::kF32, shape).value(), 0};
  Tensor hidden = rig.Embed({1, 2, 3, 4});
  BlockRun run;
  run.cache = &cache;
  const absl::Status status = rig.Run(0, run, &hidden);
  EXPECT_TRUE(absl::IsOutOfRange(status));
  EXPECT_THAT(std::string(status.message()), HasSubstr("holds 3 positions and needs 4"));
  EXPECT_EQ(cache.length, 0);
  run.first_position = 1;
  EXPECT_TRUE(absl::IsInvalidArgument(rig.Run(0, run, &hidden)));
}

TEST(DecoderTest, PositionsBeyondTheTables) {
  Rig rig(MakeRandomModel(SmallConfig("llama"), 1), 4);
  Tensor hidden = rig.Embed({1, 2, 3, 4, 5});
  const absl::Status status = rig.Run(0, BlockRun{}, &hidden);
  EXPECT_TRUE(absl::IsOutOfRange(status));
  EXPECT_THAT(std::string(status.message()), HasSubstr("position 4 is beyond"));
}

TEST(DecoderTest, RowsThatDoNotFitTheBatch) {
  Rig rig(MakeRandomModel(SmallConfig("llama"), 1));
  Tensor hidden = rig.Embed({1, 2, 3, 4, 5});
  BlockRun run;
  run.batch = 2;
  EXPECT_TRUE(absl::IsInvalidArgument(rig.Run(0, run, &hidden)));
}

// ---- finding a slot -----------------------------------------------------------------------------

TEST(BlockWeightsTest, FindsEverySlotAndNoOther) {
  for (const Architecture& architecture : Architectures()) {
    Rig rig(MakeRandomModel(architecture.config, 1));
    std::set<LinearWeight*> found;
    for (const LinearSlot& slot : BlockSlots(rig.config(), 1)) {
      LinearWeight* weight = rig.blocks[1].At(slot);
      ASSERT_NE(weight, nullptr) << slot.name;
      EXPECT_EQ(weight->dense.shape(), Shape({slot.out_features, slot.in_features})) << slot.name;
      EXPECT_TRUE(found.insert(weight).second) << slot.name;
    }
    EXPECT_EQ(rig.blocks[1].At(HeadSlot(rig.config())), nullptr);
    LinearSlot beyond = BlockSlots(rig.config(), 1).back();
    beyond.role = "expert.down";
    beyond.input_group = static_cast<int>(3 + 2 * rig.config().experts);
    EXPECT_EQ(rig.blocks[1].At(beyond), nullptr);
    beyond.role = "";
    EXPECT_EQ(rig.blocks[1].At(beyond), nullptr);
  }
}

}  // namespace
}  // namespace quantmill
