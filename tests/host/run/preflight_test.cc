#include "host/run/preflight.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace quantmill {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

PlanReport Needs() {
  PlanReport report;
  report.peak_host_bytes = 4'000'000'000;
  report.peak_device_bytes = 2'000'000'000;
  report.work_bytes = 1'000'000'000;
  report.output_bytes = 3'000'000'000;
  return report;
}

MachineState Plenty() {
  MachineState machine;
  machine.host_bytes = machine.device_bytes = 8'000'000'000;
  machine.work_disk_bytes = machine.output_disk_bytes = 8'000'000'000;
  return machine;
}

TEST(CheckMachineTest, EnoughOfEverything) {
  EXPECT_TRUE(CheckMachine({}, Needs(), Plenty()).ok());
  EXPECT_TRUE(CheckMachine({}, Needs(), MachineState()).ok());  // nothing is known
}

TEST(CheckMachineTest, EveryShortageIsNamedWithBothFigures) {
  MachineState machine;
  machine.host_bytes = 3'000'000'000;
  machine.device_bytes = 1'000'000'000;
  machine.work_disk_bytes = 500'000'000;
  machine.output_disk_bytes = 2'000'000'000;
  const absl::Status status = CheckMachine({}, Needs(), machine);
  EXPECT_TRUE(absl::IsFailedPrecondition(status));
  EXPECT_THAT(std::string(status.message()),
              AllOf(HasSubstr("host memory: about 4.00 GB needed, 3.00 GB available"),
                    HasSubstr("device memory: about 2.00 GB needed, 1.00 GB available"),
                    HasSubstr("disk space for work_dir: about 1.00 GB needed, 0.50 GB available"),
                    HasSubstr("disk space for the output: about 3.00 GB needed, 2.00 GB")));
}

// Each fits alone, both together do not.
TEST(CheckMachineTest, OneDiskHoldsBoth) {
  MachineState machine = Plenty();
  machine.work_disk_bytes = machine.output_disk_bytes = 3'500'000'000;
  EXPECT_TRUE(CheckMachine({}, Needs(), machine).ok());
  machine.one_disk = true;
  EXPECT_THAT(std::string(CheckMachine({}, Needs(), machine).message()),
              HasSubstr("work_dir and output: about 4.00 GB needed, 3.50 GB available"));
}

TEST(CheckMachineTest, LimitsOfThePipelineCount) {
  PipelinePlan plan;
  plan.pipeline.host_memory_limit = 2'000'000'000;
  const std::string text(CheckMachine(plan, Needs(), Plenty()).message());
  EXPECT_THAT(text, AllOf(HasSubstr("host memory"), HasSubstr("2.00 GB available"),
                          Not(HasSubstr("device"))));
}

}  // namespace
}  // namespace quantmill
