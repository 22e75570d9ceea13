#include "tests/support/shared_data.h"

#include <stdlib.h>

#include <filesystem>

namespace quantmill::testing {

std::optional<std::string> SharedPath(const std::string& relative) {
  const char* directory = getenv("QM_SHARED_DIR");
  const std::filesystem::path base = directory ? directory : QM_DEFAULT_SHARED_DIR;
  const std::filesystem::path path = base / relative;
  std::error_code error;
  if (!std::filesystem::exists(path, error)) return std::nullopt;
  return std::filesystem::canonical(path).string();
}

std::string SourcePath(const std::string& relative) {
  return (std::filesystem::path(QM_SOURCE_DIR) / relative).string();
}

std::string MakeTempDir() {
  std::string pattern = (std::filesystem::temp_directory_path() / "quantmill-test-XXXXXX").string();
  return mkdtemp(pattern.data());
}

}  // namespace quantmill::testing
