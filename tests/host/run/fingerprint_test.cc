#include "host/run/fingerprint.h"

#include <set>

#include "gtest/gtest.h"

namespace quantmill {
namespace {

std::string Of(const Tensor& tensor, int threads) {
  ThreadPool pool(threads);
  Fingerprint fingerprint;
  fingerprint.Add(tensor, pool);
  return fingerprint.Hex();
}

TEST(FingerprintTest, EveryByteOfATensorCounts) {
  // More than one tile and an odd rest.
  Tensor tensor = Tensor::HostZeros(DType::kU8, Shape({(1 << 20) + 77})).value();
  std::set<std::string> seen = {Of(tensor, 1)};
  for (int64_t at : {int64_t{0}, int64_t{63}, int64_t{64}, int64_t{(1 << 20) - 1}, int64_t{1 << 20},
                     int64_t{(1 << 20) + 76}}) {
    tensor.as<uint8_t>()[at] = 1;
    EXPECT_TRUE(seen.insert(Of(tensor, 1)).second) << at;
  }
}

TEST(FingerprintTest, ThreadsDoNotMatter) {
  Tensor tensor = Tensor::HostZeros(DType::kF32, Shape({3, 1 << 20})).value();
  for (int64_t i = 0; i < tensor.elements(); ++i) tensor.as<float>()[i] = static_cast<float>(i);
  EXPECT_EQ(Of(tensor, 1), Of(tensor, 3));
}

TEST(FingerprintTest, ShapeAndDTypeCount) {
  const Tensor tensor = Tensor::HostZeros(DType::kF32, Shape({4, 6})).value();
  EXPECT_NE(Of(tensor, 1), Of(tensor.Reshaped(Shape({6, 4})), 1));
}

TEST(FingerprintTest, TextsAreDelimited) {
  Fingerprint a, b;
  a.Add("ab");
  a.Add("c");
  b.Add("a");
  b.Add("bc");
  EXPECT_NE(a.Hex(), b.Hex());
}

TEST(SlotSeedTest, DependsOnAllOfItsArguments) {
  const std::set<uint64_t> seeds = {SlotSeed(1, "s", "a"), SlotSeed(2, "s", "a"),
                                    SlotSeed(1, "t", "a"), SlotSeed(1, "s", "b")};
  EXPECT_EQ(seeds.size(), 4u);
  EXPECT_EQ(SlotSeed(1, "s", "a"), SlotSeed(1, "s", "a"));
}

}  // namespace
}  // namespace quantmill
