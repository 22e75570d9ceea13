#include "host/worker/call.h"

#include <atomic>
#include <cstdlib>
#include <functional>
#include <stdexcept>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "host/worker/invoke.h"

namespace quantmill {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

class PluginCallTest : public ::testing::Test {
 protected:
  CallSettings Settings() {
    CallSettings settings;
    settings.what = "plugin fake 1.0, quantize-linear.run, model.layers.0.mlp.up_proj";
    settings.options = &options_;
    return settings;
  }
  static std::string Message(const absl::Status& status) { return std::string(status.message()); }

  const std::unique_ptr<Backend> backend_ = MakeCpuBackend(2).value();
  const ResolvedOptions options_ = {
      {"bits", "3"}, {"damp", "0.25"}, {"sym", "true"}, {"mode", "slow"}};
  const int64_t shape_[2] = {2, 3};
  const qm_device cpu_ = {QM_CPU, 0};
};

TEST_F(PluginCallTest, ReadsOptions) {
  PluginCall call(*backend_, Settings());
  qm_call* c = call.get();
  EXPECT_EQ(c->opt_i64(c, "bits"), 3);
  EXPECT_EQ(c->opt_i64(c, "sym"), 1);
  EXPECT_EQ(c->opt_f64(c, "damp"), 0.25);
  EXPECT_STREQ(c->opt_str(c, "mode"), "slow");
  EXPECT_EQ(c->opt_i64(c, "unknown"), 0);
  EXPECT_STREQ(c->opt_str(c, "unknown"), "");
}

TEST_F(PluginCallTest, ErrorsNameTheCall) {
  PluginCall call(*backend_, Settings());
  qm_call* c = call.get();
  const absl::Status told = call.Finish(c->fail(c, QM_INVALID_ARGUMENT, "bits must be 4"));
  EXPECT_TRUE(absl::IsInvalidArgument(told));
  EXPECT_THAT(Message(told), AllOf(HasSubstr("plugin fake 1.0"), HasSubstr("bits must be 4")));
  PluginCall bare(*backend_, Settings());
  EXPECT_THAT(Message(bare.Finish(QM_INTERNAL)), HasSubstr("INTERNAL without a message"));
  PluginCall odd(*backend_, Settings());
  EXPECT_EQ(odd.Finish(99).code(), absl::StatusCode::kUnknown);
}

TEST_F(PluginCallTest, AuthorModeNamesTheRule) {
  const auto refused = [this](const std::function<void(qm_call*)>& misuse) {
    CallSettings settings = Settings();
    settings.scratch_limit = 1000;
    PluginCall call(*backend_, settings);
    qm_call* c = call.get();
    if (misuse) misuse(c);
    return Message(call.Finish(misuse ? c->fail(c, QM_INTERNAL, "it went wrong") : QM_INTERNAL));
  };
  const auto bound = [this](qm_call* c) { EXPECT_EQ(c->scratch(c, cpu_, 2000), nullptr); };
  const auto dtype = [this](qm_call* c) {
    qm_tensor out;
    EXPECT_NE(c->emit(c, 0, "a", cpu_, 77, 2, shape_, &out), QM_OK);
  };
  const auto device = [this](qm_call* c) {
    qm_tensor out;
    EXPECT_NE(c->emit(c, 0, "a", {QM_CUDA, 0}, QM_F32, 2, shape_, &out), QM_OK);
  };
  ASSERT_EQ(setenv("QM_STRICT", "1", 1), 0);
  EXPECT_THAT(refused(nullptr),
              HasSubstr("this breaks QM-P-005, see plugin_api/RULES.md#qm-p-005"));
  EXPECT_THAT(refused(bound), HasSubstr("RULES.md#qm-p-015"));
  EXPECT_THAT(refused(dtype), HasSubstr("RULES.md#qm-p-010"));
  EXPECT_THAT(refused(device), HasSubstr("RULES.md#qm-p-009"));
  EXPECT_THAT(refused([](qm_call*) {}), Not(HasSubstr("this breaks")));
  ASSERT_EQ(unsetenv("QM_STRICT"), 0);
  EXPECT_THAT(refused(bound), Not(HasSubstr("this breaks")));
}

TEST_F(PluginCallTest, ExceptionsAreContained) {
  PluginCall call(*backend_, Settings());
  qm_status (*throws)(qm_call*) = [](qm_call*) -> qm_status { throw std::runtime_error("boo"); };
  EXPECT_THAT(Message(Invoke(call, throws)), HasSubstr("an exception left the plugin: boo"));
}

TEST_F(PluginCallTest, ScratchIsAlignedMeasuredAndLimited) {
  CallSettings settings = Settings();
  settings.scratch_limit = 1000;
  PluginCall call(*backend_, settings);
  qm_call* c = call.get();
  void* first = c->scratch(c, cpu_, 600);
  ASSERT_NE(first, nullptr);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(first) % 256, 0u);
  EXPECT_EQ(c->scratch(c, cpu_, 401), nullptr);
  EXPECT_EQ(c->scratch(c, cpu_, ~uint64_t{0}), nullptr);
  EXPECT_NE(c->scratch(c, cpu_, 400), nullptr);
  EXPECT_EQ(call.scratch_peak_bytes(), 1000u);
  EXPECT_EQ(c->scratch(c, {QM_CUDA, 0}, 1), nullptr);
}

TEST_F(PluginCallTest, EmitRefusesNonsense) {
  PluginCall call(*backend_, Settings());
  qm_call* c = call.get();
  qm_tensor out;
  const int64_t negative[2] = {-1, 3};
  const int64_t huge[2] = {int64_t{1} << 40, int64_t{1} << 40};
  EXPECT_EQ(c->emit(c, 0, "codes", cpu_, QM_I32, 2, shape_, &out), QM_OK);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(out.data) % 256, 0u);
  EXPECT_EQ(out.stride[0], 3);
  EXPECT_EQ(c->emit(c, 0, "codes", cpu_, QM_I32, 2, shape_, &out), QM_INVALID_ARGUMENT);
  EXPECT_EQ(c->emit(c, 1, "codes", cpu_, QM_I32, 2, shape_, &out), QM_OK);
  EXPECT_EQ(c->emit(c, 0, "", cpu_, QM_I32, 2, shape_, &out), QM_INVALID_ARGUMENT);
  EXPECT_EQ(c->emit(c, 0, "a", cpu_, 77, 2, shape_, &out), QM_INVALID_ARGUMENT);
  EXPECT_EQ(c->emit(c, 0, "b", cpu_, QM_F32, 5, shape_, &out), QM_INVALID_ARGUMENT);
  EXPECT_EQ(c->emit(c, 0, "c", cpu_, QM_F32, 2, negative, &out), QM_INVALID_ARGUMENT);
  EXPECT_EQ(c->emit(c, 0, "d", cpu_, QM_F32, 2, huge, &out), QM_INVALID_ARGUMENT);
  EXPECT_EQ(c->emit(c, 0, "e", {QM_CUDA, 0}, QM_F32, 2, shape_, &out), QM_INVALID_ARGUMENT);
}

TEST_F(PluginCallTest, TakesWhatWasEmittedAndOnlyThat) {
  PluginCall call(*backend_, Settings());
  qm_call* c = call.get();
  qm_named_tensor t[2] = {{"codes", {}}, {"scale", {}}};
  ASSERT_EQ(c->emit(c, 0, "codes", cpu_, QM_I32, 2, shape_, &t[0].tensor), QM_OK);
  ASSERT_EQ(c->emit(c, 0, "scale", cpu_, QM_F32, 2, shape_, &t[1].tensor), QM_OK);
  const qm_packed good = {"f/1", "{ \"b\": 1, \"a\": 2 }", t, 2, 2, 3};
  const absl::StatusOr<PackedWeight> packed = call.TakePacked(good);
  ASSERT_TRUE(packed.ok()) << packed.status();
  EXPECT_EQ(packed->format_json, "{\"a\":2,\"b\":1}");
  EXPECT_EQ(packed->tensors.size(), 2u);

  qm_packed bad = good;
  bad.tensor_count = 1;
  EXPECT_THAT(Message(call.TakePacked(bad).status()), HasSubstr("does not list it"));
  bad = good;
  bad.format_json = "[]";
  EXPECT_FALSE(call.TakePacked(bad).ok());
  bad = good;
  bad.out_features = 0;
  EXPECT_FALSE(call.TakePacked(bad).ok());
  EXPECT_THAT(Message(call.TakePacked(good, 7).status()), HasSubstr("was not emitted"));
  float foreign[6] = {};
  t[1].tensor.data = foreign;
  EXPECT_THAT(Message(call.TakePacked(good).status()), HasSubstr("'scale'"));
}

TEST_F(PluginCallTest, ThreadsRunAllOfTheRangeAndDoNotNest) {
  PluginCall call(*backend_, Settings());
  qm_call* c = call.get();
  const auto* threads = static_cast<const qm_host_threads*>(c->host_ext(c, QM_HOST_THREADS));
  ASSERT_TRUE(QM_HAS(threads, parallel_for));
  struct Work {
    qm_call* call;
    const qm_host_threads* threads;
    std::atomic<int64_t> sum{0};
    std::atomic<int> nested{0};
  } work{c, threads};
  const auto body = [](void* arg, int64_t begin, int64_t end, int32_t) noexcept -> qm_status {
    Work& w = *static_cast<Work*>(arg);
    for (int64_t i = begin; i < end; ++i) w.sum += i;
    const auto idle = [](void*, int64_t, int64_t, int32_t) noexcept -> qm_status { return QM_OK; };
    w.nested += w.threads->parallel_for(w.call, 4, 1, idle, nullptr) == QM_FAILED_PRECONDITION;
    return QM_OK;
  };
  EXPECT_EQ(threads->parallel_for(c, 100, 7, body, &work), QM_OK);
  EXPECT_EQ(work.sum, 4950);
  EXPECT_EQ(work.nested, 15);
  const auto fails = [](void*, int64_t, int64_t, int32_t) noexcept -> qm_status {
    return QM_NOT_FOUND;
  };
  EXPECT_EQ(threads->parallel_for(c, 100, 7, fails, nullptr), QM_NOT_FOUND);
  EXPECT_EQ(threads->parallel_for(c, 1, 0, body, &work), QM_INVALID_ARGUMENT);
  EXPECT_EQ(c->host_ext(c, QM_HOST_CUDA), nullptr);
  EXPECT_EQ(c->host_ext(c, "qm.host.threads/1x"), nullptr);
}

TEST_F(PluginCallTest, LinearAlgebraChecksItsArguments) {
  PluginCall call(*backend_, Settings());
  qm_call* c = call.get();
  const auto* linalg = static_cast<const qm_host_linalg*>(c->host_ext(c, QM_HOST_LINALG));
  ASSERT_TRUE(QM_HAS(linalg, gemm));
  const Tensor a = Tensor::FromF32(Shape({2, 2}), {1, 2, 3, 4});
  const Tensor out = Tensor::FromF32(Shape({2, 2}), {0, 0, 0, 0});
  const qm_tensor av = a.View();
  qm_tensor ov = out.View();
  EXPECT_EQ(linalg->gemm(c, 0, 1, 1.0, &av, &av, 0.0, &ov), QM_OK);
  EXPECT_EQ(out.as<float>()[1], 11.0f);  // (1, 2) . (3, 4)
  EXPECT_EQ(linalg->gemm(c, 0, 0, 1.0, nullptr, &av, 0.0, &ov), QM_INVALID_ARGUMENT);
  CallSettings without = Settings();
  without.with_services = false;
  PluginCall bare(*backend_, without);
  EXPECT_EQ(bare.get()->host_ext(bare.get(), QM_HOST_LINALG), nullptr);
}

}  // namespace
}  // namespace quantmill
