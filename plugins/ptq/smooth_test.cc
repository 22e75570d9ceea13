// ptq.smooth against the published formula written out in f64.
#include "smooth.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "quantmill/plugin.h"
#include "quantmill/testing/fake_call.hpp"

extern "C" const qm_plugin* qm_plugin_entry_v1(void);

namespace {

using qm::testing::FakeCall;

const qm_method& SmoothMethod() {
  const qm_plugin& plugin = *qm_plugin_entry_v1();
  for (uint32_t i = 0; i < plugin.method_count; ++i) {
    if (std::string(plugin.methods[i]->id) == "ptq.smooth") return *plugin.methods[i];
  }
  std::abort();
}
const qm_block_transform& SmoothTable() {
  return *static_cast<const qm_block_transform*>(
      SmoothMethod().ext(&SmoothMethod(), QM_EXT_BLOCK_TRANSFORM));
}

constexpr int64_t kChannels = 300;  // not a multiple of a thread block

// A layer with one norm that feeds q and k, and a linear site behind it.
class Block {
 public:
  explicit Block(FakeCall* call) : call_(call) {
    std::mt19937 engine(3);
    std::normal_distribution<float> normal(0.0f, 0.05f);
    for (int64_t rows : {70, 130}) {
      std::vector<float> weight(static_cast<size_t>(rows * kChannels));
      for (float& x : weight) x = normal(engine);
      for (int64_t row = 0; row < rows; ++row) weight[row * kChannels + 5] = 0;  // an unused input
      AddLinear(rows == 70 ? "l.q" : "l.k", rows, weight);
    }
    for (int64_t j = 0; j < kChannels; ++j) {
      activations.push_back(j == 7 ? 0.0f : std::exp(3.0f * normal(engine) / 0.05f));
    }
    sites[0] = Site("l.norm", {"l.q", "l.k"});
    sites[1] = Site("l.q", {"l.k"});
  }

  const qm_block_info* info() {
    pointers_.clear();
    for (const auto& linear : linears_) pointers_.push_back(linear.get());
    info_ = {};
    info_.struct_size = sizeof info_;
    info_.name = "l";
    info_.linears = pointers_.data();
    info_.weights = weights_.data();
    info_.linear_count = pointers_.size();
    info_.sites = sites;
    info_.site_count = 2;
    return &info_;
  }
  const qm_stats* const* stats() {
    absmax_ = {QM_STAT_ABSMAX, call_->Tensor(activations, {kChannels})};
    stats_ = {sizeof(qm_stats), &absmax_, 1, 100};
    stats_pointers_ = {&stats_, &stats_};
    return stats_pointers_.data();
  }

  std::vector<float> activations;
  std::vector<std::vector<float>> values;  // of the linears
  qm_scale_site sites[2] = {};

 private:
  void AddLinear(const char* name, int64_t rows, const std::vector<float>& weight) {
    auto info = std::make_unique<qm_linear_info>();
    info->struct_size = sizeof(qm_linear_info);
    info->name = name;
    info->out_features = rows;
    info->in_features = kChannels;
    linears_.push_back(std::move(info));
    weights_.push_back(call_->Tensor(weight, {rows, kChannels}));
    values.push_back(weight);
  }
  qm_scale_site Site(const char* producer, const std::vector<const char*>& names) {
    consumers_.emplace_back();
    for (const char* name : names) consumers_.back().push_back({name, nullptr, kChannels, 0});
    return {producer, producer, consumers_.back().data(), names.size(), kChannels, 0};
  }

  FakeCall* call_;
  std::vector<std::unique_ptr<qm_linear_info>> linears_;
  std::vector<const qm_linear_info*> pointers_;
  std::vector<qm_tensor> weights_;
  std::vector<std::vector<qm_site_consumer>> consumers_;
  qm_block_info info_ = {};
  qm_named_tensor absmax_ = {};
  qm_stats stats_ = {};
  std::vector<const qm_stats*> stats_pointers_;
};

std::vector<double> Expected(const Block& block, double alpha) {
  std::vector<double> scale;
  for (int64_t j = 0; j < kChannels; ++j) {
    double weight = 0;
    for (const std::vector<float>& values : block.values) {
      for (size_t i = static_cast<size_t>(j); i < values.size(); i += kChannels) {
        weight = std::max(weight, std::abs(double{values[i]}));
      }
    }
    const double activation = block.activations[static_cast<size_t>(j)];
    scale.push_back(activation == 0
                        ? 1.0
                        : std::max(1e-5, std::pow(activation, alpha) /
                                             std::pow(std::max(1e-5, weight), 1 - alpha)));
  }
  return scale;
}

void ExpectScales(FakeCall* call, const std::string& alpha) {
  call->Defaults(SmoothMethod()).Set("alpha", alpha);
  Block block(call);
  qm_quant_plan plan = {};
  plan.struct_size = sizeof plan;
  ASSERT_EQ(SmoothTable().plan(call->get(), block.info(), &plan), QM_OK) << call->error();
  EXPECT_EQ(plan.stat_count, 1u);
  EXPECT_EQ(plan.format_id, nullptr);
  const qm_edit* edits = nullptr;
  uint64_t count = 0;
  ASSERT_EQ(SmoothTable().run(call->get(), block.info(), block.stats(), &edits, &count), QM_OK)
      << call->error();
  ASSERT_EQ(count, 1u);  // the site behind a linear is left alone
  EXPECT_STREQ(edits[0].target, "l.norm");
  EXPECT_EQ(edits[0].kind, QM_EDIT_SCALE);
  ASSERT_EQ(edits[0].value.device.kind, QM_CPU);
  const std::vector<double> expected = Expected(block, std::stod(alpha));
  const float* scale = static_cast<const float*>(edits[0].value.data);
  for (int64_t j = 0; j < kChannels; ++j) {
    // Computed in f64 and rounded once.
    EXPECT_NEAR(scale[j] / expected[static_cast<size_t>(j)], 1.0, 0x1p-23) << j;
  }
  EXPECT_LE(call->scratch_bytes(), plan.scratch_bytes + 3 * 256);  // each request is rounded up
  EXPECT_TRUE(call->CanariesIntact());
}

TEST(SmoothTest, FollowsTheFormula) {
  for (const char* alpha : {"0.5", "0.0", "1.0", "0.8"}) {
    FakeCall call;
    call.Threads(2);
    ExpectScales(&call, alpha);
  }
}

TEST(SmoothTest, GpuGivesTheSame) {
  if (!qm::testing::HaveGpu()) GTEST_SKIP() << "no GPU";
  FakeCall call({QM_CUDA, 0});
  ExpectScales(&call, "0.5");
}

TEST(SmoothTest, RouterAndForeignConsumersAreNotSmoothed) {
  FakeCall call;
  call.Defaults(SmoothMethod());
  Block block(&call);
  auto* consumers = const_cast<qm_site_consumer*>(block.sites[0].consumers);
  consumers[1].flags = QM_CONSUMER_NOT_A_SLOT;
  qm_quant_plan plan = {};
  plan.struct_size = sizeof plan;
  EXPECT_EQ(SmoothTable().plan(call.get(), block.info(), &plan), QM_INVALID_ARGUMENT);
  EXPECT_NE(call.error().find("no norm of l"), std::string::npos) << call.error();
  consumers[1].flags = 0;
  consumers[1].name = "l.elsewhere";
  EXPECT_EQ(SmoothTable().plan(call.get(), block.info(), &plan), QM_INVALID_ARGUMENT);
}

TEST(SmoothTest, Refusals) {
  FakeCall call;
  Block block(&call);
  qm_quant_plan plan = {};
  plan.struct_size = sizeof plan;
  call.Set("alpha", "1.5");
  EXPECT_EQ(SmoothTable().plan(call.get(), block.info(), &plan), QM_INVALID_ARGUMENT);
  EXPECT_NE(call.error().find("alpha 1.5"), std::string::npos);
  call.Set("alpha", "0.5");
  const qm_stats none = {sizeof(qm_stats), nullptr, 0, 0};
  const qm_stats* stats[2] = {&none, &none};
  const qm_edit* edits = nullptr;
  uint64_t count = 0;
  EXPECT_EQ(SmoothTable().run(call.get(), block.info(), stats, &edits, &count),
            QM_FAILED_PRECONDITION);
  EXPECT_NE(call.error().find("absmax"), std::string::npos);
  call.CancelAt(0);
  EXPECT_EQ(SmoothTable().run(call.get(), block.info(), block.stats(), &edits, &count),
            QM_CANCELLED);
}

TEST(SmoothTest, ScratchThatIsRefusedIsReported) {
  for (int64_t nth = 0; nth < 3; ++nth) {
    FakeCall call;
    call.Defaults(SmoothMethod()).FailScratchAt(nth);
    Block block(&call);
    const qm_edit* edits = nullptr;
    uint64_t count = 0;
    EXPECT_EQ(SmoothTable().run(call.get(), block.info(), block.stats(), &edits, &count),
              QM_RESOURCE_EXHAUSTED);
  }
}

}  // namespace
