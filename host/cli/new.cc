// quantmill new NAME --template T: a plugin project in ./NAME from share/quantmill/templates/T.
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <ostream>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "core/base/nearest.h"
#include "core/base/status.h"
#include "core/io/files.h"
#include "host/cli/command.h"

namespace quantmill {
namespace {

namespace fs = std::filesystem;

constexpr size_t kLongestName = 64;

// The tree this program belongs to, installed or built: the parent of its folder bin.
absl::StatusOr<fs::path> Prefix() {
  std::error_code error;
  const fs::path program = fs::read_symlink("/proc/self/exe", error);
  if (error) {
    return absl::InternalError(
        ErrorText("cannot find this program's folder", error.message(), "is /proc mounted?"));
  }
  return program.parent_path().parent_path();
}

absl::StatusOr<std::vector<std::string>> TemplateNames(const fs::path& folder) {
  std::vector<std::string> names;
  std::error_code error;
  for (fs::directory_iterator entry(folder, error), end; !error && entry != end;
       entry.increment(error)) {
    if (entry->is_directory()) names.push_back(entry->path().filename().string());
  }
  if (error || names.empty()) {
    return absl::NotFoundError(ErrorText(absl::StrCat("no templates in ", folder.string()),
                                         error ? error.message() : "the folder is empty",
                                         "install quantmill with its SDK"));
  }
  std::sort(names.begin(), names.end());
  return names;
}

// A name becomes a folder, part of a method's id, a CMake target and a C++ identifier.
absl::Status CheckName(const std::string& name) {
  const auto lower = [](char c) { return c >= 'a' && c <= 'z'; };
  const bool good = std::all_of(name.begin(), name.end(), [&](char c) {
    return lower(c) || (c >= '0' && c <= '9') || c == '-' || c == '_';
  });
  if (!name.empty() && name.size() <= kLongestName && lower(name[0]) && good) {
    return absl::OkStatus();
  }
  return UsageError(
      absl::StrCat("'", name, "' cannot be the name of a method"),
      absl::StrCat("a name is 1 to ", kLongestName,
                   " characters a-z, 0-9, '-' and '_', the first a letter"),
      name.find('/') != std::string::npos ? "change to the folder where ./NAME shall be" : "");
}

// What is replaced in the files of a template, and in their names.
std::vector<std::pair<std::string, std::string>> Replacements(const std::string& name,
                                                              const fs::path& prefix) {
  return {{"my-method", name},
          {"my_method", absl::StrReplaceAll(name, {{"-", "_"}})},
          {"@PREFIX@", prefix.string()},
          {"@QUICKSTART@", (prefix / "share/quantmill/quickstart").string()}};
}

// Files of the project by their path in it.
absl::StatusOr<std::vector<std::pair<std::string, std::string>>> Instantiate(
    const fs::path& folder, const std::vector<std::pair<std::string, std::string>>& replacements) {
  std::vector<std::pair<std::string, std::string>> files;
  std::error_code error;
  for (fs::directory_iterator entry(folder, error), end; !error && entry != end;
       entry.increment(error)) {
    QM_ASSIGN_OR_RETURN(const std::string content, ReadFile(entry->path().string()));
    files.emplace_back(absl::StrReplaceAll(entry->path().filename().string(), replacements),
                       absl::StrReplaceAll(content, replacements));
  }
  if (error)
    return absl::UnavailableError(ErrorText("cannot read " + folder.string(), error.message()));
  std::sort(files.begin(), files.end());
  return files;
}

// All of the project, or nothing.
absl::Status WriteProject(const std::string& name,
                          const std::vector<std::pair<std::string, std::string>>& files) {
  if (mkdir(name.c_str(), 0777) != 0) {
    if (errno == EEXIST) {
      return UsageError(absl::StrCat("./", name, " exists already"), "nothing was changed",
                        "choose another name, or move it away");
    }
    return SystemError("make the folder", "./" + name, errno);
  }
  for (const auto& [file, content] : files) {
    absl::Status status = WriteFile(absl::StrCat(name, "/", file), content);
    if (!status.ok()) {
      std::error_code ignored;
      fs::remove_all(name, ignored);
      return status;
    }
  }
  return absl::OkStatus();
}

void PrintNext(const std::string& name, const fs::path& prefix, bool installed, std::ostream& out) {
  out << "\nNext:\n"
      << "  cmake -S " << name << " -B " << name
      << "/build -DCMAKE_PREFIX_PATH=" << (installed ? prefix.string() : "<install tree>") << "\n"
      << "  cmake --build " << name << "/build\n"
      << "  ctest --test-dir " << name << "/build\n"
      << "  quantmill run " << name << "/pipeline.yaml\n";
  if (!installed) {
    out << "This program lies in a build tree; cmake --install " << prefix.string()
        << " --prefix DIR makes an <install tree>.\n";
  }
}

absl::StatusOr<int> RunNewCommand(const Arguments& args) {
  const std::string name = args.Text("NAME"), chosen = args.Text("template");
  QM_RETURN_IF_ERROR(CheckName(name));
  QM_ASSIGN_OR_RETURN(const fs::path prefix, Prefix());
  const fs::path templates = prefix / "share/quantmill/templates";
  QM_ASSIGN_OR_RETURN(const std::vector<std::string> names, TemplateNames(templates));
  if (std::find(names.begin(), names.end(), chosen) == names.end()) {
    return UsageError(absl::StrCat("no template '", chosen, "'"), NearestHint(chosen, names));
  }
  QM_ASSIGN_OR_RETURN(const auto files,
                      Instantiate(templates / chosen, Replacements(name, prefix)));
  QM_RETURN_IF_ERROR(WriteProject(name, files));
  std::ostream& out = args.out();
  nlohmann::ordered_json list = nlohmann::ordered_json::array();
  for (const auto& file : files) {
    out << "wrote " << name << "/" << file.first << "\n";
    list.push_back(name + "/" + file.first);
  }
  PrintNext(name, prefix, FileExists((prefix / "lib/cmake/quantmill_sdk").string()), out);
  QM_RETURN_IF_ERROR(
      args.WriteJson({{"project", name}, {"template", chosen}, {"files", std::move(list)}}));
  return kExitDone;
}

}  // namespace

Command MakeNewCommand() {
  return {.name = "new",
          .summary = "start a method of your own: a plugin project that builds and runs",
          .arguments = {{"NAME", "of the method and of the folder made here, e.g. my-method"}},
          .options = {{.name = "template",
                       .value = "c|cpp|cuda",
                       .doc = "language to start from; cuda also builds for the CPU alone",
                       .default_value = "cpp"}},
          .examples = {"quantmill new my-method --template cpp",
                       "quantmill new my-method --template c"},
          .notes = "Templates lie in ../share/quantmill/templates beside this program.",
          .run = RunNewCommand};
}

}  // namespace quantmill
