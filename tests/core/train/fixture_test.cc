// Gradients of blocks against PyTorch's.
#include "core/train/block_gradients.h"
#include "tests/core/train/fixtures.h"

namespace quantmill::testing {
namespace {

class GradientFixtures : public ::testing::TestWithParam<const char*> {};

TEST_P(GradientFixtures, BlocksAgreeWithPyTorch) {
  const GradientFixture fixture(GetParam());
  const auto backend = MakeCpuBackend(2).value();
  for (int64_t block = 0; block < fixture.config().layers; ++block) {
    for (const NamedError& e : BlockErrors(fixture, block, *backend)) {
      EXPECT_LT(e.error, 1e-4) << e.name;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Architectures, GradientFixtures, ::testing::ValuesIn(kGradientFixtures),
                         [](const auto& info) {
                           std::string name = info.param;
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

}  // namespace
}  // namespace quantmill::testing
