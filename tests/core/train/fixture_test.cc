// Gradients of blocks against PyTorch's.
#include "core/train/block_gradients.h"
#include "tests/core/train/fixtures.h"

namespace quantmill::testing {
namespace {

class GradientFixtures : public ::testing::TestWithParam<std::string> {};

TEST_P(GradientFixtures, BlocksAgreeWithPyTorch) {
  const GradientFixture fixture(GetParam());
  const auto backend = MakeCpuBackend(2).value();
  for (int64_t block = 0; block < fixture.config().layers; ++block) {
    for (const NamedError& e : BlockErrors(fixture, block, *backend)) {
      EXPECT_LT(e.error, 1e-4) << e.name;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Architectures, GradientFixtures,
                         ::testing::ValuesIn(GradientFixtureNames()),
                         [](const auto& info) { return TestNameOf(info.param); });

}  // namespace
}  // namespace quantmill::testing
