// Block tuning against a small block with an analytic gradient: y = W2 relu(W1 (n * x)).
#include <gtest/gtest.h>

#include <functional>

#include "aqlm_testing.h"

namespace quantmill::aqlm::testing {
namespace {

constexpr int64_t kIn = 24, kMiddle = 32, kOut = 24, kRows = 40, kWindows = 6;

struct Block {
  std::vector<float> w1, w2;  // dense
  std::vector<float> norm = std::vector<float>(kIn, 1.25f);
  std::vector<std::vector<float>> windows;  // x [rows, in]
  std::vector<float> output;
  int vjp_calls = 0;
  qm_status vjp_status = QM_OK;
  const void* (*host_ext)(qm_call*, const char*) noexcept = nullptr;
};
Block* g_block = nullptr;  // of the test that runs

std::vector<float> Times(const std::vector<float>& x, int64_t rows, const std::vector<float>& w,
                         int64_t out, int64_t in) {
  std::vector<float> y(rows * out);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t o = 0; o < out; ++o) {
      double sum = 0;
      for (int64_t i = 0; i < in; ++i) sum += double{x[r * in + i]} * w[o * in + i];
      y[r * out + o] = static_cast<float>(sum);
    }
  }
  return y;
}

std::vector<float> Override(const qm_override* overrides, uint64_t count, const std::string& name,
                            const std::vector<float>& dense) {
  for (uint64_t i = 0; i < count; ++i) {
    if (name != overrides[i].tensor) continue;
    const float* data = static_cast<const float*>(overrides[i].value.data);
    return {data, data + dense.size()};
  }
  return dense;
}

struct Passed {
  std::vector<float> w1, w2, norm, input, before, middle;
};
Passed Pass(int64_t sample, const qm_override* overrides, uint64_t count) {
  Passed p;
  p.w1 = Override(overrides, count, "b.up.weight", g_block->w1);
  p.w2 = Override(overrides, count, "b.down.weight", g_block->w2);
  p.norm = Override(overrides, count, "b.norm.weight", g_block->norm);
  p.input = g_block->windows[sample];
  for (int64_t i = 0; i < kRows * kIn; ++i) p.input[i] *= p.norm[i % kIn];
  p.before = Times(p.input, kRows, p.w1, kMiddle, kIn);
  p.middle = p.before;
  for (float& v : p.middle) v = std::max(v, 0.0f);
  g_block->output = Times(p.middle, kRows, p.w2, kOut, kMiddle);
  return p;
}

int64_t SampleCount(qm_call*) noexcept { return kWindows; }
qm_status Forward(qm_call*, int64_t sample, const qm_override* overrides, uint64_t count,
                  qm_tensor* out) noexcept {
  Pass(sample, overrides, count);
  *out = qm::MakeMatrix(g_block->output.data(), kRows, kOut, kOut, kHost);
  return QM_OK;
}
qm_status Vjp(qm_call* call, int64_t sample, const qm_override* overrides, uint64_t count,
              const qm_tensor* d_out, qm_named_tensor* grads, uint64_t grad_count) noexcept {
  ++g_block->vjp_calls;
  if (g_block->vjp_status != QM_OK) return call->fail(call, g_block->vjp_status, "no gradients");
  const float* dy = static_cast<const float*>(d_out->data);
  const Passed p = Pass(sample, overrides, count);
  for (uint64_t g = 0; g < grad_count; ++g) {
    float* to = static_cast<float*>(grads[g].tensor.data);
    for (int64_t r = 0; r < kRows; ++r) {
      for (int64_t k = 0; k < kMiddle; ++k) {
        double back = 0;
        for (int64_t o = 0; o < kOut; ++o) {
          back += double{dy[r * kOut + o]} * p.w2[o * kMiddle + k];
          if (std::string(grads[g].name) == "b.down.weight") {
            to[o * kMiddle + k] += dy[r * kOut + o] * p.middle[r * kMiddle + k];
          }
        }
        if (p.before[r * kMiddle + k] <= 0) continue;
        for (int64_t i = 0; i < kIn; ++i) {
          if (std::string(grads[g].name) == "b.up.weight") {
            to[k * kIn + i] += static_cast<float>(back) * p.input[r * kIn + i];
          } else if (std::string(grads[g].name) == "b.norm.weight") {
            to[i] += static_cast<float>(back) * p.w1[k * kIn + i] *
                     g_block->windows[sample][r * kIn + i];
          }
        }
      }
    }
  }
  return QM_OK;
}
constexpr qm_host_block kBlock = {sizeof(qm_host_block), &SampleCount, &Forward, nullptr, &Vjp};

const void* HostExt(qm_call* call, const char* id) noexcept {
  if (std::strcmp(id, QM_HOST_BLOCK) == 0) return &kBlock;
  return g_block->host_ext(call, id);
}

class AqlmTune : public ::testing::Test {
 protected:
  AqlmTune() {
    g_block = &block_;
    up_ = MakeProblem(kMiddle, kIn, 100, 1);
    down_ = MakeProblem(kOut, kMiddle, 100, 2);
    block_.w1 = up_.w;
    block_.w2 = down_.w;
    std::mt19937 engine(3);
    std::normal_distribution<float> normal;
    for (int64_t w = 0; w < kWindows; ++w) {
      block_.windows.emplace_back(kRows * kIn);
      for (float& v : block_.windows.back()) v = normal(engine);
    }
    infos_[0] = Info(kMiddle, kIn);
    infos_[0].name = "b.up";
    infos_[1] = Info(kOut, kMiddle);
    infos_[1].name = "b.down";
    info_.struct_size = sizeof info_;
    info_.name = "b";
    info_.linears = info_pointers_;
    info_.linear_count = 2;
  }

  // Packs both linears in a call of their own and tunes them in `call`.
  qm_status Tune(FakeCall& call, bool second = true) {
    Apply({}, &packing_[0]);
    Apply({}, &packing_[1]);
    EXPECT_EQ(Quantize(packing_[0], {}, up_, &packed_[0]), QM_OK);
    EXPECT_EQ(Quantize(packing_[1], {}, down_, &packed_[1]), QM_OK);
    if (!second) packed_[1] = {};
    block_.host_ext = call.get()->host_ext;
    call.get()->host_ext = &HostExt;
    norm_ = {"b.norm.weight", call.Tensor(block_.norm, {kIn})};
    packed_[2].tensors = &norm_;
    packed_[2].tensor_count = 1;
    return Ext<qm_block_tune>(QM_EXT_BLOCK_TUNE)
        .run(call.get(), &info_, packed_, &edits_, &edit_count_);
  }

  // Mean squared error of the block with these weights.
  double Error(const std::vector<float>& w1, const std::vector<float>& w2,
               const std::vector<float>& norm) {
    double sum = 0;
    for (int64_t w = 0; w < kWindows; ++w) {
      Pass(w, nullptr, 0);
      const std::vector<float> want = block_.output;
      std::vector<float> a = w1, b = w2, n = norm;
      qm_override overrides[3] = {
          {"b.up.weight", qm::MakeMatrix(a.data(), kMiddle, kIn, kIn, kHost)},
          {"b.down.weight", qm::MakeMatrix(b.data(), kOut, kMiddle, kMiddle, kHost)},
          {"b.norm.weight", qm::MakeMatrix(n.data(), 1, kIn, kIn, kHost)}};
      Pass(w, overrides, 3);
      for (size_t i = 0; i < want.size(); ++i) {
        sum += std::pow(double{want[i]} - block_.output[i], 2);
      }
    }
    return sum;
  }

  // The packed weight with what was emitted for it in `call`.
  std::vector<float> After(FakeCall& call, int item) {
    std::vector<qm_named_tensor> tensors(packed_[item].tensors, packed_[item].tensors + 3);
    for (qm_named_tensor& t : tensors) {
      if (call.Emitted(item, t.name)) t.tensor = call.EmittedTensor(item, t.name);
    }
    qm_packed packed = packed_[item];
    packed.tensors = tensors.data();
    return Dequantized(call, packed);
  }

  Block block_;
  Problem up_, down_;
  FakeCall packing_[2];
  qm_packed packed_[3] = {};
  qm_named_tensor norm_ = {};
  const qm_edit* edits_ = nullptr;
  uint64_t edit_count_ = 77;
  qm_linear_info infos_[2];
  const qm_linear_info* info_pointers_[2] = {&infos_[0], &infos_[1]};
  qm_block_info info_ = {};
};

TEST_F(AqlmTune, BlockComesCloser) {
  FakeCall call;
  Apply({}, &call);
  call.Set("tune", "true").Threads(2);
  ASSERT_EQ(Tune(call), QM_OK) << call.error();
  const double before = Error(Dequantized(packing_[0], packed_[0]),
                              Dequantized(packing_[1], packed_[1]), block_.norm);
  ASSERT_EQ(edit_count_, 1u);
  EXPECT_STREQ(edits_[0].target, "b.norm.weight");
  EXPECT_EQ(edits_[0].kind, QM_EDIT_REPLACE);
  const std::vector<float> norm = call.Read<float>(edits_[0].value);
  EXPECT_NE(norm, block_.norm);
  EXPECT_LT(Error(After(call, 0), After(call, 1), norm), 0.7 * before);
  EXPECT_FALSE(call.Emitted(0, "codes"));
  EXPECT_TRUE(call.CanariesIntact());
}

TEST_F(AqlmTune, DenseSlotsStay) {
  FakeCall call;
  Apply({}, &call);
  ASSERT_EQ(Tune(call, /*second=*/false), QM_OK) << call.error();
  EXPECT_TRUE(call.Emitted(0, "codebooks"));
  EXPECT_FALSE(call.Emitted(1, "codebooks"));
}

TEST_F(AqlmTune, GradientsThatAreNotThereEndTheCall) {
  block_.vjp_status = QM_UNIMPLEMENTED;
  FakeCall call;
  Apply({}, &call);
  EXPECT_EQ(Tune(call), QM_UNIMPLEMENTED);
  EXPECT_EQ(edit_count_, 0u);
  EXPECT_FALSE(call.Emitted(0, "codebooks"));
}

TEST_F(AqlmTune, PlanWantsToBeAsked) {
  FakeCall call;
  Apply({}, &call);
  qm_quant_plan plan = {};
  plan.struct_size = sizeof plan;
  const auto& table = Ext<qm_block_tune>(QM_EXT_BLOCK_TUNE);
  EXPECT_EQ(table.plan(call.get(), &info_, &plan), QM_UNIMPLEMENTED);
  call.Set("tune", "true");
  EXPECT_EQ(table.plan(call.get(), &info_, &plan), QM_OK);
  FakeCall run;
  Apply({}, &run);
  ASSERT_EQ(Tune(run), QM_OK);
  EXPECT_LE(run.scratch_bytes(), plan.scratch_bytes);
  const qm_edit* edits = nullptr;
  uint64_t count = 0;
  FakeCall without;
  Apply({}, &without);
  EXPECT_EQ(table.run(without.get(), &info_, packed_, &edits, &count), QM_FAILED_PRECONDITION);
}

}  // namespace
}  // namespace quantmill::aqlm::testing
