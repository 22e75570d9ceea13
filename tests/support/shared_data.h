// Where tests find models and text that are not part of this tree.
#ifndef QUANTMILL_TESTS_SUPPORT_SHARED_DATA_H_
#define QUANTMILL_TESTS_SUPPORT_SHARED_DATA_H_

#include <optional>
#include <string>

#include "gtest/gtest.h"

namespace quantmill::testing {

// Absolute path of `relative` ("models/small-llama") in $QM_SHARED_DIR, or beside this checkout in
// ../shared; nullopt if it is not there.
std::optional<std::string> SharedPath(const std::string& relative);

// Absolute path of a file in this source tree, or below $QM_SOURCE_DIR where a bundle of tests
// (scripts/gpu_bundle) brings what it needs of the tree.
std::string SourcePath(const std::string& relative);

// A fresh empty directory for the running test, under the system's temporary directory; removed
// when the process ends, unless a test failed.
std::string MakeTempDir();

}  // namespace quantmill::testing

// Skips the running test with a reason when shared data is absent; defines `var` otherwise.
#define QM_SHARED_OR_SKIP(var, relative)                                  \
  const auto var##_optional = ::quantmill::testing::SharedPath(relative); \
  if (!var##_optional) GTEST_SKIP() << "no shared data: " << (relative);  \
  const std::string var = *var##_optional

#endif  // QUANTMILL_TESTS_SUPPORT_SHARED_DATA_H_
