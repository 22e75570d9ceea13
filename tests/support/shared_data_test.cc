#include "tests/support/shared_data.h"

#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "gtest/gtest.h"

namespace quantmill::testing {
namespace {

// Runs `body` in a child that ends as a test program does.
template <typename Body>
void InChild(Body body) {
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    body();
    std::exit(0);
  }
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
}

// One test, in this order: the first directory of a process makes it their owner.
TEST(MakeTempDirTest, LastsAsLongAsItsProcess) {
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  InChild([&] {
    const std::string path = MakeTempDir();
    std::ofstream(path + "/file") << "content";
    if (write(ends[1], path.data(), path.size()) < 0) _exit(1);
  });
  char buffer[4096];
  const ssize_t size = read(ends[0], buffer, sizeof buffer);
  ASSERT_GT(size, 0);
  EXPECT_FALSE(std::filesystem::exists(std::string(buffer, static_cast<size_t>(size))));

  const std::string own = MakeTempDir();
  InChild([] {});
  EXPECT_TRUE(std::filesystem::exists(own));
  EXPECT_NE(MakeTempDir(), own);
}

}  // namespace
}  // namespace quantmill::testing
