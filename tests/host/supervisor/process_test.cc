#include "host/supervisor/process.h"

#include <chrono>
#include <fstream>
#include <iterator>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "host/supervisor/last_words.h"
#include "tests/support/shared_data.h"

namespace quantmill {
namespace {

// The shell as a worker.
WorkerEnd RunShell(const std::string& script, std::vector<nlohmann::json>* events,
                   WorkerOptions options = {}) {
  options.program = "/bin/sh";
  options.arguments = {"-c", script};
  const auto end =
      RunWorker(options, [events](const nlohmann::json& event) { events->push_back(event); });
  EXPECT_TRUE(end.ok()) << end.status();
  return end.ok() ? *end : WorkerEnd();
}

TEST(RunWorkerTest, PassesTheRequestAndEvents) {
  std::vector<nlohmann::json> events;
  WorkerOptions options;
  options.request = "{\"type\":\"echo\"}\n";
  const WorkerEnd end =
      RunShell("cat >&3; echo no-json >&3; echo '{\"n\":2}' >&3", &events, options);
  EXPECT_EQ(end.exit_code, 0);
  EXPECT_FALSE(end.lost());
  ASSERT_EQ(events.size(), 2u);
  EXPECT_EQ(events[0]["type"], "echo");
  EXPECT_EQ(events[1]["n"], 2);
  EXPECT_GT(end.peak_rss_bytes, 0);
}

TEST(RunWorkerTest, ReportsSignalsAndExitCodes) {
  std::vector<nlohmann::json> events;
  EXPECT_EQ(RunShell("kill -SEGV $$", &events).How(1), "died (SIGSEGV)");
  EXPECT_EQ(RunShell("exit 4", &events).How(1), "exited with code 4");
  EXPECT_TRUE(RunShell("exit 75", &events).lost());
}

TEST(RunWorkerTest, InterruptionStopsIt) {
  std::vector<nlohmann::json> events;
  WorkerOptions options;
  options.interrupted = [] { return true; };
  EXPECT_TRUE(RunShell("exec sleep 30", &events, options).interrupted);
}

TEST(RunWorkerTest, CallWithoutHeartbeatIsAHang) {
  WorkerOptions options;
  options.last_words = testing::MakeTempDir() + "/words";
  options.hang_seconds = 0.3;
  const auto words = LastWords::Open(options.last_words);
  ASSERT_TRUE(words.ok()) << words.status();
  std::vector<nlohmann::json> events;
  bool began = false;
  options.interrupted = [&] {  // stands in for the worker's side of the record
    if (!began) (*words)->Begin({{"plugin", "p"}});
    began = true;
    return false;
  };
  const WorkerEnd end = RunShell("exec sleep 30", &events, options);
  EXPECT_TRUE(end.hung);
  ASSERT_TRUE(end.running_call.has_value());
  EXPECT_EQ((*end.running_call)["plugin"], "p");
}

// A call that waits for the host's own linear algebra is given more time than one that is silent.
TEST(RunWorkerTest, ServiceOfTheHostIsNoHang) {
  WorkerOptions options;
  options.last_words = testing::MakeTempDir() + "/words";
  options.hang_seconds = 0.2;
  const auto words = LastWords::Open(options.last_words);
  ASSERT_TRUE(words.ok()) << words.status();
  std::vector<nlohmann::json> events;
  bool began = false;
  options.interrupted = [&] {
    if (!began) {
      (*words)->Begin({{"plugin", "p"}});
      (*words)->EnterService();
    }
    began = true;
    return false;
  };
  EXPECT_FALSE(RunShell("sleep 1", &events, options).hung);
  (*words)->LeaveService();
  EXPECT_FALSE((*words)->InService());
}

TEST(RunWorkerTest, WhatItLeavesBehindIsEndedAndNotWaitedFor) {
  std::vector<nlohmann::json> events;
  const auto start = std::chrono::steady_clock::now();
  const std::string directory = testing::MakeTempDir();
  EXPECT_EQ(
      RunShell("sleep 60 & echo $! >" + directory + "/pid; echo '{\"n\":1}' >&3; exit 4", &events)
          .exit_code,
      4);
  EXPECT_EQ(events.size(), 1u);
  // Out of the process group it lives on, but nobody waits for its end of the pipe.
  EXPECT_EQ(RunShell("setsid sleep 20 & sleep 0.1; exit 5", &events).exit_code, 5);
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(10));
  std::ifstream file(directory + "/pid");
  pid_t left = 0;
  ASSERT_TRUE(file >> left);
  // Dead, or a zombie that nobody has reaped yet.
  std::ifstream status(absl::StrCat("/proc/", left, "/stat"));
  const std::string text((std::istreambuf_iterator<char>(status)), {});
  EXPECT_TRUE(text.empty() || text.find(") Z ") != std::string::npos) << text;
}

TEST(RunWorkerTest, ClosingThePipeIsNotTheEnd) {
  std::vector<nlohmann::json> events;
  EXPECT_EQ(RunShell("exec 3>&-; sleep 0.3; exit 6", &events).exit_code, 6);
}

TEST(LastWordsTest, LongOptionsAreLeftOut) {
  const auto words = LastWords::Open(testing::MakeTempDir() + "/words");
  ASSERT_TRUE(words.ok()) << words.status();
  (*words)->Begin({{"slot", "s"}, {"options", std::string(20000, 'x')}});
  ASSERT_TRUE((*words)->Running().has_value());
  EXPECT_EQ((*(*words)->Running())["slot"], "s");
  (*words)->End();
  EXPECT_FALSE((*words)->Running().has_value());
}

}  // namespace
}  // namespace quantmill
