#include "sdk/check/elf_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <iterator>
#include <string>

namespace quantmill::check {
namespace {

std::string OffenderPath(const std::string& name) {
  return std::string(QM_OFFENDER_DIR) + "/libqm_" + name + ".so";
}

TEST(ElfFileTest, ReadsSymbolsAndFlags) {
  const auto facts = ReadElf(OffenderPath("rounding"));
  ASSERT_TRUE(facts.ok()) << facts.status();
  EXPECT_THAT(facts->exported, testing::ElementsAre("qm_plugin_entry_v1"));
  EXPECT_THAT(facts->needed, testing::Contains("libc.so.6"));
  EXPECT_TRUE(facts->no_delete);
  const auto deletable = ReadElf(OffenderPath("deletable"));
  ASSERT_TRUE(deletable.ok()) << deletable.status();
  EXPECT_FALSE(deletable->no_delete);
}

TEST(ElfFileTest, WhatIsNoSharedObjectIsRefused) {
  EXPECT_FALSE(ReadElf("/nowhere.so").ok());
  EXPECT_FALSE(ReadElf("/etc/passwd").ok());
  EXPECT_FALSE(ReadElf(QM_OFFENDER_DIR).ok());
}

// However short the file is cut, there is an error or an answer, and no fault.
TEST(ElfFileTest, CutShortFilesDoNoHarm) {
  std::ifstream file(OffenderPath("rounding"), std::ios::binary);
  const std::string whole(std::istreambuf_iterator<char>(file), {});
  const std::string path = testing::TempDir() + "/cut.so";
  for (size_t size = 0; size < whole.size(); size += 1 + whole.size() / 97) {
    std::ofstream(path, std::ios::binary | std::ios::trunc) << whole.substr(0, size);
    EXPECT_FALSE(ReadElf(path).ok()) << size;
  }
}

}  // namespace
}  // namespace quantmill::check
