#include "tests/crash/run_fixture.h"

#include <sys/wait.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "gmock/gmock.h"
#include "tests/support/shared_data.h"

namespace quantmill::testing {
namespace {

namespace fs = std::filesystem;

std::string Content(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

// What was built, unless the environment names another place: tests may run where they were not
// built.
std::string Built(const char* variable, const char* path) {
  const char* elsewhere = std::getenv(variable);
  return elsewhere != nullptr ? elsewhere : path;
}

std::string Quoted(const std::string& text) { return "'" + text + "'"; }

}  // namespace

void RunFixture::SetUp() {
  directory_ = MakeTempDir();
  model_ = SourcePath("configs/quickstart/tiny-llama");
  const std::string text = Content(SourcePath("configs/quickstart/text.txt"));
  ASSERT_FALSE(text.empty());
  std::ofstream(Path("calib.txt")) << text;
}

std::string RunFixture::Pipeline(const std::string& name, const std::string& stages,
                                 const std::string& format, const std::string& extra) {
  const std::string path = Path(name + ".yaml");
  std::ofstream(path) << "version: 1\nmodel: {path: " << model_ << "}\n"
                      << "run: {device: cpu, seed: 1, work_dir: " << name << ".work}\n"
                      << extra << "stages:\n"
                      << stages << "export: {format: " << format << ", path: " << name << ".out}\n";
  return path;
}

ProgramResult RunFixture::Program(const std::vector<std::string>& arguments,
                                  const std::vector<std::string>& environment) {
  std::string command;
  for (const std::string& setting : environment) command += setting + " ";
  command += Quoted(Built("QM_PROGRAM", QM_PROGRAM));
  for (const std::string& argument : arguments) command += " " + Quoted(argument);
  return Shell(command);
}

std::string RunFixture::Offender() { return Built("QM_OFFENDER", QM_OFFENDER); }

ProgramResult RunFixture::Shell(std::string command) {
  command += " >" + Quoted(Path("stdout")) + " 2>" + Quoted(Path("stderr"));
  const int status = std::system(command.c_str());
  ProgramResult result;
  result.exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  result.out = Content(Path("stdout"));
  result.err = Content(Path("stderr"));
  return result;
}

ProgramResult RunFixture::RunPipeline(const std::string& path, std::vector<std::string> more,
                                      const std::vector<std::string>& environment) {
  std::vector<std::string> arguments = {"run", path, "--plugin", Offender()};
  arguments.insert(arguments.end(), more.begin(), more.end());
  return Program(arguments, environment);
}

std::map<std::string, std::string> RunFixture::Tree(const std::string& directory) {
  std::map<std::string, std::string> files;
  for (const auto& entry : fs::recursive_directory_iterator(directory)) {
    if (entry.is_regular_file()) {
      files[fs::relative(entry.path(), directory).string()] = Content(entry.path());
    }
  }
  return files;
}

std::string RunFixture::BundleLeftBy(const std::string& name, const ProgramResult& run) {
  for (const auto& entry : fs::recursive_directory_iterator(Path(name + ".work/crash"))) {
    if (entry.path().filename() != "call.json") continue;
    const std::string directory = entry.path().parent_path().string();
    EXPECT_THAT(run.err,
                ::testing::HasSubstr("repeat the call with: quantmill replay " + directory));
    return directory;
  }
  ADD_FAILURE() << "no bundle: " << run.err;
  return "";
}

void RunFixture::SetOption(const std::string& bundle, const std::string& name,
                           const std::string& value) {
  auto call = nlohmann::json::parse(Content(bundle + "/call.json"));
  call["options"][name] = value;
  std::ofstream(bundle + "/call.json") << call;
}

}  // namespace quantmill::testing
