// Losses of trials on the GPU against those of the CPU on the same (rounded) weights and inputs.
#include <string>
#include <vector>

#include "core/calib/block_trials.h"
#include "core/model/block_edits.h"
#include "tests/core/cuda/support.h"
#include "tests/core/model/random_model.h"

namespace quantmill::testing {
namespace {

constexpr int64_t kRows = 17, kWindows = 2;
constexpr float kFactor = 1.5f;

class CudaBlockTrialsTest : public CudaTest {
 protected:
  void SetUp() override {
    CudaTest::SetUp();
    if (IsSkipped()) return;
    source_ = MakeRandomModel(SmallConfig("llama"), 21);
    cpu_ = MakeCpuBackend(2).value();
  }

  // The mean squared change of `submodule` when a weight of block 1 grows by kFactor.
  double Loss(Backend& backend, const std::string& submodule, const std::string& tensor) {
    const BlockWeights weights = Rounded(backend);
    BlockTrials trials(
        backend, source_->config(), 1, weights, kWindows,
        [&](int64_t window) {
          const Tensor input =
              Random({kRows, source_->config().hidden_size}, static_cast<uint32_t>(window) + 5);
          return backend.activation_dtype() == DType::kF32 ? backend.ToDevice(InF32(input))
                                                           : backend.ToDevice(input);
        },
        1 << 20);
    const std::string name = "model.layers.1." + tensor;
    Tensor grown = InF32(Original(name));
    for (int64_t i = 0; i < grown.elements(); ++i) grown.as<float>()[i] *= kFactor;
    const absl::StatusOr<double> loss =
        trials.Loss(submodule, 0, kWindows, {{name, InDtype(grown)}});
    EXPECT_TRUE(loss.ok()) << loss.status();
    return loss.value_or(-1);
  }

 private:
  Tensor InDtype(const Tensor& values) const {
    Tensor copy = Tensor::Host(dtype(), values.shape()).value();
    for (int64_t i = 0; i < copy.elements(); ++i) {
      StoreElement(dtype(), static_cast<float>(LoadElement(values.dtype(), values.data(), i)),
                   copy.data(), i);
    }
    return copy;
  }
  Tensor Original(const std::string& name) {
    BlockWeights handles = source_->LoadBlock(1, *cpu_).value();
    return InDtype(*BlockTensors(source_->config(), 1, &handles).Find(name));
  }
  // The block with weights rounded to the dtype of the GPU, whatever computes with them.
  BlockWeights Rounded(Backend& backend) {
    BlockWeights weights = source_->LoadBlock(1, *cpu_).value();
    const BlockTensors tensors(source_->config(), 1, &weights);
    for (const auto& [name, tensor] : tensors.all()) {
      *tensor = backend.ToDevice(InDtype(*tensor)).value();
    }
    return weights;
  }

  std::unique_ptr<MemorySource> source_;
  std::unique_ptr<Backend> cpu_;
};
QM_CUDA_TEST_SUITE(CudaBlockTrialsTest);

// An output y and its changed value y' both carry a relative error of a few roundings u, and their
// difference is about half of y: the mean of its square is off by that over one half, twice.
TEST_P(CudaBlockTrialsTest, LossesAreThoseOfTheCpu) {
  const std::unique_ptr<Backend> cpu = MakeCpuBackend(2).value();
  const double roundings = 8, bound = 4 * roundings * UnitRoundoff(dtype()) + 1e-5;
  for (const auto& [submodule, tensor] : std::vector<std::pair<std::string, std::string>>{
           {"model.layers.1.mlp.down_proj", "mlp.down_proj.weight"},
           {"mlp", "mlp.down_proj.weight"},
           {"self_attn", "self_attn.o_proj.weight"}}) {
    const double expected = Loss(*cpu, submodule, tensor);
    EXPECT_GT(expected, 0) << submodule;
    EXPECT_NEAR(Loss(cuda(), submodule, tensor) / expected, 1, bound) << submodule;
  }
}

}  // namespace
}  // namespace quantmill::testing
