// CUDA kernels against the references of core/formats.
#include "gtest/gtest.h"
#include "row8_test_util.h"

#if defined(QM_HAVE_CUDA)
#include <cuda_runtime_api.h>

namespace eetq_testing {
namespace {

using qm::testing::FakeCall;

constexpr qm_device kGpu = {QM_CUDA, 0};

class Cuda : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!qm::testing::HaveGpu()) GTEST_SKIP() << "no GPU";
  }
};

// Calls have streams of their own: what one makes must be there before another takes it.
void Wait(FakeCall* call) {
  ASSERT_EQ(cudaStreamSynchronize(static_cast<cudaStream_t>(call->get()->cuda_stream)),
            cudaSuccess);
}

// A qm_packed over device copies that live as long as `call`.
class DeviceView {
 public:
  DeviceView(FakeCall* call, const PackedWeight& weight) {
    for (const auto& named : weight.tensors) {
      const Tensor& t = named.tensor;
      const std::vector<int64_t> shape(t.shape().extents().begin(), t.shape().extents().end());
      const auto* bytes = static_cast<const uint8_t*>(t.data());
      qm_tensor on_device = {};
      if (t.dtype() == DType::kF32) {
        on_device = call->Tensor(Values<float>(t), shape);
      } else if (quantmill::ElementSize(t.dtype()) == 2) {
        on_device = call->Tensor(Values<qm::F16>(t), shape);
      } else {
        on_device = call->Tensor(std::vector<uint8_t>(bytes, bytes + t.elements()), shape);
      }
      on_device.dtype = static_cast<qm_dtype>(t.dtype());
      tensors_.push_back({named.name.c_str(), on_device});
    }
    packed_ = {weight.format_id.c_str(), weight.format_json.c_str(), tensors_.data(),
               tensors_.size(),          weight.out_features,        weight.in_features};
    Wait(call);
  }
  const qm_packed* get() const { return &packed_; }

 private:
  template <class T>
  static std::vector<T> Values(const Tensor& t) {
    return {static_cast<const T*>(t.data()), static_cast<const T*>(t.data()) + t.elements()};
  }
  std::vector<qm_named_tensor> tensors_;
  qm_packed packed_;
};

// Whole chunks, a last one that is not full, more outputs than one block has; widths that vector
// loads do not fit; one output.
std::vector<Spec> CudaSpecs() {
  std::vector<Spec> specs = AllParameters(200, 512);
  for (const Spec& spec : AllParameters(33, 4112, DType::kBF16)) specs.push_back(spec);
  for (const Spec& spec : AllParameters(40, 100, DType::kF32)) specs.push_back(spec);
  for (const Spec& spec : AllParameters(1, 16)) specs.push_back(spec);
  return specs;
}

TEST_F(Cuda, DequantizeEqualsTheReferenceBitForBit) {
  for (const Spec& spec : CudaSpecs()) {
    const PackedWeight weight = RandomWeight(spec);
    FakeCall owner(kGpu);
    const DeviceView view(&owner, weight);
    for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
      const Tensor expected = ReferenceWeight(weight, dtype);
      FakeCall call(kGpu);
      const std::vector<int64_t> shape = {weight.out_features, weight.in_features};
      const size_t count = expected.elements();
      qm_tensor out = dtype == DType::kF32   ? call.Tensor(std::vector<float>(count), shape)
                      : dtype == DType::kF16 ? call.Tensor(std::vector<qm::F16>(count), shape)
                                             : call.Tensor(std::vector<qm::BF16>(count), shape);
      ASSERT_EQ(Kernel()->dequantize(call.get(), view.get(), &out), QM_OK) << call.error();
      Wait(&call);
      std::vector<uint8_t> actual(expected.bytes());
      ASSERT_EQ(cudaMemcpy(actual.data(), out.data, actual.size(), cudaMemcpyDeviceToHost),
                cudaSuccess);
      EXPECT_EQ(std::memcmp(expected.data(), actual.data(), actual.size()), 0)
          << weight.format_json << " in " << weight.in_features << " "
          << quantmill::DTypeName(dtype);
    }
  }
}

float Narrow(float value, float) { return value; }
qm::F16 Narrow(float value, qm::F16) { return qm::ToF16(value); }
qm::BF16 Narrow(float value, qm::BF16) { return qm::ToBF16(value); }
float Widen(float value) { return value; }
float Widen(qm::F16 value) { return qm::ToFloat(value); }
float Widen(qm::BF16 value) { return qm::ToFloat(value); }

// Half a unit in the last place of the result, relative.
template <class T>
double Rounding() {
  return std::is_same_v<T, float> ? 0x1p-24 : std::is_same_v<T, qm::F16> ? 0x1p-11 : 0x1p-8;
}

template <class T>
std::vector<T> Multiply(const qm_packed* packed, const std::vector<T>& x, int64_t rows) {
  FakeCall call(kGpu);
  const int64_t in = packed->in_features, out = packed->out_features;
  const qm_tensor input = call.Tensor(x, {rows, in});
  qm_tensor output = call.Tensor(std::vector<T>(rows * out), {rows, out});
  const uint64_t bytes = Kernel()->workspace_bytes(packed, rows);
  void* workspace = bytes == 0 ? nullptr : call.get()->scratch(call.get(), kGpu, bytes);
  EXPECT_EQ(Kernel()->matmul(call.get(), packed, &input, workspace, &output), QM_OK)
      << call.error();
  return call.template Read<T>(output);
}

// Codes times x are exact in f32; sums of `in` such terms are off by at most in * 2^-23 of the sum
// of their magnitudes (tensor cores truncate); three roundings by the scales; then the result is
// rounded once. The least numbers of f16 add an absolute 2^-25.
template <class T>
void ExpectProduct(const PackedWeight& weight, const qm_packed* packed, int64_t rows) {
  std::vector<float> x = RandomVector(rows * weight.in_features);
  std::vector<T> rounded;
  for (float& value : x) {
    rounded.push_back(Narrow(value, T{}));
    value = Widen(rounded.back());
  }
  const Product expected = ReferenceProduct(weight, x, rows);
  const std::vector<T> y = Multiply(packed, rounded, rows);
  for (size_t i = 0; i < y.size(); ++i) {
    const double bound =
        1.01 * Rounding<T>() * std::abs(expected.value[i]) + 0x1p-25 +
        static_cast<double>(weight.in_features + 4) * 0x1p-23 * expected.magnitude[i];
    ASSERT_NEAR(Widen(y[i]), expected.value[i], bound)
        << weight.format_json << " [" << weight.out_features << ", " << weight.in_features
        << "] rows " << rows << " element " << i;
  }
}

TEST_F(Cuda, ProductsEqualTheReferenceWithinRounding) {
  for (const Spec& spec : CudaSpecs()) {
    const PackedWeight weight = RandomWeight(spec);
    FakeCall owner(kGpu);
    const DeviceView view(&owner, weight);
    for (const int64_t rows : {1, 2, 3, 8}) ExpectProduct<float>(weight, view.get(), rows);
    for (const int64_t rows : {1, 2, 3, 8, 9, 16, 17, 64}) {
      const bool tiles = spec.in % 16 == 0;
      if (rows > 8 && !tiles && !spec.activations) continue;
      ExpectProduct<qm::F16>(weight, view.get(), rows);
      ExpectProduct<qm::BF16>(weight, view.get(), rows);
    }
  }
}

TEST_F(Cuda, QuantizedActivationsServeEveryNumberOfRows) {
  for (const Spec& spec : AllParameters(72, 208)) {
    const PackedWeight weight = RandomWeight(spec);
    FakeCall owner(kGpu);
    const DeviceView view(&owner, weight);
    if (spec.activations) {
      ExpectProduct<float>(weight, view.get(), 65);
      ExpectProduct<qm::BF16>(weight, view.get(), 300);
      continue;
    }
    FakeCall call(kGpu);
    const qm_tensor x = call.Tensor(std::vector<qm::F16>(65 * 208), {65, 208});
    qm_tensor y = call.Tensor(std::vector<qm::F16>(65 * 72), {65, 72});
    EXPECT_EQ(Kernel()->matmul(call.get(), view.get(), &x, nullptr, &y), QM_UNIMPLEMENTED);
  }
}

TEST_F(Cuda, RowsThatAreNotFiniteBecomeNanAndZerosStay) {
  for (const Spec& spec : AllParameters(32, 64)) {
    if (!spec.activations) continue;
    const PackedWeight weight = RandomWeight(spec);
    FakeCall owner(kGpu);
    const DeviceView view(&owner, weight);
    std::vector<float> x = RandomVector(4 * 64);
    std::fill_n(x.begin(), 64, 0.0f);
    x[64 + 9] = std::nanf("");
    x[128 + 9] = INFINITY;
    const std::vector<float> y = Multiply(view.get(), x, 4);
    for (int i = 0; i < 32; ++i) {
      EXPECT_EQ(y[i], 0.0f);
      EXPECT_TRUE(std::isnan(y[32 + i]));
      EXPECT_TRUE(std::isnan(y[64 + i]));
      EXPECT_TRUE(std::isfinite(y[96 + i]));
    }
  }
}

TEST_F(Cuda, EqualInputsGiveEqualBytes) {
  const PackedWeight weight = RandomWeight({DType::kI8, 200, 4096});
  FakeCall owner(kGpu);
  const DeviceView view(&owner, weight);
  std::vector<qm::F16> x;
  for (const float value : RandomVector(16 * 4096)) x.push_back(qm::ToF16(value));
  const std::vector<qm::F16> first = Multiply(view.get(), x, 16);
  for (int i = 0; i < 5; ++i) {
    const std::vector<qm::F16> again = Multiply(view.get(), x, 16);
    EXPECT_EQ(std::memcmp(first.data(), again.data(), first.size() * 2), 0);
  }
}

}  // namespace
}  // namespace eetq_testing

#endif  // defined(QM_HAVE_CUDA)
