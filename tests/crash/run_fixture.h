// Runs the quantmill binary on pipelines made for a test.
#ifndef QUANTMILL_TESTS_CRASH_RUN_FIXTURE_H_
#define QUANTMILL_TESTS_CRASH_RUN_FIXTURE_H_

#include <map>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

namespace quantmill::testing {

struct ProgramResult {
  int exit_code = 0;  // -1: killed by a signal
  std::string out, err;
};

// A fresh directory with a copy of nothing: the tiny model of configs/quickstart is used in place.
class RunFixture : public ::testing::Test {
 protected:
  // The layer that the offender and its CUDA twin spoil unless told otherwise.
  static constexpr char kBadLayer[] = "model.layers.1.mlp.down_proj";
  // Sections of a pipeline.
  static constexpr char kEvaluate[] = "evaluate: {text: calib.txt, context: 128}\n";
  static constexpr char kShortEvaluate[] = "evaluate: {text: calib.txt, context: 64, windows: 8}\n";

  void SetUp() override;

  // Writes DIR/NAME.yaml: model, the given calibration and stages text, export to DIR/NAME.out as
  // `format`, work directory DIR/NAME.work. Returns its path.
  std::string Pipeline(const std::string& name, const std::string& stages,
                       const std::string& format = "quantmill", const std::string& extra = "");
  // The file of the plugin that misbehaves.
  static std::string Offender();
  // quantmill ARGUMENTS, with the offender plugin. Environment as NAME=VALUE.
  ProgramResult Program(const std::vector<std::string>& arguments,
                        const std::vector<std::string>& environment = {});
  // A whole command line, without redirections.
  ProgramResult Shell(std::string command);
  ProgramResult RunPipeline(const std::string& path, std::vector<std::string> more = {},
                            const std::vector<std::string>& environment = {});

  // The folder with a failed call that the run of Pipeline(name) left, which its message names.
  std::string BundleLeftBy(const std::string& name, const ProgramResult& run);
  // Changes an option of a bundle's call.
  static void SetOption(const std::string& bundle, const std::string& name,
                        const std::string& value);

  std::string Path(const std::string& name) const { return directory_ + "/" + name; }
  // Every file below a directory with its content.
  static std::map<std::string, std::string> Tree(const std::string& directory);

  std::string directory_, model_;
};

inline constexpr char kCalibration[] =
    "calibration: {text: calib.txt, samples: 4, sequence_length: 64}\n";

}  // namespace quantmill::testing

#endif  // QUANTMILL_TESTS_CRASH_RUN_FIXTURE_H_
