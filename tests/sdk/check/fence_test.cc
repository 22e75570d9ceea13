#include "sdk/check/fence.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <string>

namespace quantmill::check {
namespace {

uint8_t* Data(const Fence* fence) { return static_cast<uint8_t*>(fence->data()); }

TEST(FenceTest, BlockIsAlignedFilledAndUnharmed) {
  for (const uint64_t bytes : {0, 1, 255, 256, 4095, 4097, 70000}) {
    const Fence* fence = Fence::New("block", FenceUse::kScratch, bytes, 256, 0xEE);
    ASSERT_NE(fence, nullptr);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(fence->data()) % 256, 0u);
    for (uint64_t i = 0; i < bytes; ++i) ASSERT_EQ(Data(fence)[i], 0xEE) << i;
    EXPECT_EQ(fence->Overrun(), "");
  }
  EXPECT_EQ(Fence::New("huge", FenceUse::kScratch, UINT64_MAX, 256, 0), nullptr);
}

TEST(FenceTest, BytesWrittenBesideABlockAreCounted) {
  const Fence* behind = Fence::New("scratch 3", FenceUse::kScratch, 100, 256, 0);
  Data(behind)[100] = Data(behind)[101] = 0;
  EXPECT_EQ(behind->Overrun(), "2 bytes behind the end of scratch 3 (100 bytes) were overwritten");
  const Fence* before = Fence::New("scratch 4", FenceUse::kScratch, 100, 256, 0);
  Data(before)[-1] = 0;
  EXPECT_EQ(before->Overrun(), "1 byte before the start of scratch 4 (100 bytes) was overwritten");
}

TEST(FenceTest, AFaultIsExplainedByItsAddress) {
  std::string rule;
  Fence* input = Fence::New("the weight", FenceUse::kInput, 64, 256, 0);
  input->Seal();
  EXPECT_THAT(DescribeFault(Data(input) + 4, &rule), testing::HasSubstr("wrote to the weight"));
  EXPECT_EQ(rule, "QM-P-004");
  EXPECT_THAT(DescribeFault(Data(input) + 256, &rule),
              testing::HasSubstr("192 bytes behind the end of the weight"));
  EXPECT_EQ(rule, "QM-P-014");
  Fence* info = Fence::New("the qm_linear_info", FenceUse::kHostStruct, 64, 8, 0);
  DescribeFault(Data(info) + 64, &rule);
  EXPECT_EQ(rule, "QM-A-005");
  info->Close();
  EXPECT_THAT(DescribeFault(Data(info), &rule), testing::HasSubstr("after the call"));
  EXPECT_EQ(rule, "QM-P-003");
  EXPECT_EQ(DescribeFault(&rule, &rule), "");
}

TEST(FenceDeathTest, WhatIsBehindSealedOrClosedCannotBeTouched) {
  Fence* fence = Fence::New("block", FenceUse::kInput, 256, 256, 0);
  EXPECT_DEATH(Data(fence)[256] = 1, "");
  fence->Seal();
  EXPECT_DEATH(Data(fence)[0] = 1, "");
  fence->Close();
  EXPECT_DEATH(Data(fence)[0] == 0 ? static_cast<void>(0) : abort(), "");
}

}  // namespace
}  // namespace quantmill::check
