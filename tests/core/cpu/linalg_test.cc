#include <tuple>

#include "tests/core/cpu/support.h"

namespace quantmill::testing {
namespace {

// Rows [0, rows) and columns [0, columns) of a wider tensor, so that the row stride exceeds the
// width.
qm_tensor Padded(const Tensor& wide, int64_t columns) {
  qm_tensor view = wide.View();
  view.shape[1] = columns;
  return view;
}

class GemmTest : public ::testing::TestWithParam<std::tuple<bool, bool, std::pair<DType, DType>>> {
};

TEST_P(GemmTest, AgreesWithF64) {
  const auto [trans_a, trans_b, dtypes] = GetParam();
  const auto [in, out_type] = dtypes;
  struct Case {
    int64_t m, n, k;
    double alpha, beta;
  };
  for (const Case& c : {Case{1, 1, 1, 1, 0},
                        {3, 5, 7, 2, 1},
                        {130, 70, 33, -1, 0.5},
                        {257, 300, 20, 1, 0},
                        {4, 6, 0, 1, 2}}) {
    const int64_t pad = 3;
    const Tensor a = RandomTensor({trans_a ? c.k : c.m, (trans_a ? c.m : c.k) + pad}, 1, in);
    const Tensor b = RandomTensor({trans_b ? c.n : c.k, (trans_b ? c.k : c.n) + pad}, 2, in);
    const Tensor start = RandomTensor({c.m, c.n + pad}, 3, out_type);
    const Tensor out = SameForAllThreads(
        [&] { return Clone(start); },
        [&, ta = trans_a, tb = trans_b](Backend& backend, Tensor* result) {
          return backend.Gemm(ta, tb, c.alpha, Padded(a, ta ? c.m : c.k), Padded(b, tb ? c.k : c.n),
                              c.beta, Padded(*result, c.n));
        });
    const double rounding = out_type == DType::kF32    ? kEpsilon
                            : out_type == DType::kBF16 ? 1.0 / 256
                                                       : 1.0 / 2048;
    for (int64_t i = 0; i < c.m; ++i) {
      for (int64_t j = 0; j < c.n; ++j) {
        double sum = c.beta * LoadElement(out_type, start.data(), i * (c.n + pad) + j);
        double magnitude = std::fabs(sum);
        for (int64_t l = 0; l < c.k; ++l) {
          const double x =
              LoadElement(in, a.data(), trans_a ? l * (c.m + pad) + i : i * (c.k + pad) + l);
          const double y =
              LoadElement(in, b.data(), trans_b ? j * (c.k + pad) + l : l * (c.n + pad) + j);
          sum += c.alpha * x * y;
          magnitude += std::fabs(c.alpha * x * y);
        }
        ASSERT_NEAR(LoadElement(out_type, out.data(), i * (c.n + pad) + j), sum,
                    SumTolerance(c.k + 2, magnitude) + rounding * std::fabs(sum))
            << i << ", " << j;
      }
      // What lies between the rows belongs to someone else.
      for (int64_t j = c.n; j < c.n + pad; ++j) {
        ASSERT_EQ(LoadElement(out_type, out.data(), i * (c.n + pad) + j),
                  LoadElement(out_type, start.data(), i * (c.n + pad) + j));
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, GemmTest,
                         ::testing::Combine(::testing::Bool(), ::testing::Bool(),
                                            ::testing::Values(std::pair(DType::kF32, DType::kF32),
                                                              std::pair(DType::kBF16, DType::kF32),
                                                              std::pair(DType::kBF16, DType::kBF16),
                                                              std::pair(DType::kF16, DType::kF32),
                                                              std::pair(DType::kF16,
                                                                        DType::kF16))));

TEST(Gemm, BetaZeroDoesNotReadTheOutput) {
  const Tensor a = RandomTensor({4, 4}, 1);
  const Tensor out = Garbage({4, 4});  // NaN
  ASSERT_TRUE(Cpu().Gemm(false, false, 1, a.View(), a.View(), 0, out.View()).ok());
  for (double value : Values(out)) EXPECT_TRUE(std::isfinite(value));
}

TEST(Gemm, SaysWhatIsWrong) {
  const Tensor a = RandomTensor({3, 4}, 1), b = RandomTensor({4, 5}, 2), c = Garbage({3, 5});
  const auto gemm = [](const qm_tensor& x, const qm_tensor& y, const qm_tensor& z) {
    return Cpu().Gemm(false, false, 1, x, y, 0, z);
  };
  EXPECT_TRUE(gemm(a.View(), b.View(), c.View()).ok());
  ExpectInvalid(gemm(a.View(), a.View(), c.View()), "op(a) is 3 x 4, op(b) is 3 x 4");
  ExpectInvalid(gemm(a.View(), b.View(), a.View()), "c is 3 x 4");
  ExpectInvalid(gemm(RandomTensor({12}, 1).View(), b.View(), c.View()), "a has rank 1");
  ExpectInvalid(gemm(RandomTensor({3, 4}, 1, DType::kF16).View(), b.View(), c.View()),
                "different dtypes");
  ExpectInvalid(gemm(a.View(), b.View(), RandomTensor({3, 5}, 1, DType::kF16).View()),
                "c must be F32");
  const Tensor integers = Tensor::FromI32({3, 4}, std::vector<int32_t>(12));
  ExpectInvalid(gemm(integers.View(), b.View(), c.View()), "a is I32");
  qm_tensor view = a.View();
  view.stride[1] = 2;
  ExpectInvalid(gemm(view, b.View(), c.View()), "rows must be contiguous");
  view = a.View();
  view.stride[0] = 3;
  ExpectInvalid(gemm(view, b.View(), c.View()), "row stride 3");
  view = a.View();
  view.data = nullptr;
  ExpectInvalid(gemm(view, b.View(), c.View()), "a has no data");
  view = a.View();
  view.device.kind = QM_CUDA;
  ExpectInvalid(gemm(view, b.View(), c.View()), "cuda:0");
  view = c.View();
  view.flags = QM_TENSOR_READONLY;
  ExpectInvalid(gemm(a.View(), b.View(), view), "read-only");
}

// Gram matrix of `rows` random rows.
Tensor RandomGram(int64_t n, int64_t rows) {
  Tensor gram = Tensor::HostZeros(DType::kF32, {n, n}).value();
  EXPECT_TRUE(Cpu().AccumulateGram(RandomTensor({rows, n}, 7), &gram).ok());
  return gram;
}

// U (H + shift I) U^T must be the identity; returns the largest deviation, in f64.
double DistanceFromIdentity(const Tensor& u, const Tensor& h, double damp) {
  const int64_t n = h.dim(0);
  double shift = 0;
  for (int64_t i = 0; i < n; ++i) shift += damp * h.as<float>()[i * n + i] / static_cast<double>(n);
  std::vector<double> half(static_cast<size_t>(n * n));  // U (H + shift I)
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t k = i; k < n; ++k) {
      const double factor = u.as<float>()[i * n + k];
      for (int64_t j = 0; j < n; ++j) {
        half[static_cast<size_t>(i * n + j)] +=
            factor * (h.as<float>()[k * n + j] + (k == j ? shift : 0.0));
      }
    }
  }
  double worst = 0;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = i == j ? -1.0 : 0.0;
      for (int64_t k = j; k < n; ++k) {
        sum += half[static_cast<size_t>(i * n + k)] * u.as<float>()[j * n + k];
      }
      worst = std::max(worst, std::fabs(sum));
    }
  }
  return worst;
}

TEST(InverseCholesky, FactorsTheInverse) {
  struct Case {
    int64_t n, rows;
    double damp;
  };
  // With fewer rows than columns only the damping makes the matrix positive definite.
  for (const Case& c : {Case{1, 3, 0.01},
                        {2, 5, 0.0},
                        {37, 100, 0.01},
                        {128, 300, 0.01},
                        {129, 40, 0.01},
                        {300, 900, 0.01},
                        {300, 10, 0.05}}) {
    const Tensor h = RandomGram(c.n, c.rows);
    const Tensor before = Clone(h);
    const Tensor u = SameForAllThreads(
        [&] {
          return Garbage({c.n, c.n});
        },
        [&](Backend& backend, Tensor* out) {
          return backend.InverseCholesky(h.View(), c.damp, out->View());
        });
    EXPECT_TRUE(SameBytes(h, before));
    // Rounding U to f32 perturbs the identity by about epsilon times the condition number, which
    // damping bounds by n / damp; undamped ones here are well conditioned.
    const double condition = c.damp > 0 ? 2 * static_cast<double>(c.n) / c.damp : 1e3;
    EXPECT_LT(DistanceFromIdentity(u, h, c.damp), 4 * kEpsilon * condition) << c.n;
    for (int64_t i = 0; i < c.n; ++i) {
      EXPECT_GT(u.as<float>()[i * c.n + i], 0.0f);
      for (int64_t j = 0; j < i; ++j) ASSERT_EQ(u.as<float>()[i * c.n + j], 0.0f);
    }
  }
}

// Above 4096 columns the factorisation is in f32. U (H + shift I) U^T v must be v; a product of
// matrices of this size in f64 would take minutes.
TEST(InverseCholesky, LargeMatricesInF32) {
  constexpr int64_t n = 4096 + 129, rows = 64;
  constexpr double damp = 1.0;
  Tensor h = RandomGram(n, rows);
  const Tensor u = Garbage({n, n});
  ASSERT_TRUE(Cpu().InverseCholesky(h.View(), damp, u.View()).ok());
  double shift = 0;
  for (int64_t i = 0; i < n; ++i) shift += damp * h.as<float>()[i * n + i] / n;
  const std::vector<double> v = Values(RandomTensor({n}, 3));
  std::vector<double> back(n), product(n);  // U^T v and (H + shift I) U^T v
  for (int64_t i = 0; i < n; ++i) {
    const float* row = u.as<float>() + i * n;
    ASSERT_GT(row[i], 0.0f);
    for (int64_t j = 0; j < i; ++j) ASSERT_EQ(row[j], 0.0f);
    for (int64_t j = i; j < n; ++j) back[j] += row[j] * v[i];
  }
  for (int64_t i = 0; i < n; ++i) {
    product[i] = shift * back[i];
    for (int64_t j = 0; j < n; ++j) product[i] += h.as<float>()[i * n + j] * back[j];
  }
  // The largest eigenvalue of the Gram matrix is about (sqrt(n) + sqrt(rows))^2 (Marchenko-Pastur)
  // and the smallest 0; the diagonal, and with it the shift, is about `rows`.
  const double largest = std::pow(std::sqrt(n) + std::sqrt(rows), 2);
  const double tolerance = SumTolerance(n, 1 + largest / (damp * rows));
  for (int64_t i = 0; i < n; ++i) {
    double sum = 0;
    for (int64_t j = i; j < n; ++j) sum += u.as<float>()[i * n + j] * product[j];
    ASSERT_NEAR(sum, v[i], tolerance) << i;
  }
  h.as<float>()[n * n - 1] = -1e6f;
  EXPECT_EQ(Cpu().InverseCholesky(h.View(), damp, u.View()).code(),
            absl::StatusCode::kFailedPrecondition);
}

TEST(InverseCholesky, KnownTwoByTwo) {
  // H = [[5, 2], [2, 1]] = R R^T with R = [[1, 2], [0, 1]], so U = R^-1 = [[1, -2], [0, 1]].
  const Tensor h = Tensor::FromF32({2, 2}, {5, 2, 2, 1});
  const Tensor u = Garbage({2, 2});
  ASSERT_TRUE(Cpu().InverseCholesky(h.View(), 0, u.View()).ok());
  EXPECT_THAT(Values(u), ::testing::ElementsAre(1, -2, 0, 1));
}

TEST(InverseCholesky, WorksOnWideViews) {
  const int64_t n = 140;
  const Tensor h = RandomGram(n, 300);
  Tensor wide_h = Garbage({n, n + 5}), wide_out = Garbage({n, n + 2}), out = Garbage({n, n});
  for (int64_t i = 0; i < n; ++i) {
    std::memcpy(wide_h.as<float>() + i * (n + 5), h.as<float>() + i * n, sizeof(float) * n);
  }
  ASSERT_TRUE(Cpu().InverseCholesky(h.View(), 0.01, out.View()).ok());
  ASSERT_TRUE(Cpu().InverseCholesky(Padded(wide_h, n), 0.01, Padded(wide_out, n)).ok());
  for (int64_t i = 0; i < n; ++i) {
    EXPECT_EQ(
        std::memcmp(wide_out.as<float>() + i * (n + 2), out.as<float>() + i * n, sizeof(float) * n),
        0);
    EXPECT_TRUE(std::isnan(wide_out.as<float>()[i * (n + 2) + n]));
  }
}

TEST(InverseCholesky, RefusesWhatIsNotPositiveDefinite) {
  const int64_t n = 150;
  const Tensor out = Garbage({n, n});
  const auto code = [&](const Tensor& h, double damp) {
    return Cpu().InverseCholesky(h.View(), damp, out.View()).code();
  };
  const Tensor zero = Tensor::HostZeros(DType::kF32, {n, n}).value();
  EXPECT_EQ(code(zero, 0.01), absl::StatusCode::kFailedPrecondition);
  const Tensor deficient = RandomGram(n, 20);
  EXPECT_EQ(code(deficient, 0.01), absl::StatusCode::kOk);
  Tensor negative = RandomGram(n, 300);
  negative.as<float>()[17 * n + 17] = -1e4f;
  EXPECT_EQ(code(negative, 0.01), absl::StatusCode::kFailedPrecondition);
  for (float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    for (int64_t at : {int64_t{0}, int64_t{5 * n + 140}, n * n - 1}) {
      Tensor broken = RandomGram(n, 300);
      broken.as<float>()[at] = bad;
      EXPECT_EQ(code(broken, 0.01), absl::StatusCode::kFailedPrecondition) << bad << " at " << at;
    }
  }
}

TEST(InverseCholesky, SaysWhatIsWrong) {
  const Tensor h = RandomGram(4, 9), out = Garbage({4, 4}), wide = Garbage({4, 5});
  ExpectInvalid(Cpu().InverseCholesky(h.View(), -0.1, out.View()), "damp is -0.1");
  ExpectInvalid(Cpu().InverseCholesky(h.View(), std::nan(""), out.View()), "finite");
  ExpectInvalid(Cpu().InverseCholesky(wide.View(), 0.1, out.View()), "square");
  ExpectInvalid(Cpu().InverseCholesky(h.View(), 0.1, wide.View()), "square");
  const Tensor half = RandomTensor({4, 4}, 1, DType::kF16);
  ExpectInvalid(Cpu().InverseCholesky(half.View(), 0.1, out.View()), "h is F16");
}

}  // namespace
}  // namespace quantmill::testing
