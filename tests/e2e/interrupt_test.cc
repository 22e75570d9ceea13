// Ctrl-C in the middle of a run.
#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fstream>
#include <iterator>

#include "gmock/gmock.h"
#include "tests/crash/run_fixture.h"

namespace quantmill::testing {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

using InterruptTest = RunFixture;

constexpr char kSlowStage[] =
    "  - {name: slow, use: org.example.offender, layers: ['*.mlp.*'], options: {misbehave: "
    "slow}}\n";

std::string Content(const std::string& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

TEST_F(InterruptTest, SaysHowToContinueAndContinues) {
  ASSERT_EQ(RunPipeline(Pipeline("whole", kSlowStage)).exit_code, 0);
  const std::string pipeline = Pipeline("cut", kSlowStage);
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    const int err = open(Path("err").c_str(), O_WRONLY | O_CREAT, 0600);
    dup2(err, STDERR_FILENO);
    execl(QM_PROGRAM, QM_PROGRAM, "run", pipeline.c_str(), "--plugin", QM_OFFENDER,
          static_cast<char*>(nullptr));
    _exit(127);
  }
  // Until one unit is finished; a program that stops earlier is found by waitpid below.
  for (int i = 0;
       i < 600 && Content(Path("cut.work/journal.jsonl")).find("\"end\"") == std::string::npos;
       ++i) {
    usleep(20 * 1000);
  }
  kill(child, SIGINT);
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 1);
  EXPECT_THAT(Content(Path("err")),
              AllOf(HasSubstr("error: interrupted; "),
                    HasSubstr("continue with the same command and --resume")));
  const ProgramResult resumed = RunPipeline(pipeline, {"--resume", "--json", Path("r.json")});
  ASSERT_EQ(resumed.exit_code, 0) << resumed.err;
  EXPECT_GE(nlohmann::json::parse(Content(Path("r.json")))["reused_units"], 1);
  EXPECT_EQ(Tree(Path("cut.out")), Tree(Path("whole.out")));
}

}  // namespace
}  // namespace quantmill::testing
