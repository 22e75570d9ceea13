// Every instruction set the kernels are compiled for gives results as good as the best one: the
// others only run on older processors, where nobody tests.
#include "hwy/highway.h"
#include "tests/core/cpu/support.h"

namespace quantmill::testing {
namespace {

// Restricts the choice of instruction sets for the life of this object.
class OnlyTarget {
 public:
  explicit OnlyTarget(int64_t target) {
    hwy::SetSupportedTargetsForTest(target);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  }
  ~OnlyTarget() {
    hwy::SetSupportedTargetsForTest(0);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  }
};

class InstructionSetTest : public ::testing::TestWithParam<int64_t> {};

// Largest difference relative to the largest magnitude.
double Distance(const Tensor& a, const Tensor& b) {
  double difference = 0, magnitude = 1e-30;
  const std::vector<double> x = Values(a), y = Values(b);
  for (size_t i = 0; i < x.size(); ++i) {
    difference = std::max(difference, std::fabs(x[i] - y[i]));
    magnitude = std::max(magnitude, std::fabs(x[i]));
  }
  return difference / magnitude;
}

// Runs `operation` with the best instruction set and with the one under test.
void Compare(int64_t target, const Shape& shape, double tolerance,
             const std::function<absl::Status(Backend&, Tensor*)>& operation) {
  Tensor best = Garbage(shape), tested = Garbage(shape);
  ASSERT_TRUE(operation(Cpu(), &best).ok());
  {
    const OnlyTarget only(target);
    ASSERT_TRUE(operation(Cpu(), &tested).ok());
  }
  EXPECT_LE(Distance(best, tested), tolerance);
}

TEST_P(InstructionSetTest, ConversionsAreExact) {
  std::vector<float> values;
  std::mt19937 generator(1);
  for (int i = 0; i < 20011; ++i) {
    // Any exponent, so that subnormals, overflows and ties of both 16-bit types occur.
    uint32_t bits = generator();
    if (i % 3 == 0) bits &= 0xFFFFF000u;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    if (!std::isnan(value)) values.push_back(i % 2 ? value : std::ldexp(value, -(i % 7)));
  }
  const int64_t n = static_cast<int64_t>(values.size());
  const Tensor source = Tensor::FromF32({n}, values);
  for (DType dtype : {DType::kBF16, DType::kF16}) {
    Tensor narrow = Garbage({n}, dtype), wide = Garbage({n}), expected = Garbage({n}, dtype);
    {
      const OnlyTarget only(GetParam());
      ASSERT_TRUE(Cpu().Copy(source, &narrow).ok());
      ASSERT_TRUE(Cpu().Copy(narrow, &wide).ok());
    }
    for (int64_t i = 0; i < n; ++i) {
      StoreElement(dtype, values[static_cast<size_t>(i)], expected.data(), i);
      ASSERT_EQ(narrow.as<uint16_t>()[i], expected.as<uint16_t>()[i])
          << values[static_cast<size_t>(i)];
      ASSERT_EQ(wide.as<float>()[i], LoadElement(dtype, narrow.data(), i));
    }
  }
}

TEST_P(InstructionSetTest, DecoderOperationsAgree) {
  const Tensor x = RandomTensor({3, 201}, 1), y = RandomTensor({3, 201}, 2);
  const Tensor norm = RandomTensor({201}, 3);
  const double tolerance = SumTolerance(201, 1.0) * 4;
  for (DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    const Tensor weight = RandomTensor({9, 201}, 4, dtype);
    Compare(GetParam(), {3, 9}, tolerance, [&](Backend& backend, Tensor* out) {
      return backend.Linear(x, weight, Tensor(), out);
    });
  }
  Compare(GetParam(), {3, 201}, tolerance,
          [&](Backend& backend, Tensor* out) { return backend.RmsNorm(x, norm, 1e-5f, out); });
  Compare(GetParam(), {3, 201}, tolerance,
          [&](Backend& backend, Tensor* out) { return backend.SiluMultiply(x, y, out); });
  const Tensor table = RandomTensor({1, 33}, 5), heads = RandomTensor({1, 198}, 6);
  Compare(GetParam(), {1, 198}, tolerance, [&](Backend& backend, Tensor* out) {
    *out = Clone(heads);
    return backend.Rope(table, table, 0, 1, 66, out);
  });
}

TEST_P(InstructionSetTest, AttentionAndScoringAgree) {
  const double tolerance = SumTolerance(300, 1.0) * 8;
  for (int64_t queries : {1, 150}) {
    const AttentionShape shape = {1, queries, 40, 2, 1, 72, 0, 0.12f};
    const Tensor q = RandomTensor({queries, 144}, 1);
    const Tensor keys = RandomTensor({200, 72}, 2), values = RandomTensor({200, 72}, 3);
    Compare(GetParam(), {queries, 144}, tolerance, [&](Backend& backend, Tensor* out) {
      return backend.Attention(shape, q, keys, values, out);
    });
  }
  const Tensor p = RandomTensor({4, 1037}, 4), q = RandomTensor({4, 1037}, 5);
  Compare(GetParam(), {4}, tolerance,
          [&](Backend& backend, Tensor* out) { return backend.KlRows(p, q, out); });
  const Tensor targets = Tensor::FromI32({4}, {0, 1, 2, 1036});
  Tensor argmax = Garbage({4}, DType::kI32);
  Compare(GetParam(), {4}, tolerance, [&](Backend& backend, Tensor* out) {
    return backend.ScoreRows(p, targets, out, &argmax);
  });
}

INSTANTIATE_TEST_SUITE_P(Targets, InstructionSetTest,
                         ::testing::ValuesIn(hwy::SupportedAndGeneratedTargets()),
                         [](const ::testing::TestParamInfo<int64_t>& info) {
                           return std::string(hwy::TargetName(info.param));
                         });

}  // namespace
}  // namespace quantmill::testing
