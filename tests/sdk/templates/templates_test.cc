// quantmill new and the projects it makes.
#include <stdlib.h>
#include <sys/wait.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/shared_data.h"

namespace quantmill::testing {
namespace {

namespace fs = std::filesystem;
using ::testing::HasSubstr;

std::string Content(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

struct ShellResult {
  int exit_code;  // -1: killed by a signal
  std::string output;
};

class NewTest : public ::testing::Test {
 protected:
  // The program and the SDK, installed once; the plugins of the build are used in place.
  static void SetUpTestSuite() {
    prefix_ = MakeTempDir();
    for (const char* component : {"program", "sdk"}) {
      const ShellResult installed =
          Shell("/", std::string("'" QM_CMAKE "' --install '" QM_BUILD_DIR "' --component ") +
                         component + " --prefix '" + prefix_ + "'");
      ASSERT_EQ(installed.exit_code, 0) << installed.output;
    }
    setenv("QUANTMILL_PLUGIN_PATH", QM_PLUGINS, 1);
  }
  void SetUp() override { folder_ = MakeTempDir(); }

  static ShellResult Shell(const std::string& folder, const std::string& command) {
    const std::string log = prefix_ + "/log";
    const int status =
        std::system(("cd '" + folder + "' && " + command + " >'" + log + "' 2>&1").c_str());
    return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, Content(log)};
  }
  ShellResult Quantmill(const std::string& arguments) {
    return Shell(folder_, "'" + prefix_ + "/bin/quantmill' " + arguments);
  }
  void Succeeds(const std::string& command) {
    const ShellResult result = Shell(folder_, command);
    ASSERT_EQ(result.exit_code, 0) << command << "\n" << result.output;
  }
  void Refused(const std::string& arguments, int exit_code, const std::string& words) {
    const ShellResult result = Quantmill(arguments);
    EXPECT_EQ(result.exit_code, exit_code) << result.output;
    EXPECT_THAT(result.output, HasSubstr("error: "));
    EXPECT_THAT(result.output, HasSubstr(words));
  }

  // Makes, configures, builds and tests ./NAME as the program's own advice says. The conformance
  // cases are slow: `tests` can leave them out where only the build is new.
  void Build(const std::string& name, const std::string& language, const std::string& settings,
             const std::string& tests = "") {
    const ShellResult made = Quantmill("new " + name + " --template " + language);
    ASSERT_EQ(made.exit_code, 0) << made.output;
    EXPECT_THAT(made.output, HasSubstr("cmake -S " + name + " -B " + name +
                                       "/build -DCMAKE_PREFIX_PATH=" + prefix_));
    Succeeds("'" QM_CMAKE "' -S " + name + " -B " + name + "/build -DCMAKE_PREFIX_PATH='" +
             prefix_ + "' " + settings);
    Succeeds("'" QM_CMAKE "' --build " + name + "/build");
    Succeeds("'" QM_CTEST "' --test-dir " + name + "/build --output-on-failure " + tests);
  }

  // Runs the project's pipeline, and the same with ptq: both round alike, so the weights they write
  // are the same bytes.
  void ExpectWeightsOfPtq(const std::string& name) {
    const std::string run =
        "'" + prefix_ + "/bin/quantmill' run " + name + "/pipeline.yaml --device cpu ";
    Succeeds(run);
    Succeeds(run + "--set stages.0.use=ptq --set export.path=ptq --work-dir " + folder_ +
             "/ptq.work");
    const std::string ours = Content(folder_ + "/" + name + "/build/out/model.safetensors");
    ASSERT_FALSE(ours.empty());
    EXPECT_TRUE(ours == Content(folder_ + "/" + name + "/ptq/model.safetensors"));
  }

  static inline std::string prefix_;
  std::string folder_;
};

constexpr char kWithoutCheck[] = "-E '[.]check$'";

bool Have(const std::string& program) {
  return std::system(("command -v " + program + " >/dev/null").c_str()) == 0;
}

// As a project in C alone, with make, and a name that needs every substitution.
TEST_F(NewTest, CTemplateRoundsAsPtqDoes) {
  Build("my-own_method2", "c", "-G 'Unix Makefiles'");
  ExpectWeightsOfPtq("my-own_method2");
}

TEST_F(NewTest, CTemplateBuildsWithAnotherCompiler) {
  if (!Have("clang")) GTEST_SKIP() << "no clang";
  Build("by-clang", "c", "-DCMAKE_C_COMPILER=clang", kWithoutCheck);
}

// A keyword is a name like any other.
TEST_F(NewTest, CppTemplateRoundsAsPtqDoes) {
  Build("double", "cpp", "");
  ExpectWeightsOfPtq("double");
}

TEST_F(NewTest, CppTemplateBuildsWithAnotherCompiler) {
  if (!Have("clang++")) GTEST_SKIP() << "no clang++";
  Build("by-clang", "cpp", "-DCMAKE_CXX_COMPILER=clang++", kWithoutCheck);
}

TEST_F(NewTest, CudaTemplateRoundsAsPtqDoesOnTheCpu) {
  Build("without-cuda", "cuda", "-DQM_CUDA=OFF");
  ExpectWeightsOfPtq("without-cuda");
}

TEST_F(NewTest, CudaTemplateBuildsWithCuda) {
  if (!Have("nvcc")) GTEST_SKIP() << "no nvcc";
  Build("with-cuda", "cuda", "-DQM_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=90a-real", kWithoutCheck);
  EXPECT_TRUE(fs::exists(folder_ + "/with-cuda/build/lib/quantmill/plugins/libqm_with_cuda.so"));
}

TEST_F(NewTest, PresetNeedsNoSettings) {
  ASSERT_EQ(Quantmill("new presets --template c").exit_code, 0);
  Succeeds("cd presets && '" QM_CMAKE "' --preset dev -G 'Unix Makefiles' && '" QM_CMAKE
           "' --build --preset dev && '" QM_CTEST "' --preset dev -E '[.]check$'");
  Succeeds("'" QM_CMAKE "' --install presets/build --prefix out");
  EXPECT_TRUE(fs::exists(folder_ + "/out/lib/quantmill/plugins/libqm_presets.so"));
  EXPECT_TRUE(fs::exists(folder_ + "/out/lib/quantmill/plugins/libqm_presets.qm.json"));
}

TEST_F(NewTest, NothingOfTheTemplateIsLeftInAProject) {
  for (const char* language : {"c", "cpp", "cuda"}) {
    const std::string name = std::string("x-") + language;
    ASSERT_EQ(Quantmill("new " + name + " --template " + language).exit_code, 0);
    for (const auto& entry : fs::directory_iterator(folder_ + "/" + name)) {
      const std::string text = Content(entry.path()) + entry.path().filename().string();
      for (const char* word : {"my-method", "my_method", "@PREFIX@", "@QUICKSTART@"}) {
        EXPECT_EQ(text.find(word), std::string::npos) << entry.path() << ": " << word;
      }
    }
  }
}

TEST_F(NewTest, WrongInputIsRefusedAndLeavesNothing) {
  Refused("new", 2, "NAME");
  Refused("new x --template cdua", 2, "did you mean 'cuda'?");
  Refused("new x --template rust", 2, "known: c, cpp, cuda");
  for (const char* name : {"Upper", "9lives", "a.b", "a b", "", "_x", "\303\244"}) {
    Refused("new -- '" + std::string(name) + "'", 2, "cannot be the name of a method");
  }
  Refused("new '" + std::string(65, 'x') + "'", 2, "1 to 64 characters");
  Refused("new sub/x", 2, "change to the folder");
  EXPECT_TRUE(fs::is_empty(folder_));
  fs::create_directory(folder_ + "/taken");
  Refused("new taken", 2, "./taken exists already");
  EXPECT_TRUE(fs::is_empty(folder_ + "/taken"));
  // Not even root can write there.
  const ShellResult read_only = Shell("/sys", "'" + prefix_ + "/bin/quantmill' new x");
  EXPECT_EQ(read_only.exit_code, 1);
  EXPECT_THAT(read_only.output, HasSubstr("error: cannot make the folder ./x"));
}

TEST_F(NewTest, MissingTemplatesAreSaidToBeMissing) {
  fs::create_directories(folder_ + "/bin");
  fs::copy(prefix_ + "/bin/quantmill", folder_ + "/bin/quantmill");
  const ShellResult result = Shell(folder_, "bin/quantmill new x");
  EXPECT_EQ(result.exit_code, 1);
  EXPECT_THAT(result.output,
              HasSubstr("no templates in " + folder_ + "/share/quantmill/templates"));
}

int Lines(const std::vector<std::string>& files) {
  int lines = 0;
  for (const std::string& file : files) {
    const std::string text = Content(SourcePath("sdk/templates/" + file));
    EXPECT_FALSE(text.empty()) << file;
    lines += static_cast<int>(std::count(text.begin(), text.end(), '\n'));
  }
  return lines;
}

// A template is read in one go.
TEST(TemplateSizes, StaySmall) {
  EXPECT_LT(Lines({"c/plugin.c"}), 80);
  EXPECT_LT(Lines({"cpp/CMakeLists.txt", "cpp/plugin.cc", "cpp/my_method_test.cc"}), 150);
  EXPECT_LT(Lines({"cuda/plugin.cc", "cuda/my_method.h", "cuda/my_method.cu"}), 150);
}

}  // namespace
}  // namespace quantmill::testing
