// The saved state of a training and its loss curve.
#include "host/run/train/train_state.h"

#include <filesystem>
#include <fstream>
#include <iterator>

#include "core/io/files.h"
#include "gmock/gmock.h"
#include "tests/core/cpu/support.h"
#include "tests/support/shared_data.h"

namespace quantmill::testing {
namespace {

using ::testing::HasSubstr;

namespace fs = std::filesystem;

class TrainStateTest : public ::testing::Test {
 protected:
  std::string path_ = MakeTempDir() + "/training/key.safetensors";
  TrainState state_{path_};
  std::unique_ptr<Backend> backend_ = MakeCpuBackend(1).value();
  TrainPosition position_ = {3, 17, 15, 2, 15, 2.5, 1.0 / 3, 0.25};
  std::vector<NamedTensor> tensors_ = {{"a", RandomTensor({3, 5}, 1)},
                                       {"b/first", RandomTensor({7}, 2, DType::kBF16)}};
  std::vector<NamedTensor> Empty() const {
    return {{"a", Garbage({3, 5})}, {"b/first", Garbage({7}, DType::kBF16)}};
  }
};

TEST_F(TrainStateTest, RoundTrip) {
  EXPECT_FALSE(state_.Exists());
  ASSERT_TRUE(state_.Save(*backend_, position_, tensors_).ok());
  EXPECT_TRUE(state_.Exists());
  const auto position = state_.Position();
  ASSERT_TRUE(position.ok()) << position.status();
  EXPECT_EQ(position->blocks, 3);
  EXPECT_EQ(position->step, 17);
  EXPECT_EQ(position->optimizer_steps, 15);
  EXPECT_EQ(position->skipped_in_row, 2);
  EXPECT_EQ(position->losses, 15);
  EXPECT_EQ(position->first_loss, 2.5);
  EXPECT_EQ(position->recent_loss, 1.0 / 3);
  EXPECT_EQ(position->lowest_loss, 0.25);
  const std::vector<NamedTensor> read = Empty();
  ASSERT_TRUE(state_.Load(*backend_, read).ok());
  EXPECT_TRUE(SameBytes(read[0].tensor, tensors_[0].tensor));
  EXPECT_TRUE(SameBytes(read[1].tensor, tensors_[1].tensor));
  // A part of them, and saved over.
  ASSERT_TRUE(state_.Load(*backend_, {Empty()[1]}).ok());
  position_.step = 18;
  ASSERT_TRUE(state_.Save(*backend_, position_, {tensors_[0]}).ok());
  EXPECT_EQ(state_.Position()->step, 18);
  ASSERT_TRUE(state_.Remove().ok());
  EXPECT_FALSE(state_.Exists());
  EXPECT_TRUE(fs::is_empty(fs::path(path_).parent_path()));
}

TEST_F(TrainStateTest, OtherTensorsAreRefused) {
  ASSERT_TRUE(state_.Save(*backend_, position_, tensors_).ok());
  const std::vector<NamedTensor> wrong = {
      {"c", Garbage({7})}, {"a", Garbage({5, 3})}, {"a", Garbage({3, 5}, DType::kBF16)}};
  for (const NamedTensor& named : wrong) {
    const absl::Status status = state_.Load(*backend_, {named});
    EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << status;
    EXPECT_THAT(std::string(status.message()),
                HasSubstr(path_ + " does not hold " + named.name +
                          " as this training has it; "
                          "remove the file to train from the start"));
  }
}

TEST_F(TrainStateTest, TruncatedAndForeignFiles) {
  ASSERT_TRUE(state_.Save(*backend_, position_, tensors_).ok());
  const auto size = fs::file_size(path_);
  for (const auto kept : {size - 1, size / 2, uintmax_t{9}, uintmax_t{0}}) {
    fs::resize_file(path_, kept);
    for (const absl::Status& status :
         {state_.Position().status(), state_.Load(*backend_, Empty())}) {
      EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << kept << status;
      EXPECT_THAT(std::string(status.message()), HasSubstr(path_));
      EXPECT_THAT(std::string(status.message()),
                  HasSubstr("remove the file to train from the start"));
    }
  }
  // Safetensors, but something else.
  fs::copy_file(SourcePath("configs/quickstart/tiny-llama/model.safetensors"), path_,
                fs::copy_options::overwrite_existing);
  const absl::Status status = state_.Position().status();
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("is no saved state of a training"));
}

class LossLogTest : public ::testing::Test {
 protected:
  std::string Content() {
    std::ifstream file(path_);
    return {std::istreambuf_iterator<char>(file), {}};
  }
  std::string path_ = MakeTempDir() + "/training/qat.jsonl";
  const std::string block0_ = R"({"phase":"blocks","block":0,"step":9,"loss":1})"
                              "\n";
  const std::string block1_ = R"({"phase":"blocks","block":1,"step":1,"loss":1})"
                              "\n";
  const std::string step1_ = R"({"phase":"end_to_end","step":1,"loss":1})"
                             "\n";
  const std::string step2_ = R"({"phase":"end_to_end","step":2,"loss":null})"
                             "\n";
};

TEST_F(LossLogTest, StartsEmptyAndGrows) {
  auto log = LossLog::Open(path_, {});
  ASSERT_TRUE(log.ok()) << log.status();
  EXPECT_EQ(Content(), "");
  ASSERT_TRUE(log->Add("{\"step\":1}").ok());
  ASSERT_TRUE(log->Add("{\"step\":2}").ok());
  EXPECT_EQ(Content(), "{\"step\":1}\n{\"step\":2}\n");
}

TEST_F(LossLogTest, WhatIsBehindTheSavedStateIsDropped) {
  fs::create_directories(fs::path(path_).parent_path());
  const auto kept = [&](int64_t blocks, int64_t step) {
    EXPECT_TRUE(WriteFile(path_, block0_ + block1_ + step1_ + step2_ + R"({"phase":"end_to)").ok());
    TrainPosition position;
    position.blocks = blocks;
    position.step = step;
    EXPECT_TRUE(LossLog::Open(path_, position).ok());
    return Content();
  };
  EXPECT_EQ(kept(0, 0), "");
  EXPECT_EQ(kept(1, 0), block0_);
  EXPECT_EQ(kept(2, 0), block0_ + block1_);
  EXPECT_EQ(kept(2, 1), block0_ + block1_ + step1_);
  EXPECT_EQ(kept(2, 9), block0_ + block1_ + step1_ + step2_);
}

TEST_F(LossLogTest, FullDiskIsSaid) {
  fs::create_directories(fs::path(path_).parent_path());
  auto log = LossLog::Open(path_, {});
  ASSERT_TRUE(log.ok());
  fs::remove(path_);
  fs::create_symlink("/dev/full", path_);
  EXPECT_THAT(std::string(log->Add("{}").message()), HasSubstr("cannot write " + path_));
}

}  // namespace
}  // namespace quantmill::testing
