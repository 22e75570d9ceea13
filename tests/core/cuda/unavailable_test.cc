// A build without CUDA says so.
#include "core/tensor/backend.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace quantmill {
namespace {

TEST(MakeCudaBackendTest, SaysThatTheBuildHasNoCuda) {
  const auto made = MakeCudaBackend(0, DType::kF32, 1);
  EXPECT_EQ(made.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(made.status().message()), ::testing::HasSubstr("has no CUDA"));
}

}  // namespace
}  // namespace quantmill
