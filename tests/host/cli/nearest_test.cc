#include "core/base/nearest.h"

#include "gtest/gtest.h"

namespace quantmill {
namespace {

TEST(NearestTest, Distance) {
  EXPECT_EQ(NameDistance("", "abc"), 3u);
  EXPECT_EQ(NameDistance("kitten", "sitting"), 3u);
  EXPECT_EQ(NameDistance("gtpq", "gptq"), 1u);  // a swap is one mistake
  EXPECT_EQ(NameDistance("Group-Size", "group_size"), 0u);
}

TEST(NearestTest, NearestOrNone) {
  const std::vector<std::string> names = {"bits", "group_size", "symmetric"};
  EXPECT_EQ(NearestName("bit", names), "bits");
  EXPECT_EQ(NearestName("groupsize", names), "group_size");
  EXPECT_EQ(NearestName("sym", names), "symmetric");
  EXPECT_EQ(NearestName("damp", names), "");
  EXPECT_EQ(NearestName("", names), "");
  EXPECT_EQ(NearestName(std::string(100000, 'x'), names), "");
  EXPECT_EQ(NearestHint("bit", names), "did you mean 'bits'?");
  EXPECT_EQ(NearestHint("damp", names), "known: bits, group_size, symmetric");
  EXPECT_EQ(NearestHint("damp", {}), "");
}

}  // namespace
}  // namespace quantmill
