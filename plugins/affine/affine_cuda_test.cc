// CUDA kernels against the reference of core/formats, and the tile layout, which needs no GPU.
#include <set>

#include "affine_test_util.h"
#include "affine_tiles.h"
#include "gtest/gtest.h"

#if defined(QM_HAVE_CUDA)
#include <cuda_runtime_api.h>
#endif

namespace affine_testing {
namespace {

TEST(Tiles, PlaceEveryBitInItsOwnField) {
  constexpr int64_t kIn = 320;
  for (int bits : {2, 3, 4, 8}) {
    const int64_t chunks = affine::TileChunks(kIn);
    const int64_t words = 2 * chunks * affine::kChunkUnits * affine::UnitWords(bits);
    std::set<std::pair<int64_t, int>> places;
    const auto take = [&](int64_t word, int shift, int count) {
      EXPECT_LT(word, words);
      EXPECT_LE(shift + count, 32);
      for (int i = 0; i < count; ++i) EXPECT_TRUE(places.insert({word, shift + i}).second);
    };
    for (int64_t row = 0; row < 32; ++row) {
      for (int64_t channel = 0; channel < kIn; ++channel) {
        const affine::TilePlace place = affine::LocateTile(bits, chunks, row, channel);
        take(place.word, place.shift, bits == 3 ? 2 : bits);
        ASSERT_EQ(place.high_word >= 0, bits == 3);
        if (bits == 3) take(place.high_word, place.high_shift, 1);
      }
    }
    EXPECT_EQ(places.size(), 32 * kIn * bits);
  }
}

#if defined(QM_HAVE_CUDA)

using Zero = AffineIntParams::Zero;
using qm::testing::FakeCall;

constexpr qm_device kGpu = {QM_CUDA, 0};

class Cuda : public ::testing::Test {
 protected:
  void SetUp() override {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess || count == 0) GTEST_SKIP() << "no GPU: " << cudaGetErrorString(error);
  }
};

// A qm_packed over device copies that live as long as `call`.
// Calls have streams of their own: what one makes must be there before another takes it.
void Wait(FakeCall* call) {
  ASSERT_EQ(cudaStreamSynchronize(static_cast<cudaStream_t>(call->get()->cuda_stream)),
            cudaSuccess);
}

class DeviceView {
 public:
  DeviceView(FakeCall* call, const PackedWeight& weight) {
    for (const auto& named : weight.tensors) {
      const Tensor& t = named.tensor;
      const std::vector<int64_t> shape(t.shape().extents().begin(), t.shape().extents().end());
      tensors_.push_back({named.name.c_str(), Upload(call, t, shape)});
    }
    packed_ = {weight.format_id.c_str(), weight.format_json.c_str(), tensors_.data(),
               tensors_.size(),          weight.out_features,        weight.in_features};
  }
  const qm_packed* get() const { return &packed_; }

 private:
  static qm_tensor Upload(FakeCall* call, const Tensor& t, const std::vector<int64_t>& shape) {
    switch (t.dtype()) {
      case DType::kF32:
        return call->Tensor(Vector<float>(t), shape);
      case DType::kF16:
        return call->Tensor(Vector<qm::F16>(t), shape);
      case DType::kBF16:
        return call->Tensor(Vector<qm::BF16>(t), shape);
      case DType::kU8:
        return call->Tensor(Vector<uint8_t>(t), shape);
      default:
        return call->Tensor(Vector<int32_t>(t), shape);
    }
  }
  template <class T>
  static std::vector<T> Vector(const Tensor& t) {
    return {t.as<T>(), t.as<T>() + t.elements()};
  }
  std::vector<qm_named_tensor> tensors_;
  qm_packed packed_;
};

std::vector<WeightSpec> CudaSpecs() {
  std::vector<WeightSpec> specs;
  for (int bits : {2, 3, 4, 8}) {
    for (Zero zero : {Zero::kNone, Zero::kInt, Zero::kFloat}) {
      specs.push_back({200, 512, {bits, 128, zero}, DType::kF16, false, 0});
      specs.push_back({33, 96, {bits, 32, zero}, DType::kF32, false, 0});
      specs.push_back({64, 1088, {bits, -1, zero}, DType::kBF16, false, 0});
    }
    specs.push_back({48, 512, {bits, 64, Zero::kInt}, DType::kF16, true, 0});
    specs.push_back({5, 100, {bits, 5, Zero::kInt}, DType::kF16, false, 0});  // no tiles
  }
  for (int bits : {1, 2, 3, 4, 8}) {
    specs.push_back({200, 512, {bits, 64, Zero::kQ8, 1, true}, DType::kF16, false, 0});
    specs.push_back({64, 192, {bits, 16, Zero::kFloat, 0}, DType::kF16, false, 0});
    specs.push_back({64, 45, {bits, 16, Zero::kQ8, 0, true}, DType::kF16, false, 0});
  }
  specs.push_back({200, 512, {1, 64, Zero::kFloat}, DType::kBF16, false, 0});
  // Groups that end inside chunks; long rows, whose channels several blocks split.
  specs.push_back({31, 672, {4, 96, Zero::kFloat}, DType::kF32, false, 0});
  specs.push_back({16, 4448, {3, 32, Zero::kInt}, DType::kBF16, false, 0});
  specs.push_back({130, 8704, {4, 128, Zero::kNone}, DType::kBF16, false, 0});
  // Shapes for more strips of outputs (affine_tile_launch.cuh).
  specs.push_back({4300, 256, {4, 64, Zero::kInt}, DType::kF16, false, 0});
  specs.push_back({8500, 128, {3, 128, Zero::kInt}, DType::kF16, false, 0});
  specs.push_back({4300, 128, {8, -1, Zero::kNone}, DType::kF16, false, 0});
  return specs;
}

bool HasTiles(const WeightSpec& spec) { return spec.in % 32 == 0 && spec.params.axis == 1; }

void ExpectDequantized(const PackedWeight& weight, const qm_packed* packed) {
  for (DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    Tensor expected = *Tensor::Host(dtype, {weight.out_features, weight.in_features});
    ASSERT_TRUE(quantmill::DequantizeAffineIntReference(weight, &expected).ok());
    FakeCall call(kGpu);
    const std::vector<int64_t> shape = {weight.out_features, weight.in_features};
    const size_t count = expected.elements();
    std::vector<uint8_t> actual(expected.bytes());
    qm_tensor out = dtype == DType::kF32   ? call.Tensor(std::vector<float>(count), shape)
                    : dtype == DType::kF16 ? call.Tensor(std::vector<qm::F16>(count), shape)
                                           : call.Tensor(std::vector<qm::BF16>(count), shape);
    ASSERT_EQ(Kernel()->dequantize(call.get(), packed, &out), QM_OK) << call.error();
    ASSERT_EQ(cudaStreamSynchronize(static_cast<cudaStream_t>(call.get()->cuda_stream)),
              cudaSuccess);
    ASSERT_EQ(cudaMemcpy(actual.data(), out.data, actual.size(), cudaMemcpyDeviceToHost),
              cudaSuccess);
    EXPECT_EQ(std::memcmp(expected.data(), actual.data(), actual.size()), 0)
        << weight.format_json << " " << quantmill::DTypeName(dtype);
  }
}

TEST_F(Cuda, DequantizeEqualsTheReferenceBitForBit) {
  for (const WeightSpec& spec : CudaSpecs()) {
    const PackedWeight weight = RandomWeight(spec);
    SCOPED_TRACE(weight.format_json);
    FakeCall owner(kGpu);
    const DeviceView view(&owner, weight);
    ExpectDequantized(weight, view.get());
    FakeCall prepack(kGpu);
    qm_packed tiles;
    const qm_status status = Kernel()->prepack(prepack.get(), view.get(), &tiles);
    ASSERT_EQ(status, HasTiles(spec) ? QM_OK : QM_UNIMPLEMENTED) << prepack.error();
    Wait(&prepack);
    if (status == QM_OK) ExpectDequantized(weight, &tiles);
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

template <class T>
std::vector<T> Product(const PackedWeight& weight, const qm_packed* packed, const std::vector<T>& x,
                       int64_t rows) {
  FakeCall call(kGpu);
  const qm_tensor input = call.Tensor(x, {rows, weight.in_features});
  qm_tensor output =
      call.Tensor(std::vector<T>(rows * weight.out_features), {rows, weight.out_features});
  const uint64_t bytes = Kernel()->workspace_bytes(packed, rows);
  void* workspace = bytes == 0 ? nullptr : call.get()->scratch(call.get(), kGpu, bytes);
  EXPECT_EQ(Kernel()->matmul(call.get(), packed, &input, workspace, &output), QM_OK)
      << call.error();
  return call.template Read<T>(output);
}

// Codes less a bias, times x, are exact in f32 products; sums of at most `in` such terms are off by
// in * 2^-23 of the largest magnitudes that occur (tensor cores truncate), which scale * 2^bits *
// |x| bounds; then the result is rounded once. Products with many rows round code - zero point to T
// first, where the zero point is no integer, and the zero point itself.
template <class T>
void ExpectProduct(const PackedWeight& weight, const qm_packed* packed, int64_t rows) {
  const int64_t in = weight.in_features, out = weight.out_features;
  const bool integers = weight.format_json.find("\"zero\":\"none\"") != std::string::npos ||
                        weight.format_json.find("\"zero\":\"int\"") != std::string::npos;
  std::vector<float> x = RandomVector(rows * in);
  std::vector<T> rounded(x.size());
  double magnitude = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    rounded[i] = FromFloat<T>(x[i]);
    x[i] = Widen(rounded[i]);
  }
  const std::vector<float> dense = ReferenceWeight(weight);
  const auto expected = ReferenceProduct(x, dense, rows, in, out);
  const std::vector<T> actual = Product(weight, packed, rounded, rows);
  for (int64_t r = 0; r < rows; ++r) {
    magnitude = 0;
    for (int64_t i = 0; i < in; ++i) magnitude += std::abs(x[r * in + i]);
    magnitude *= 0.011 * 256;  // the largest scale and code RandomWeight makes
    for (int64_t o = 0; o < out; ++o) {
      const double value = expected.value[r * out + o];
      const double operands = integers ? 0 : 2 * expected.magnitude[r * out + o];
      const double bound = Rounding<T>() * (std::abs(value) + operands) +
                           static_cast<double>(in) * 0x1p-23 * magnitude / 8;
      ASSERT_NEAR(Widen(actual[r * out + o]), value, bound)
          << weight.format_json << " rows " << rows << " row " << r << " output " << o;
    }
  }
}

TEST_F(Cuda, MatmulEqualsTheReferenceWithinRounding) {
  for (const WeightSpec& spec : CudaSpecs()) {
    const PackedWeight weight = RandomWeight(spec);
    FakeCall owner(kGpu), prepack(kGpu);
    const DeviceView view(&owner, weight);
    for (int64_t rows : {1, 8}) {
      ExpectProduct<float>(weight, view.get(), rows);
      ExpectProduct<qm::F16>(weight, view.get(), rows);
      ExpectProduct<qm::BF16>(weight, view.get(), rows);
    }
    qm_packed tiles;
    if (Kernel()->prepack(prepack.get(), view.get(), &tiles) != QM_OK) continue;
    Wait(&prepack);
    ExpectProduct<float>(weight, &tiles, 3);
    for (int64_t rows : {1, 2, 7, 8, 9, 16, 17, 32, 33, 64, 65, 129, 256}) {
      ExpectProduct<qm::F16>(weight, &tiles, rows);
      ExpectProduct<qm::BF16>(weight, &tiles, rows);
    }
  }
}

TEST_F(Cuda, MatmulGivesTheSameBytesEachTime) {
  const PackedWeight weight = RandomWeight({128, 4096, {4, 128, Zero::kInt}});
  FakeCall owner(kGpu), prepack(kGpu);
  const DeviceView view(&owner, weight);
  qm_packed tiles;
  ASSERT_EQ(Kernel()->prepack(prepack.get(), view.get(), &tiles), QM_OK) << prepack.error();
  Wait(&prepack);
  for (int64_t rows : {1, 16, 64, 100}) {
    std::vector<qm::F16> x(rows * 4096);
    const std::vector<float> values = RandomVector(rows * 4096);
    for (size_t i = 0; i < x.size(); ++i) x[i] = qm::ToF16(values[i]);
    const auto first = Product(weight, &tiles, x, rows);
    for (int i = 0; i < 10; ++i) {
      const auto again = Product(weight, &tiles, x, rows);
      EXPECT_EQ(std::memcmp(first.data(), again.data(), first.size() * 2), 0) << rows << " rows";
    }
  }
}

// Products that each need the result of the one before and overwrite what it read, in a graph,
// where they may overlap: as one after the other.
TEST_F(Cuda, ProductsInAGraphWaitForEachOther) {
  constexpr int64_t kFeatures = 1024;
  constexpr int kProducts = 10;
  const PackedWeight weight = RandomWeight({kFeatures, kFeatures, {4, 128, Zero::kNone}});
  FakeCall owner(kGpu), prepack(kGpu);
  const DeviceView view(&owner, weight);
  qm_packed tiles;
  ASSERT_EQ(Kernel()->prepack(prepack.get(), view.get(), &tiles), QM_OK) << prepack.error();
  Wait(&prepack);
  for (int64_t rows : {1, 16, 64, 100}) {
    const std::vector<float> values = RandomVector(rows * kFeatures);
    std::vector<qm::F16> x(values.size());
    for (size_t i = 0; i < x.size(); ++i) x[i] = qm::ToF16(values[i]);
    FakeCall call(kGpu);
    const std::vector<int64_t> shape = {rows, kFeatures};
    const auto run = [&](bool wait, std::vector<qm_tensor>* buffers) {
      for (int i = 0; i < kProducts; ++i) {
        ASSERT_EQ(Kernel()->matmul(call.get(), &tiles, &(*buffers)[i % 2], nullptr,
                                   &(*buffers)[1 - i % 2]),
                  QM_OK)
            << call.error();
        if (wait) Wait(&call);
      }
    };
    std::vector<qm_tensor> one = {call.Tensor(x, shape), call.Tensor(x, shape)};
    run(true, &one);
    const std::vector<qm::F16> expected = call.Read<qm::F16>(one[0]);
    std::vector<qm_tensor> two = {call.Tensor(x, shape), call.Tensor(x, shape)};
    const auto stream = static_cast<cudaStream_t>(call.get()->cuda_stream);
    Wait(&call);
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), cudaSuccess);
    run(false, &two);
    ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
    ASSERT_EQ(cudaGraphInstantiate(&executable, graph, 0), cudaSuccess);
    ASSERT_EQ(cudaGraphLaunch(executable, stream), cudaSuccess);
    const std::vector<qm::F16> actual = call.Read<qm::F16>(two[0]);
    EXPECT_EQ(std::memcmp(expected.data(), actual.data(), actual.size() * 2), 0) << rows << " rows";
    cudaGraphExecDestroy(executable);
    cudaGraphDestroy(graph);
  }
}

TEST_F(Cuda, LeavesManyRowsToTheHost) {
  const PackedWeight weight = RandomWeight({});
  FakeCall owner(kGpu), call(kGpu);
  const DeviceView view(&owner, weight);
  const qm_tensor x = call.Tensor(RandomVector(9 * 128), {9, 128});
  qm_tensor y = call.Tensor(std::vector<float>(9 * 32), {9, 32});
  EXPECT_EQ(Kernel()->matmul(call.get(), view.get(), &x, nullptr, &y), QM_UNIMPLEMENTED);
}

#endif  // defined(QM_HAVE_CUDA)

}  // namespace
}  // namespace affine_testing
