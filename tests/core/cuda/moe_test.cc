// Routing, gathering and scattering, CUDA against the CPU.
#include "tests/core/cuda/support.h"

namespace quantmill::testing {
namespace {

class CudaMoeTest : public CudaTest {};
QM_CUDA_TEST_SUITE(CudaMoeTest);

TEST_P(CudaMoeTest, RoutesAsTheCpuDoes) {
  struct Case {
    int64_t rows, experts, top_k;
  };
  for (const Case& c : {Case{1, 1, 1}, Case{5, 4, 2}, Case{33, 8, 2}, Case{17, 60, 4},
                        Case{9, 128, 8}, Case{2, 1024, 3}, Case{3, 33, 33}}) {
    for (bool normalize : {false, true}) {
      const Tensor logits = Random({c.rows, c.experts}, 4, 2.0f);
      Tensor experts = Garbage({c.rows, c.top_k}, DType::kI32);
      Tensor weights = Garbage({c.rows, c.top_k});
      QM_ASSERT_OK(cuda().RouteTopK(OnGpu(logits), c.top_k, normalize, &experts, &weights));
      Tensor expected_experts = Garbage({c.rows, c.top_k}, DType::kI32);
      Tensor expected_weights = Garbage({c.rows, c.top_k});
      QM_ASSERT_OK(
          Cpu().RouteTopK(InF32(logits), c.top_k, normalize, &expected_experts, &expected_weights));
      EXPECT_TRUE(SameBytes(experts, expected_experts));
      // Both sides sum exponentials in f32, in another order.
      ExpectWithin(weights, expected_weights, 2 * SumTolerance(c.experts, 1) + 16 * kEpsilon);
    }
  }
}

TEST_P(CudaMoeTest, TiesGoToTheLowestIndex) {
  Tensor logits = Garbage({1, 40}, dtype());
  for (int64_t i = 0; i < 40; ++i)
    StoreElement(dtype(), i % 4 == 3 ? 2.0f : 1.0f, logits.data(), i);
  Tensor experts = Garbage({1, 12}, DType::kI32);
  Tensor weights = Garbage({1, 12});
  QM_ASSERT_OK(cuda().RouteTopK(OnGpu(logits), 12, true, &experts, &weights));
  const std::vector<int32_t> expected = {3, 7, 11, 15, 19, 23, 27, 31, 35, 39, 0, 1};
  EXPECT_TRUE(SameBytes(experts, Tensor::FromI32({1, 12}, expected)));
}

TEST_P(CudaMoeTest, RouteRefusesWhatDoesNotFit) {
  const Tensor logits = OnGpu(Random({2, 4}, 1));
  Tensor experts = Garbage({2, 5}, DType::kI32);
  Tensor weights = Garbage({2, 5});
  ExpectInvalid(cuda().RouteTopK(logits, 5, true, &experts, &weights), "top_k 5 of 4");
  ExpectInvalid(cuda().RouteTopK(logits, 2, true, &experts, &weights), "experts_out has shape");
}

TEST_P(CudaMoeTest, GathersAndScatters) {
  for (int64_t width : {1, 7, 64, 384, 1000}) {
    const Tensor x = Random({20, width}, 1);
    const Tensor rows = Tensor::FromI32({5}, {19, 0, 3, 12, 7});
    Tensor gathered = Poisoned({5, width});
    QM_ASSERT_OK(cuda().GatherRows(OnGpu(x), rows, &gathered));
    Tensor expected = Garbage({5, width});
    QM_ASSERT_OK(Cpu().GatherRows(InF32(x), rows, &expected));
    ExpectWithin(OnHost(gathered), expected, 0.0);

    const Tensor weights = Tensor::FromF32({5}, {0.5f, -1.25f, 0.0f, 3.0f, 1e-3f});
    const Tensor part = Random({5, width}, 2);
    Tensor target = OnGpu(x);
    QM_ASSERT_OK(cuda().ScatterAddRows(OnGpu(part), rows, weights, &target));
    Tensor expected_target = InF32(x);
    QM_ASSERT_OK(Cpu().ScatterAddRows(InF32(part), rows, weights, &expected_target));
    ExpectWithin(OnHost(target), expected_target, 4 * kEpsilon * 20);
  }
}

TEST_P(CudaMoeTest, RowsAreChecked) {
  const Tensor x = OnGpu(Random({4, 8}, 1));
  Tensor out = Poisoned({2, 8});
  ExpectInvalid(cuda().GatherRows(x, Tensor::FromI32({2}, {0, 4}), &out), "rows[1] is 4");
  Tensor target = OnGpu(Random({4, 8}, 1));
  const Tensor weights = Tensor::FromF32({2}, {1, 1});
  const Tensor part = OnGpu(Random({2, 8}, 1));
  ExpectInvalid(cuda().ScatterAddRows(part, Tensor::FromI32({2}, {1, 1}), weights, &target),
                "named twice");
  ExpectInvalid(cuda().ScatterAddRows(part, Tensor::FromI32({2}, {1, -1}), weights, &target),
                "rows[1] is -1");
}

}  // namespace
}  // namespace quantmill::testing
