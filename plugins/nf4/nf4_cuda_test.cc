// CUDA kernels against the CPU path and the reference of core/formats.
#include "gtest/gtest.h"
#include "nf4_test_util.h"

#if defined(QM_HAVE_CUDA)
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstring>

namespace nf4_testing {
namespace {

constexpr qm_device kGpu = {QM_CUDA, 0};

class Nf4Cuda : public ::testing::Test {
 protected:
  void SetUp() override {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess || count == 0) GTEST_SKIP() << "no GPU: " << cudaGetErrorString(error);
  }
};

void Wait(FakeCall* call) {
  ASSERT_EQ(cudaStreamSynchronize(static_cast<cudaStream_t>(call->get()->cuda_stream)),
            cudaSuccess);
}

template <class T>
std::vector<T> Vector(const Tensor& t) {
  return {t.as<T>(), t.as<T>() + t.elements()};
}

// A qm_packed over device copies that live as long as `call`.
class DeviceView {
 public:
  DeviceView(FakeCall* call, const PackedWeight& weight) {
    for (const auto& named : weight.tensors) {
      const Tensor& t = named.tensor;
      const std::vector<int64_t> shape = {t.elements()};
      tensors_.push_back({named.name.c_str(), t.dtype() == DType::kU8
                                                  ? call->Tensor(Vector<uint8_t>(t), shape)
                                                  : call->Tensor(Vector<float>(t), shape)});
    }
    packed_ = {weight.format_id.c_str(), weight.format_json.c_str(), tensors_.data(),
               tensors_.size(),          weight.out_features,        weight.in_features};
    Wait(call);
  }
  const qm_packed* get() const { return &packed_; }

 private:
  std::vector<qm_named_tensor> tensors_;
  qm_packed packed_;
};

// A weight as it is, and as prepacking returns it where the layout fits.
class Layouts {
 public:
  explicit Layouts(const PackedWeight& weight)
      : owner_(kGpu), prepack_(kGpu), view_(&owner_, weight) {
    packed_.push_back(view_.get());
    const bool fits = weight.in_features % 64 == 0 &&
                      weight.format_json.find("\"block_size\":32,") == std::string::npos;
    const qm_status status = Kernel().prepack(prepack_.get(), view_.get(), &tiles_);
    EXPECT_EQ(status, fits ? QM_OK : QM_UNIMPLEMENTED) << prepack_.error();
    if (status == QM_OK) packed_.push_back(&tiles_);
    Wait(&prepack_);
  }
  const std::vector<const qm_packed*>& get() const { return packed_; }

 private:
  FakeCall owner_, prepack_;
  DeviceView view_;
  qm_packed tiles_ = {};
  std::vector<const qm_packed*> packed_;
};

template <class T>
void ExpectSame(FakeCall& gpu, const PackedWeight& cpu, const char* name) {
  EXPECT_EQ(gpu.Read<T>(0, name), Vector<T>(*cpu.Find(name))) << name;
}

TEST_F(Nf4Cuda, EmitsTheBytesOfTheCpu) {
  for (const ShapeCase& shape : kShapes) {
    for (const Setting& setting : Settings()) {
      const PackedWeight cpu = RandomWeight(shape.rows, shape.columns, setting);
      SCOPED_TRACE(testing::Message()
                   << cpu.format_json << " " << shape.rows << "x" << shape.columns);
      FakeCall gpu(kGpu);
      Apply(setting, &gpu);
      qm_packed packed = {};
      ASSERT_EQ(Quantize(gpu, Info(shape.rows, shape.columns),
                         Gaussian(shape.rows * shape.columns, 1), &packed),
                QM_OK)
          << gpu.error();
      EXPECT_EQ(cpu.format_json, packed.format_json);
      ExpectSame<uint8_t>(gpu, cpu, "codes");
      ExpectSame<float>(gpu, cpu, "codebook");
      if (!setting.double_quant) {
        ExpectSame<float>(gpu, cpu, "absmax");
        continue;
      }
      ExpectSame<uint8_t>(gpu, cpu, "absmax");
      ExpectSame<float>(gpu, cpu, "nested_absmax");
      ExpectSame<float>(gpu, cpu, "nested_codebook");
      ExpectSame<float>(gpu, cpu, "absmax_offset");
    }
  }
}

TEST_F(Nf4Cuda, StaysWithinThePlansScratch) {
  for (const Setting& setting : Settings()) {
    FakeCall plan_call(kGpu), run(kGpu);
    Apply(setting, &plan_call);
    Apply(setting, &run);
    const qm_linear_info info = Info(130, 200);
    qm_quant_plan plan = {};
    plan.struct_size = sizeof plan;
    ASSERT_EQ(Quantizer().plan(plan_call.get(), &info, &plan), QM_OK) << plan_call.error();
    run.ScratchLimit(plan.scratch_bytes);
    qm_packed packed = {};
    EXPECT_EQ(Quantize(run, info, Gaussian(130 * 200, 5), &packed), QM_OK) << run.error();
  }
}

TEST_F(Nf4Cuda, ZeroBlocksAndBadWeights) {
  for (const Setting& setting : Settings()) {
    std::vector<float> w(8 * 100);
    const PackedWeight cpu = [&] {
      FakeCall call;
      Apply(setting, &call);
      qm_packed packed = {};
      EXPECT_EQ(Quantize(call, Info(8, 100), w, &packed), QM_OK);
      return Keep(packed);
    }();
    FakeCall gpu(kGpu), bad(kGpu);
    Apply(setting, &gpu);
    qm_packed packed = {};
    ASSERT_EQ(Quantize(gpu, Info(8, 100), w, &packed), QM_OK) << gpu.error();
    ExpectSame<uint8_t>(gpu, cpu, "codes");
    w[3 * 100 + 7] = INFINITY;
    w[5 * 100] = NAN;
    Apply(setting, &bad);
    EXPECT_EQ(Quantize(bad, Info(8, 100), w, &packed), QM_INVALID_ARGUMENT);
    EXPECT_NE(bad.error().find("row 3, column 7"), std::string::npos) << bad.error();
  }
}

TEST_F(Nf4Cuda, DequantizeEqualsTheReferenceBitForBit) {
  for (const ShapeCase& shape : kShapes) {
    for (const Setting& setting : Settings()) {
      const PackedWeight weight = RandomWeight(shape.rows, shape.columns, setting);
      SCOPED_TRACE(testing::Message()
                   << weight.format_json << " " << shape.rows << "x" << shape.columns);
      const Layouts layouts(weight);
      for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
        Tensor expected = *Tensor::Host(dtype, {shape.rows, shape.columns});
        ASSERT_TRUE(quantmill::DequantizeCodebookAbsmaxReference(weight, &expected).ok());
        const std::vector<int64_t> dims = {shape.rows, shape.columns};
        const size_t count = static_cast<size_t>(expected.elements());
        for (const qm_packed* packed : layouts.get()) {
          FakeCall call(kGpu);
          qm_tensor out = dtype == DType::kF32   ? call.Tensor(std::vector<float>(count), dims)
                          : dtype == DType::kF16 ? call.Tensor(std::vector<qm::F16>(count), dims)
                                                 : call.Tensor(std::vector<qm::BF16>(count), dims);
          ASSERT_EQ(Kernel().dequantize(call.get(), packed, &out), QM_OK) << call.error();
          Wait(&call);
          std::vector<uint8_t> actual(static_cast<size_t>(expected.bytes()));
          ASSERT_EQ(cudaMemcpy(actual.data(), out.data, actual.size(), cudaMemcpyDeviceToHost),
                    cudaSuccess);
          EXPECT_EQ(std::memcmp(expected.data(), actual.data(), actual.size()), 0)
              << packed->tensors[0].name;
        }
      }
    }
  }
}

template <class T>
T FromFloat(float value);
template <>
float FromFloat<float>(float value) {
  return value;
}
template <>
qm::F16 FromFloat<qm::F16>(float value) {
  return qm::ToF16(value);
}
template <>
qm::BF16 FromFloat<qm::BF16>(float value) {
  return qm::ToBF16(value);
}
float Widen(float value) { return value; }
float Widen(qm::F16 value) { return qm::ToFloat(value); }
float Widen(qm::BF16 value) { return qm::ToFloat(value); }

// Half a unit in the last place of the result, relative.
template <class T>
double Rounding() {
  return std::is_same_v<T, float> ? 0x1p-24 : std::is_same_v<T, qm::F16> ? 0x1p-11 : 0x1p-8;
}

// f32 sums of `in` products, in any order, rounded once to T; on tensor cores (prepacked) values of
// the codebook are rounded to T too.
template <class T>
void ExpectProduct(const PackedWeight& weight, const qm_packed* packed, int64_t rows) {
  SCOPED_TRACE(packed->tensors[0].name);
  const int64_t in = weight.in_features, out = weight.out_features;
  std::vector<float> x = Gaussian(rows * in, 9, 1.0f);
  std::vector<T> rounded;
  for (float& value : x) {
    rounded.push_back(FromFloat<T>(value));
    value = Widen(rounded.back());
  }
  const Product want = ReferenceProduct(x, ReferenceWeight(weight), rows, in, out);
  FakeCall call(kGpu);
  const qm_tensor input = call.Tensor(rounded, {rows, in});
  qm_tensor output =
      call.Tensor(std::vector<T>(static_cast<size_t>(rows * out), FromFloat<T>(NAN)), {rows, out});
  ASSERT_EQ(Kernel().matmul(call.get(), packed, &input, nullptr, &output), QM_OK) << call.error();
  const std::vector<T> seen = call.Read<T>(output);
  const bool tiles = std::strcmp(packed->tensors[0].name, "tiles") == 0;
  const double per_term = static_cast<double>(in + 2) * 0x1p-24 +
                          (tiles && !std::is_same_v<T, float> ? Rounding<T>() : 0.0);
  for (size_t i = 0; i < seen.size(); ++i) {
    const double bound =
        Rounding<T>() * (std::abs(want.value[i]) + 1e-4) + per_term * want.magnitude[i];
    ASSERT_NEAR(Widen(seen[i]), want.value[i], bound)
        << "row " << i / static_cast<size_t>(out) << ", output " << i % static_cast<size_t>(out);
  }
}

TEST_F(Nf4Cuda, ProductsEqualTheReferenceWithinRounding) {
  for (const ShapeCase& shape : kShapes) {
    for (const Setting& setting : Settings()) {
      const PackedWeight weight = RandomWeight(shape.rows, shape.columns, setting);
      const Layouts layouts(weight);
      for (const int64_t rows : {1, 2, 3, 4, 5, 8, 9, 15, 16}) {
        SCOPED_TRACE(testing::Message() << weight.format_json << " " << shape.rows << "x"
                                        << shape.columns << " rows " << rows);
        for (const qm_packed* packed : layouts.get()) {
          ExpectProduct<float>(weight, packed, rows);
          ExpectProduct<qm::F16>(weight, packed, rows);
          ExpectProduct<qm::BF16>(weight, packed, rows);
        }
      }
    }
  }
}

// More tiles of outputs than blocks, parts of a tile, numbers of chunks that do not divide, blocks
// that go on in the next row.
TEST_F(Nf4Cuda, PrepackedProductsOfManyTiles) {
  for (const ShapeCase& shape : {ShapeCase{6410, 64}, ShapeCase{37, 1344}, ShapeCase{20, 8192}}) {
    for (const Setting& setting : Settings()) {
      const PackedWeight weight = RandomWeight(shape.rows, shape.columns, setting);
      const Layouts layouts(weight);
      for (const int64_t rows : {1, 7, 16}) {
        SCOPED_TRACE(testing::Message() << weight.format_json << " " << shape.rows << "x"
                                        << shape.columns << " rows " << rows);
        ExpectProduct<qm::F16>(weight, layouts.get().back(), rows);
        ExpectProduct<qm::BF16>(weight, layouts.get().back(), rows);
      }
    }
  }
}

// Ranges of a number of factors that is no power of two, as no writer makes them.
TEST_F(Nf4Cuda, PrepacksOddRangesAsFloats) {
  PackedWeight weight = RandomWeight(64, 256, {false, 64, true});
  const std::string from = "\"nested_block_size\":256", to = "\"nested_block_size\":96";
  const size_t at = weight.format_json.find(from);
  ASSERT_NE(at, std::string::npos) << weight.format_json;
  weight.format_json.replace(at, from.size(), to);
  for (auto& named : weight.tensors) {
    if (named.name != "nested_absmax") continue;
    const float first = named.tensor.as<float>()[0];
    Tensor ranges = *Tensor::Host(DType::kF32, {3});
    for (int i = 0; i < 3; ++i) ranges.as<float>()[i] = first * (1.0f + 0.3f * i);
    named.tensor = std::move(ranges);
  }
  const Layouts layouts(weight);
  ASSERT_EQ(layouts.get().size(), 2u);
  for (const qm_packed* packed : layouts.get()) {
    for (const int64_t rows : {1, 9}) ExpectProduct<qm::F16>(weight, packed, rows);
    ExpectProduct<float>(weight, packed, 3);
  }
}

TEST_F(Nf4Cuda, PrepacksOnceAndForTheGpuAlone) {
  const PackedWeight weight = RandomWeight(8, 64, {});
  const Layouts layouts(weight);
  FakeCall again(kGpu);
  qm_packed out = {};
  EXPECT_EQ(Kernel().prepack(again.get(), layouts.get().back(), &out), QM_FAILED_PRECONDITION);
  // Nothing is written from it.
  FakeCall check;
  EXPECT_EQ(Format().check(check.get(), layouts.get().back()), QM_INVALID_ARGUMENT);
}

TEST_F(Nf4Cuda, LeavesManyRowsToTheHost) {
  const PackedWeight weight = RandomWeight(8, 64, {});
  FakeCall call(kGpu);
  const DeviceView view(&call, weight);
  const qm_tensor x = call.Tensor(std::vector<qm::BF16>(17 * 64), {17, 64});
  qm_tensor y = call.Tensor(std::vector<qm::BF16>(17 * 8), {17, 8});
  EXPECT_EQ(Kernel().matmul(call.get(), view.get(), &x, nullptr, &y), QM_UNIMPLEMENTED);
}

}  // namespace
}  // namespace nf4_testing
#endif
