#include "tests/support/shared_data.h"

#include <stdlib.h>
#include <unistd.h>

#include <filesystem>
#include <system_error>
#include <vector>

namespace quantmill::testing {
namespace {

class TempDirs {
 public:
  // Not in a forked child that exits: they are its parent's.
  ~TempDirs() {
    if (getpid() != owner_ || ::testing::UnitTest::GetInstance()->Failed()) return;
    std::error_code ignored;
    for (const std::string& path : paths_) std::filesystem::remove_all(path, ignored);
  }

  const std::string& Make() {
    std::string pattern =
        (std::filesystem::temp_directory_path() / "quantmill-test-XXXXXX").string();
    return paths_.emplace_back(mkdtemp(pattern.data()));
  }

 private:
  const pid_t owner_ = getpid();
  std::vector<std::string> paths_;
};

}  // namespace

std::optional<std::string> SharedPath(const std::string& relative) {
  const char* directory = getenv("QM_SHARED_DIR");
  const std::filesystem::path base = directory ? directory : QM_DEFAULT_SHARED_DIR;
  const std::filesystem::path path = base / relative;
  std::error_code error;
  if (!std::filesystem::exists(path, error)) return std::nullopt;
  return std::filesystem::canonical(path).string();
}

std::string SourcePath(const std::string& relative) {
  const char* directory = getenv("QM_SOURCE_DIR");
  const std::filesystem::path base = directory ? directory : QM_SOURCE_DIR;
  return (base / relative).string();
}

std::string MakeTempDir() {
  static TempDirs directories;
  return directories.Make();
}

}  // namespace quantmill::testing
