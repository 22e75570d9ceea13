// InverseCholesky on the GPU: checked by its defining equation in f64, and against the CPU.
#include "core/base/status.h"
#include "tests/core/cuda/support.h"

namespace quantmill::testing {
namespace {

class CudaLinalgTest : public ::testing::Test {
 protected:
  void SetUp() override {
    const absl::StatusOr<Backend*> made = CudaOrWhyNot(DType::kF32);
    if (!made.ok()) GTEST_SKIP() << made.status().message();
    cuda_ = *made;
  }
  Tensor OnGpu(const Tensor& host) { return cuda_->ToDevice(host).value(); }
  // InverseCholesky of a host matrix, result on the host.
  absl::StatusOr<Tensor> Run(const Tensor& h, double damp) {
    const Tensor gpu = OnGpu(h);
    const Tensor out = OnGpu(Garbage(h.shape()));
    QM_RETURN_IF_ERROR(cuda_->InverseCholesky(gpu.View(), damp, out.View()));
    Tensor host = Garbage(h.shape());
    QM_RETURN_IF_ERROR(cuda_->Copy(out, &host));
    return host;
  }
  Backend* cuda_ = nullptr;
};

// X^T X of `rows` random rows.
Tensor Gram(int64_t n, int64_t rows) {
  const Tensor x = RandomTensor({rows, n}, 11);
  Tensor h = Tensor::HostZeros(DType::kF32, {n, n}).value();
  EXPECT_TRUE(Cpu().AccumulateGram(x, &h).ok());
  return h;
}

// Largest |U (H + damping) U^T - I|, in f64: U^T U = A^-1 means U A U^T = I.
double Defect(const Tensor& u, const Tensor& h, double damp) {
  const int64_t n = h.dim(0);
  double mean = 0;
  for (int64_t i = 0; i < n; ++i) mean += h.as<float>()[i * n + i] / static_cast<double>(n);
  std::vector<double> ua(static_cast<size_t>(n * n));
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = i; j < n; ++j) {
      const double uij = u.as<float>()[i * n + j];
      for (int64_t k = 0; k < n; ++k) {
        ua[i * n + k] += uij * (h.as<float>()[j * n + k] + (j == k ? damp * mean : 0));
      }
    }
  }
  double worst = 0;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0;
      for (int64_t k = j; k < n; ++k) sum += ua[i * n + k] * u.as<float>()[j * n + k];
      worst = std::max(worst, std::fabs(sum - (i == j ? 1 : 0)));
    }
  }
  return worst;
}

TEST_F(CudaLinalgTest, SatisfiesItsEquation) {
  for (int64_t n : {1, 2, 5, 31, 64, 100, 257}) {
    const Tensor h = Gram(n, 4 * n);
    const absl::StatusOr<Tensor> u = Run(h, 0.01);
    ASSERT_TRUE(u.ok()) << u.status().ToString();
    // A condition number of at most 9 (Marchenko-Pastur for 4 n rows), n roundings.
    EXPECT_LT(Defect(*u, h, 0.01), SumTolerance(n, 9.0 * 4)) << n;
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < i; ++j) ASSERT_EQ(u->as<float>()[i * n + j], 0.0f);
    }
  }
}

TEST_F(CudaLinalgTest, AgreesWithTheCpu) {
  constexpr int64_t n = 130;
  const Tensor h = Gram(n, 4 * n);
  const Tensor u = Run(h, 0.05).value();
  Tensor expected = Garbage({n, n});
  QM_ASSERT_OK(Cpu().InverseCholesky(h.View(), 0.05, expected.View()));
  ExpectWithin(u, expected, SumTolerance(n, 9 * MaxAbsOf(expected)));
}

TEST_F(CudaLinalgTest, StridedViewsAndAnUntouchedInput) {
  constexpr int64_t n = 20, wide = 27;
  const Tensor h = Gram(n, 100);
  Tensor padded = Garbage({n, wide});
  for (int64_t i = 0; i < n; ++i) {
    std::memcpy(padded.as<float>() + i * wide, h.as<float>() + i * n, n * sizeof(float));
  }
  const Tensor in = OnGpu(padded), out = OnGpu(Garbage({n, wide}));
  qm_tensor in_view = in.View(), out_view = out.View();
  in_view.shape[1] = out_view.shape[1] = n;
  QM_ASSERT_OK(cuda_->InverseCholesky(in_view, 0.01, out_view));
  Tensor result = Garbage({n, wide}), input = Garbage({n, wide});
  QM_ASSERT_OK(cuda_->Copy(out, &result));
  QM_ASSERT_OK(cuda_->Copy(in, &input));
  EXPECT_TRUE(SameBytes(input, padded));
  const Tensor dense = Run(h, 0.01).value();
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < wide; ++j) {
      const float value = result.as<float>()[i * wide + j];
      if (j < n) {
        EXPECT_EQ(value, dense.as<float>()[i * n + j]);
      } else {
        EXPECT_TRUE(std::isnan(value)) << "wrote beyond the view";
      }
    }
  }
}

TEST_F(CudaLinalgTest, IndefiniteAndNonFiniteMatricesAreRefused) {
  Tensor indefinite = Gram(40, 160);
  indefinite.as<float>()[17 * 40 + 17] = -1e6f;
  EXPECT_EQ(Run(indefinite, 0.0).status().code(), absl::StatusCode::kFailedPrecondition);
  for (float bad : {NAN, INFINITY}) {
    Tensor broken = Gram(40, 160);
    broken.as<float>()[5 * 40 + 9] = broken.as<float>()[9 * 40 + 5] = bad;
    const absl::Status status = Run(broken, 0.01).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << bad;
    EXPECT_THAT(std::string(status.message()), ::testing::HasSubstr("more damping"));
  }
  const Tensor zero = Tensor::HostZeros(DType::kF32, {8, 8}).value();
  EXPECT_EQ(Run(zero, 0.01).status().code(), absl::StatusCode::kFailedPrecondition);
}

TEST_F(CudaLinalgTest, DampingCuresRankDeficiency) {
  const Tensor h = Gram(64, 10);
  EXPECT_TRUE(Run(h, 0.1).ok());
}

TEST_F(CudaLinalgTest, RefusesWhatDoesNotFit) {
  const Tensor a = OnGpu(Gram(4, 8)), b = OnGpu(Garbage({4, 5}));
  ExpectInvalid(cuda_->InverseCholesky(a.View(), 0.01, b.View()), "square");
  ExpectInvalid(cuda_->InverseCholesky(a.View(), -1, a.View()), "damping -1");
  ExpectInvalid(cuda_->InverseCholesky(a.View(), NAN, a.View()), "not finite");
}

}  // namespace
}  // namespace quantmill::testing
