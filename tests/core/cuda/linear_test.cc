// Linear layers and products of views, CUDA against the CPU.
#include "tests/core/cuda/support.h"

namespace quantmill::testing {
namespace {

class CudaLinearTest : public CudaTest {
 protected:
  // Checks out = x w^T + bias for one shape and the dtypes of weight and output.
  void Check(int64_t rows, int64_t k, int64_t n, DType weight_dtype, DType out_dtype, bool bias) {
    SCOPED_TRACE(::testing::Message()
                 << rows << " x " << k << " x " << n << ", weight " << DTypeName(weight_dtype)
                 << ", out " << DTypeName(out_dtype) << ", bias " << bias);
    const Tensor x = Random({rows, k}, 1);
    const Tensor weight = RandomTensor({n, k}, 2, weight_dtype);
    const Tensor b = bias ? RandomTensor({n}, 3, weight_dtype) : Tensor();
    Tensor expected = Garbage({rows, n});
    QM_ASSERT_OK(Cpu().Linear(InF32(x), weight, b, &expected));
    Tensor magnitude = Garbage({rows, n});
    QM_ASSERT_OK(Cpu().Linear(Abs(x), Abs(weight), Tensor(), &magnitude));
    Tensor out = Poisoned({rows, n}, out_dtype);
    QM_ASSERT_OK(cuda().Linear(OnGpu(x), OnGpu(weight), bias ? OnGpu(b) : b, &out));
    // The weight is rounded to the activation dtype where cuBLAS multiplies; the bias, added
    // afterwards, costs one more rounding of the product.
    const double weight_rounding = weight_dtype == dtype() ? 0 : UnitRoundoff(dtype());
    const double bias_rounding = bias ? UnitRoundoff(out_dtype) : 0;
    ExpectWithin(OnHost(out), expected, [&](int64_t i) {
      const double m = magnitude.as<float>()[i];
      return 2 * SumTolerance(k, m) + (weight_rounding + bias_rounding) * m;
    });
  }
};
QM_CUDA_TEST_SUITE(CudaLinearTest);

TEST_P(CudaLinearTest, ManyShapes) {
  for (int64_t rows : {1, 2, 3, 4, 5, 33}) {
    for (const auto& [k, n] : std::vector<std::pair<int64_t, int64_t>>{
             {8, 1}, {8, 3}, {64, 64}, {384, 1024}, {1000, 37}, {264, 129}}) {
      Check(rows, k, n, dtype(), dtype(), false);
    }
  }
}

TEST_P(CudaLinearTest, ShapesThatAllowNoWideLoads) {
  for (int64_t rows : {1, 4, 9}) {
    for (int64_t k : {1, 7, 33, 100}) Check(rows, k, 13, dtype(), dtype(), false);
  }
}

TEST_P(CudaLinearTest, LargerProduct) { Check(130, 2048, 257, dtype(), dtype(), true); }

TEST_P(CudaLinearTest, MixedTypesAndBias) {
  for (DType weight_dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (DType out_dtype : {dtype(), DType::kF32}) {
      for (int64_t rows : {1, 6}) {
        for (bool bias : {false, true}) Check(rows, 128, 48, weight_dtype, out_dtype, bias);
      }
    }
  }
}

TEST_P(CudaLinearTest, NoRowsAndNoColumns) {
  const Tensor weight = OnGpu(Random({4, 8}, 1));
  Tensor out = Poisoned({0, 4});
  QM_EXPECT_OK(cuda().Linear(OnGpu(Random({0, 8}, 1)), weight, Tensor(), &out));
  QM_EXPECT_OK(cuda().Synchronize());
}

TEST_P(CudaLinearTest, RefusesWhatDoesNotFit) {
  const Tensor x = OnGpu(Random({2, 8}, 1));
  Tensor out = Poisoned({2, 4});
  ExpectInvalid(cuda().Linear(x, OnGpu(Random({4, 9}, 1)), Tensor(), &out), "weight has shape");
  ExpectInvalid(cuda().Linear(x, OnGpu(Random({5, 8}, 1)), Tensor(), &out), "out has shape");
  ExpectInvalid(cuda().Linear(x, OnGpu(Random({4, 8}, 1)), OnGpu(Random({5}, 1)), &out),
                "bias has shape");
  ExpectInvalid(cuda().Linear(x, Random({4, 8}, 1), Tensor(), &out), "weight lies on cpu");
  ExpectInvalid(cuda().Linear(x, OnGpu(Random({4, 8}, 1)), Tensor(), nullptr), "null");
}

// A [rows, width] view of a tensor with longer rows.
qm_tensor Columns(const Tensor& tensor, int64_t first, int64_t width) {
  qm_tensor view = tensor.View();
  view.data = static_cast<char*>(view.data) + first * ElementSize(tensor.dtype());
  view.shape[1] = width;
  return view;
}

TEST_P(CudaLinearTest, GemmOfStridedViews) {
  constexpr int64_t m = 37, n = 29, k = 50;
  for (bool trans_a : {false, true}) {
    for (bool trans_b : {false, true}) {
      for (DType c_dtype : {dtype(), DType::kF32}) {
        const Tensor a = trans_a ? Random({k, m + 5}, 1) : Random({m, k + 5}, 1);
        const Tensor b = trans_b ? Random({n, k + 3}, 2) : Random({k, n + 3}, 2);
        const Tensor c = RandomTensor({m, n + 7}, 3, c_dtype);
        const Tensor a32 = InF32(a), b32 = InF32(b), c32 = InF32(c);
        QM_ASSERT_OK(Cpu().Gemm(trans_a, trans_b, 0.5, Columns(a32, 2, trans_a ? m : k),
                                Columns(b32, 1, trans_b ? k : n), -2.0, Columns(c32, 4, n)));
        const Tensor a_gpu = OnGpu(a), b_gpu = OnGpu(b), c_gpu = OnGpu(c);
        QM_ASSERT_OK(cuda().Gemm(trans_a, trans_b, 0.5, Columns(a_gpu, 2, trans_a ? m : k),
                                 Columns(b_gpu, 1, trans_b ? k : n), -2.0, Columns(c_gpu, 4, n)));
        // Inputs are standard normal, so each product of magnitudes is about 1.
        ExpectWithin(OnHost(c_gpu), c32, 2 * SumTolerance(k, 2.0 * k));
      }
    }
  }
}

TEST_P(CudaLinearTest, GemmWithBetaZeroIgnoresC) {
  const Tensor a = OnGpu(Random({3, 8}, 1));
  const Tensor c = Poisoned({3, 3}, DType::kF32);
  QM_ASSERT_OK(cuda().Gemm(false, true, 1, a.View(), a.View(), 0, c.View()));
  for (double value : Values(OnHost(c))) EXPECT_TRUE(std::isfinite(value));
}

TEST_P(CudaLinearTest, GemmRefusesWhatDoesNotFit) {
  const Tensor a = OnGpu(Random({3, 8}, 1));
  const Tensor c = OnGpu(RandomTensor({3, 3}, 1));
  ExpectInvalid(cuda().Gemm(false, false, 1, a.View(), a.View(), 0, c.View()), "op(a) is");
  qm_tensor skipping = a.View();
  skipping.stride[1] = 2;
  ExpectInvalid(cuda().Gemm(false, true, 1, skipping, a.View(), 0, c.View()), "column stride 2");
  qm_tensor read_only = c.View();
  read_only.flags = QM_TENSOR_READONLY;
  ExpectInvalid(cuda().Gemm(false, true, 1, a.View(), a.View(), 0, read_only), "read-only");
}

}  // namespace
}  // namespace quantmill::testing
