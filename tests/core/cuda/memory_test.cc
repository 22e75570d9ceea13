// Memory, copies, conversions, and the errors of the CUDA backend.
#include <array>
#include <limits>
#include <memory>

#include "core/cuda/cuda_status.h"
#include "tests/core/cuda/support.h"

namespace quantmill::testing {
namespace {

class CudaMemoryTest : public CudaTest {};
QM_CUDA_TEST_SUITE(CudaMemoryTest);

TEST(CudaErrorTest, ErrorsThatEndTheProcessAreRecognised) {
  const absl::Status lost =
      cuda::CudaStatus(cudaErrorIllegalAddress, "Launch(x)", "/src/core/cuda/a.cc", 7);
  EXPECT_EQ(lost.code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(lost.message()), ::testing::HasSubstr("core/cuda/a.cc:7: Launch(x)"));
  EXPECT_THAT(std::string(lost.message()), ::testing::HasSubstr("cudaErrorIllegalAddress"));
  for (cudaError_t error : {cudaErrorLaunchFailure, cudaErrorMisalignedAddress, cudaErrorAssert,
                            cudaErrorECCUncorrectable, cudaErrorIllegalInstruction}) {
    EXPECT_EQ(cuda::CudaStatus(error, "f()", "a.cc", 1).code(), absl::StatusCode::kDataLoss);
  }
  const absl::Status memory = cuda::CudaStatus(cudaErrorMemoryAllocation, "f()", "a.cc", 1);
  EXPECT_EQ(memory.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(cuda::CudaStatus(cudaErrorInvalidValue, "f()", "a.cc", 1).code(),
            absl::StatusCode::kInternal);
}

TEST(CudaErrorTest, LibraryErrorsAreNamed) {
  const absl::Status blas = cuda::CublasStatus(CUBLAS_STATUS_INVALID_VALUE, "cublasX()", "a.cc", 1);
  EXPECT_EQ(blas.code(), absl::StatusCode::kInternal);
  EXPECT_THAT(std::string(blas.message()), ::testing::HasSubstr("CUBLAS_STATUS_INVALID_VALUE"));
  const absl::Status solver =
      cuda::CusolverStatus(CUSOLVER_STATUS_ALLOC_FAILED, "cusolverX()", "a.cc", 1);
  EXPECT_EQ(solver.code(), absl::StatusCode::kResourceExhausted);
}

TEST(MakeCudaBackendTest, AGpuThatIsNotThereIsUnavailable) {
  const auto made = MakeCudaBackend(1000, DType::kF32, 1);
  EXPECT_EQ(made.status().code(), absl::StatusCode::kUnavailable) << made.status().ToString();
  EXPECT_THAT(std::string(made.status().message()), ::testing::HasSubstr("cuda:1000"));
}

// A launch asks the runtime for its last error, so that one left behind would be blamed on it.
TEST(MakeCudaBackendTest, AGpuThatIsNotThereLeavesNoErrorBehind) {
  const absl::StatusOr<Backend*> gpu = CudaOrWhyNot(DType::kF32);
  if (!gpu.ok()) GTEST_SKIP() << gpu.status().message();
  EXPECT_FALSE(MakeCudaBackend(1000, DType::kF32, 1).ok());
  EXPECT_EQ(cudaPeekAtLastError(), cudaSuccess);
}

TEST(MakeCudaBackendTest, ActivationsMustBeAFloatType) {
  EXPECT_EQ(MakeCudaBackend(0, DType::kI8, 1).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST_P(CudaMemoryTest, DescribesItself) {
  EXPECT_TRUE(cuda().device().is_cuda());
  EXPECT_EQ(cuda().activation_dtype(), dtype());
  EXPECT_GE(cuda().sm(), 80);
  EXPECT_NE(cuda().stream(), nullptr);
  EXPECT_NE(cuda().cublas_handle(), nullptr);
}

TEST_P(CudaMemoryTest, AllocatesAlignedAndCountsThePeak) {
  const int64_t before = cuda().peak_device_bytes();
  const int64_t bytes = std::max<int64_t>(before, 1 << 20);
  {
    const Tensor a = cuda().Allocate(DType::kU8, {bytes}).value();
    const Tensor b = cuda().Allocate(DType::kU8, {3}).value();
    const Tensor none = cuda().Allocate(dtype(), {0, 5}).value();
    for (const Tensor& tensor : {a, b, none}) {
      EXPECT_NE(tensor.data(), nullptr);
      EXPECT_EQ(reinterpret_cast<uintptr_t>(tensor.data()) % 256, 0u);
    }
  }
  EXPECT_GE(cuda().peak_device_bytes(), bytes);
}

TEST_P(CudaMemoryTest, TooMuchNamesTheBytes) {
  const absl::Status status = cuda().Allocate(DType::kU8, {int64_t{1} << 50}).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status.ToString();
  EXPECT_THAT(std::string(status.message()), ::testing::HasSubstr("1125899906842624 bytes"));
  EXPECT_THAT(std::string(status.message()), ::testing::HasSubstr("are free"));
  // And the backend still works.
  Tensor small = cuda().Allocate(DType::kF32, {4}).value();
  QM_EXPECT_OK(cuda().Zero(&small));
  QM_EXPECT_OK(cuda().Synchronize());
}

TEST_P(CudaMemoryTest, ZeroWritesEveryByte) {
  Tensor tensor = Poisoned({7, 13});
  QM_EXPECT_OK(cuda().Zero(&tensor));
  for (double value : Values(OnHost(tensor))) EXPECT_EQ(value, 0);
}

TEST_P(CudaMemoryTest, CopiesPiecesAsTheCpuDoes) {
  const std::unique_ptr<Backend> cpu = MakeCpuBackend(1).value();
  for (const auto& [rows, capacity, width] :
       {std::array<int64_t, 3>{1, 1, 1}, {1, 9, 128}, {3, 7, 5}, {2, 2, 64}}) {
    constexpr int64_t kPieces = 33;
    const Tensor source = RandomTensor({kPieces * rows, width}, 1, dtype());
    const Tensor before = RandomTensor({kPieces * capacity, width}, 2, dtype());
    for (int64_t begin = 0; begin + rows <= capacity; ++begin) {
      Tensor target = OnGpu(before), expected = Clone(before);
      QM_ASSERT_OK(cuda().CopyPieces(OnGpu(source), kPieces, begin, &target));
      QM_ASSERT_OK(cpu->CopyPieces(source, kPieces, begin, &expected));
      EXPECT_TRUE(SameBytes(OnHost(target), expected)) << rows << " " << capacity << " " << begin;
    }
    Tensor target = OnGpu(before);
    EXPECT_FALSE(cuda().CopyPieces(OnGpu(source), kPieces, capacity, &target).ok());
    EXPECT_FALSE(cuda().CopyPieces(source, kPieces, 0, &target).ok());
  }
}

TEST_P(CudaMemoryTest, LargeCopiesGoThroughTheStagingBuffersWhole) {
  // More than two staging buffers, and not a multiple of one.
  Tensor source = Tensor::Host(DType::kI32, {5 * (1 << 20) + 17}).value();
  for (int64_t i = 0; i < source.elements(); ++i) {
    source.as<int32_t>()[i] = static_cast<int32_t>(i * 2654435761u);
  }
  const Tensor gpu = OnGpu(source);
  Tensor moved = Poisoned(source.shape(), DType::kI32);
  QM_EXPECT_OK(cuda().Copy(gpu, &moved));
  EXPECT_TRUE(SameBytes(OnHost(moved), source));
}

TEST_P(CudaMemoryTest, ConvertsAmongFloatTypesInEveryDirection) {
  std::vector<float> values = {
      0.0f,  -0.0f,         1.0f,         65504.0f, 65520.0f,
      1e-8f, 5.9604645e-8f, -3.14159265f, 1e38f,    std::numeric_limits<float>::infinity()};
  for (int i = 0; i < 1000; ++i) values.push_back(std::ldexp(1.0f + i * 0.00097f, i % 30 - 20));
  const auto count = static_cast<int64_t>(values.size());
  for (DType from : {DType::kF32, DType::kF16, DType::kBF16}) {
    Tensor source = Tensor::Host(from, {count}).value();
    for (int64_t i = 0; i < count; ++i) {
      StoreElement(from, values[static_cast<size_t>(i)], source.data(), i);
    }
    for (DType to : {DType::kF32, DType::kF16, DType::kBF16}) {
      Tensor expected = Tensor::Host(to, {count}).value();
      for (int64_t i = 0; i < count; ++i) {
        StoreElement(to, LoadElement(from, source.data(), i), expected.data(), i);
      }
      Tensor on_gpu = Poisoned({count}, to);
      QM_EXPECT_OK(cuda().Copy(source, &on_gpu));  // up
      EXPECT_TRUE(SameBytes(OnHost(on_gpu), expected));
      Tensor across = Poisoned({count}, to);
      QM_EXPECT_OK(cuda().Copy(OnGpu(source), &across));
      EXPECT_TRUE(SameBytes(OnHost(across), expected));
      Tensor down = Garbage({count}, to);
      QM_EXPECT_OK(cuda().Copy(OnGpu(source), &down));
      EXPECT_TRUE(SameBytes(down, expected));
      Tensor on_host = Garbage({count}, to);
      QM_EXPECT_OK(cuda().Copy(source, &on_host));
      EXPECT_TRUE(SameBytes(on_host, expected));
    }
  }
}

TEST_P(CudaMemoryTest, UnalignedPartsConvertToo) {
  const Tensor source = RandomTensor({11, 3}, 1);
  const Tensor gpu = OnGpu(source);
  Tensor target = Poisoned({11, 3});
  Tensor part = target.Rows(1, 10);
  QM_EXPECT_OK(cuda().Copy(gpu.Rows(1, 10), &part));
  Tensor expected = Garbage({9, 3}, dtype());
  QM_EXPECT_OK(Cpu().Copy(source.Rows(1, 10), &expected));
  EXPECT_TRUE(SameBytes(OnHost(part), expected));
}

TEST_P(CudaMemoryTest, RefusesWhatDoesNotFit) {
  const Tensor three = OnGpu(RandomTensor({3}, 1));
  Tensor four = Poisoned({4}, DType::kF32);
  ExpectInvalid(cuda().Copy(three, &four), "unequal numbers of elements");
  Tensor integers = Poisoned({3}, DType::kI32);
  ExpectInvalid(cuda().Copy(three, &integers), "cannot convert F32 to I32");
  ExpectInvalid(cuda().Copy(three, nullptr), "null");
  Tensor nothing;
  ExpectInvalid(cuda().Zero(nullptr), "null");
  Tensor host = Garbage({3});
  ExpectInvalid(cuda().Zero(&host), "cpu");
  ExpectInvalid(cuda().Allocate(DType::kF32, {-1}).status(), "negative");
  const Tensor elsewhere(nullptr, three.data(), DType::kF32, {3}, Device{QM_CUDA, 99});
  ExpectInvalid(cuda().Copy(elsewhere, &host), "cuda:99");
  ExpectInvalid(cuda().ToDevice(elsewhere).status(), "cuda:99");
}

}  // namespace
}  // namespace quantmill::testing
