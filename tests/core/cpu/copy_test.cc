#include <bit>

#include "tests/core/cpu/support.h"

namespace quantmill::testing {
namespace {

// Every 16-bit pattern, and f32 values around each rounding boundary of both 16-bit types.
std::vector<float> RoundingCases() {
  std::vector<float> cases;
  for (uint32_t high = 0; high < 0x10000; high += 7) {
    for (uint32_t low : {0x0000u, 0x0001u, 0x7FFFu, 0x8000u, 0x8001u, 0xFFFFu}) {
      cases.push_back(std::bit_cast<float>(high << 16 | low));
    }
  }
  for (uint32_t half = 0; half < 0x10000; half += 3) {
    const float value = F16ToF32(static_cast<uint16_t>(half));
    const float next = F16ToF32(static_cast<uint16_t>(half + 1));
    cases.push_back((value + next) / 2);  // a tie
    cases.push_back(std::nextafter((value + next) / 2, value));
    cases.push_back(std::nextafter((value + next) / 2, next));
  }
  return cases;
}

TEST(Copy, RoundsLikeTheScalarConversions) {
  const std::vector<float> cases = RoundingCases();
  const int64_t n = static_cast<int64_t>(cases.size());
  const Tensor source = Tensor::FromF32({n}, cases);
  for (DType dtype : {DType::kBF16, DType::kF16}) {
    const Tensor out = SameForAllThreads(
        [&] { return Garbage({n}, dtype); },
        [&](Backend& backend, Tensor* target) { return backend.Copy(source, target); });
    for (int64_t i = 0; i < n; ++i) {
      const uint16_t expected = dtype == DType::kBF16 ? F32ToBF16(cases[static_cast<size_t>(i)])
                                                      : F32ToF16(cases[static_cast<size_t>(i)]);
      if (std::isnan(cases[static_cast<size_t>(i)])) {
        ASSERT_TRUE(std::isnan(LoadElement(dtype, out.data(), i)));
      } else {
        ASSERT_EQ(out.as<uint16_t>()[i], expected)
            << DTypeName(dtype) << " of bits "
            << std::bit_cast<uint32_t>(cases[static_cast<size_t>(i)]);
      }
    }
  }
}

TEST(Copy, WidensEveryPatternExactly) {
  Tensor source = Garbage({0x10000}, DType::kF16);
  for (int i = 0; i < 0x10000; ++i) source.as<uint16_t>()[i] = static_cast<uint16_t>(i);
  for (DType dtype : {DType::kF16, DType::kBF16}) {
    const Tensor typed(nullptr, source.data(), dtype, {0x10000}, Device{});
    Tensor out = Garbage({256, 256});
    ASSERT_TRUE(Cpu().Copy(typed, &out).ok());
    for (int i = 0; i < 0x10000; ++i) {
      const float expected = LoadElement(dtype, typed.data(), i);
      if (std::isnan(expected)) {
        ASSERT_TRUE(std::isnan(out.as<float>()[i])) << i;
      } else {
        ASSERT_EQ(std::bit_cast<uint32_t>(out.as<float>()[i]), std::bit_cast<uint32_t>(expected))
            << DTypeName(dtype) << " " << i;
      }
    }
  }
}

TEST(Copy, BetweenTheSixteenBitTypes) {
  const Tensor source = RandomTensor({37}, 1, DType::kBF16);
  Tensor out = Garbage({37}, DType::kF16);
  ASSERT_TRUE(Cpu().Copy(source, &out).ok());
  for (int i = 0; i < 37; ++i) {
    EXPECT_EQ(out.as<uint16_t>()[i], F32ToF16(BF16ToF32(source.as<uint16_t>()[i])));
  }
}

TEST(Copy, SameTypeCopiesBytesOfAnyType) {
  const Tensor source = Tensor::FromI32({2, 3}, {1, -2, 3, 4, 5, 1 << 30});
  Tensor out = Garbage({6}, DType::kI32);
  ASSERT_TRUE(Cpu().Copy(source, &out).ok());
  EXPECT_EQ(std::memcmp(source.data(), out.data(), 24), 0);
}

TEST(Copy, SaysWhatIsWrong) {
  Tensor out = Garbage({3});
  ExpectInvalid(Cpu().Copy(RandomTensor({4}, 1), &out), "equally many");
  ExpectInvalid(Cpu().Copy(RandomTensor({3}, 1), nullptr), "null");
  ExpectInvalid(Cpu().Copy(Tensor::FromI32({3}, {1, 2, 3}), &out), "cannot convert I32 to F32");
  Tensor constant(nullptr, out.data(), DType::kF32, {3}, Device{}, true);
  ExpectInvalid(Cpu().Copy(RandomTensor({3}, 1), &constant), "read-only");
}

// Two rows into each of three pieces of five; all else stays.
TEST(Copy, Pieces) {
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    const Tensor source = RandomTensor({6, 4}, 5, dtype);
    Tensor out = RandomTensor({15, 4}, 6, dtype);
    std::vector<double> expected = Values(out);
    for (size_t row = 0; row < 6; ++row) {
      for (size_t k = 0; k < 4; ++k) {
        expected[(row / 2 * 5 + 3 + row % 2) * 4 + k] = Values(source)[row * 4 + k];
      }
    }
    ASSERT_TRUE(Cpu().CopyPieces(source, 3, 3, &out).ok());
    EXPECT_EQ(Values(out), expected);
  }
  const Tensor source = RandomTensor({6, 4}, 5);
  Tensor out = Garbage({15, 4}), narrow = Garbage({15, 3}), half = Garbage({15, 4}, DType::kF16);
  ExpectInvalid(Cpu().CopyPieces(source, 3, 4, &out), "do not fit");
  ExpectInvalid(Cpu().CopyPieces(source, 3, -1, &out), "do not fit");
  ExpectInvalid(Cpu().CopyPieces(source, 4, 0, &out), "do not fit");
  ExpectInvalid(Cpu().CopyPieces(source, 0, 0, &out), "do not fit");
  ExpectInvalid(Cpu().CopyPieces(source, 3, 0, &narrow), "do not fit");
  ExpectInvalid(Cpu().CopyPieces(source, 3, 0, &half), "target");
  ExpectInvalid(Cpu().CopyPieces(source, 3, 0, nullptr), "null");
}

TEST(Memory, AllocateZeroToDevice) {
  absl::StatusOr<Tensor> tensor = Cpu().Allocate(DType::kBF16, {3, 5});
  ASSERT_TRUE(tensor.ok());
  EXPECT_EQ(tensor->shape(), Shape({3, 5}));
  ASSERT_TRUE(Cpu().Zero(&*tensor).ok());
  for (double value : Values(*tensor)) EXPECT_EQ(value, 0.0);
  const absl::StatusOr<Tensor> same = Cpu().ToDevice(*tensor);
  ASSERT_TRUE(same.ok());
  EXPECT_EQ(same->data(), tensor->data());
  ExpectInvalid(Cpu().Allocate(DType::kF32, {-1}).status(), "negative");
  ExpectInvalid(Cpu().Zero(nullptr), "null");
  const Tensor remote(nullptr, tensor->data(), DType::kBF16, {3, 5}, Device{QM_CUDA, 0});
  ExpectInvalid(Cpu().ToDevice(remote).status(), "not on the host");
}

}  // namespace
}  // namespace quantmill::testing
