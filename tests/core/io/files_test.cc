#include "core/io/files.h"

#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/shared_data.h"

namespace quantmill {
namespace {

using ::testing::HasSubstr;

size_t FileCount(const std::string& directory) {
  size_t count = 0;
  for ([[maybe_unused]] const auto& item : std::filesystem::directory_iterator(directory)) ++count;
  return count;
}

TEST(FilesTest, WritesAndReads) {
  const std::string directory = testing::MakeTempDir(), path = directory + "/f";
  std::string content = "a\0b\n";
  content.resize(100'000, 'z');
  ASSERT_TRUE(WriteFile(path, "old").ok());
  ASSERT_TRUE(WriteFile(path, content).ok());
  EXPECT_EQ(ReadFile(path).value(), content);
  ASSERT_TRUE(WriteFile(path, "").ok());
  EXPECT_EQ(ReadFile(path).value(), "");
  EXPECT_EQ(FileCount(directory), 1u);
  EXPECT_TRUE(RemoveFile(path).ok());
  EXPECT_TRUE(RemoveFile(path).ok());
  EXPECT_FALSE(FileExists(path));
}

TEST(FilesTest, MissingFileAndDirectory) {
  const std::string directory = testing::MakeTempDir();
  const auto missing = ReadFile(directory + "/none");
  EXPECT_EQ(missing.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(missing.status().message()),
              HasSubstr(directory + "/none; No such file"));
  EXPECT_FALSE(ReadFile(directory).ok());
  EXPECT_EQ(WriteFile(directory + "/no/f", "x").code(), absl::StatusCode::kNotFound);
}

TEST(FilesTest, FullDiskIsOneClearError) {
  const absl::Status status = SystemError("write", "out/model.safetensors", ENOSPC);
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(
      status.message(),
      "cannot write out/model.safetensors; No space left on device; free some space or choose "
      "another directory");
}

TEST(FilesTest, NoRoomLeavesNothing) {
  const std::string directory = testing::MakeTempDir();
  const auto file = OutputFile::Create(directory + "/big", uint64_t{1} << 62);
  EXPECT_EQ(file.status().code(), absl::StatusCode::kResourceExhausted) << file.status();
  EXPECT_EQ(FileCount(directory), 0u);
}

TEST(FilesTest, ReadOnlyDirectory) {
  if (geteuid() == 0) GTEST_SKIP() << "root may write anywhere";
  const std::string directory = testing::MakeTempDir();
  ASSERT_EQ(chmod(directory.c_str(), 0555), 0);
  const absl::Status status = WriteFile(directory + "/f", "x");
  EXPECT_EQ(status.code(), absl::StatusCode::kPermissionDenied);
  EXPECT_THAT(std::string(status.message()), HasSubstr("change the permissions"));
}

TEST(FilesTest, AbandonedOutputDisappears) {
  const std::string directory = testing::MakeTempDir(), path = directory + "/f";
  ASSERT_TRUE(WriteFile(path, "old").ok());
  {
    auto file = OutputFile::Create(path, 10);
    ASSERT_TRUE(file.ok());
    ASSERT_TRUE((*file)->WriteAt(0, "new").ok());
  }
  EXPECT_EQ(ReadFile(path).value(), "old");
  EXPECT_EQ(FileCount(directory), 1u);
}

}  // namespace
}  // namespace quantmill
