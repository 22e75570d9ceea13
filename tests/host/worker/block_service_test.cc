// qm.host.block/1 as a plugin uses it.
#include "host/worker/block_service.h"

#include <cstring>
#include <string>
#include <vector>

#include "core/calib/block_trials.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "host/worker/call.h"
#include "tests/core/model/random_model.h"

namespace quantmill {
namespace {

using ::testing::HasSubstr;

constexpr int64_t kRows = 5, kHidden = 32;
constexpr char kNorm[] = "model.layers.0.input_layernorm.weight";
constexpr char kDown[] = "model.layers.0.mlp.down_proj.weight";

class BlockServiceTest : public ::testing::Test {
 protected:
  BlockServiceTest()
      : source_(testing::MakeRandomModel(testing::SmallConfig("qwen3"), 3)),
        backend_(MakeCpuBackend(2).value()),
        trials_(
            *backend_, source_->config(), 0, source_->LoadBlock(0, *backend_).value(), 1,
            [this](int64_t) { return source_->Embedding().value().Rows(0, kRows); }, 0) {
    CallSettings settings;
    settings.what = "call";
    settings.block = &trials_;
    call_ = std::make_unique<PluginCall>(*backend_, std::move(settings));
    table_ = static_cast<const qm_host_block*>(call()->host_ext(call(), QM_HOST_BLOCK));
  }
  qm_call* call() { return call_->get(); }
  qm_status Vjp(const Tensor& d_out, const char* name, const Tensor& gradient) {
    const qm_tensor view = d_out.View();
    qm_named_tensor named = {name, gradient.View()};
    return table_->vjp(call(), 0, nullptr, 0, &view, &named, 1);
  }
  std::string Message() { return std::string(call_->Finish(QM_INTERNAL).message()); }

  std::unique_ptr<testing::MemorySource> source_;
  std::unique_ptr<Backend> backend_;
  BlockTrials trials_;
  std::unique_ptr<PluginCall> call_;
  const qm_host_block* table_ = nullptr;
};

TEST_F(BlockServiceTest, ForwardGivesTheLastOutput) {
  ASSERT_TRUE(QM_HAS(table_, vjp));
  EXPECT_EQ(table_->sample_count(call()), 1);
  qm_tensor plain = {}, changed = {};
  ASSERT_EQ(table_->forward(call(), 0, nullptr, 0, &plain), QM_OK);
  ASSERT_EQ(plain.shape[0], kRows);
  const float before = static_cast<const float*>(plain.data)[0];
  const Tensor zeros = Tensor::HostZeros(DType::kF32, {kHidden, 48}).value();
  const qm_override override = {kDown, zeros.View()};
  ASSERT_EQ(table_->forward(call(), 0, &override, 1, &changed), QM_OK);
  EXPECT_NE(static_cast<const float*>(changed.data)[0], before);
}

TEST_F(BlockServiceTest, VjpAddsToThePluginsTensors) {
  const Tensor d_out = Tensor::FromF32({kRows, kHidden}, std::vector<float>(kRows * kHidden, 1.0f));
  const Tensor once = Tensor::HostZeros(DType::kF32, {kHidden, 48}).value();
  const Tensor twice = Tensor::HostZeros(DType::kF32, {kHidden, 48}).value();
  ASSERT_EQ(Vjp(d_out, kDown, once), QM_OK);
  ASSERT_EQ(Vjp(d_out, kDown, twice), QM_OK);
  ASSERT_EQ(Vjp(d_out, kDown, twice), QM_OK);
  const NamedTensor direct = {kDown, Tensor::HostZeros(DType::kF32, {kHidden, 48}).value()};
  ASSERT_TRUE(trials_.Vjp(0, {}, d_out, {&direct, 1}).ok());
  EXPECT_EQ(std::memcmp(once.data(), direct.tensor.data(), static_cast<size_t>(once.bytes())), 0);
  for (int64_t i = 0; i < once.elements(); ++i) {
    EXPECT_NEAR(twice.as<float>()[i], 2 * once.as<float>()[i], 1e-4);
  }
}

TEST_F(BlockServiceTest, VjpRefusesWhatItCannotUse) {
  const Tensor d_out = Tensor::HostZeros(DType::kF32, {kRows, kHidden}).value();
  const Tensor norm = Tensor::HostZeros(DType::kF32, {kHidden}).value();
  EXPECT_EQ(Vjp(d_out, kNorm, norm), QM_OK);
  EXPECT_EQ(Vjp(d_out, "model.norm.weight", norm), QM_NOT_FOUND);
  EXPECT_EQ(Vjp(d_out, nullptr, norm), QM_INVALID_ARGUMENT);
  EXPECT_EQ(Vjp(norm, kNorm, norm), QM_INVALID_ARGUMENT);
  EXPECT_EQ(Vjp(d_out, kDown, norm), QM_INVALID_ARGUMENT);
  const Tensor locked(nullptr, norm.data(), DType::kF32, norm.shape(), {}, /*read_only=*/true);
  EXPECT_EQ(Vjp(d_out, kNorm, locked), QM_INVALID_ARGUMENT);
  EXPECT_THAT(Message(), HasSubstr("expected writable F32 [32]"));
  EXPECT_EQ(table_->vjp(call(), 0, nullptr, 0, nullptr, nullptr, 0), QM_INVALID_ARGUMENT);
}

}  // namespace
}  // namespace quantmill
