#include "host/plugins/registry.h"

#include <stdlib.h>

#include <boost/dll/shared_library.hpp>
#include <filesystem>
#include <map>
#include <mutex>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/io/sha256.h"
#include "host/plugins/descriptor.h"
#include "host/plugins/rule_note.h"

namespace quantmill {
namespace {

struct LoadedFile {
  boost::dll::shared_library library;
  const qm_plugin* plugin = nullptr;
};

// Never destroyed: plugins are not unloaded (QM-H-003), not even at exit, where their threads or
// static destructors could still run.
struct LoadedFiles {
  std::mutex mutex;
  std::map<std::string, LoadedFile> by_path;  // real path
};

LoadedFiles& Files() {
  static LoadedFiles* files = new LoadedFiles;
  return *files;
}

// Boost.DLL puts what dlerror() said into the middle of its own message.
std::string LoaderMessage(const std::string& text) {
  const std::string mark = "dlerror system message: ";
  const size_t begin = text.find(mark);
  const size_t end = text.rfind("): ");
  if (begin == std::string::npos || end == std::string::npos || end < begin) return text;
  return text.substr(begin + mark.size(), end - begin - mark.size());
}

absl::StatusOr<LoadedFile> OpenFile(const std::string& path) {
  LoadedFile file;
  try {
    file.library.load(path, boost::dll::load_mode::rtld_now | boost::dll::load_mode::rtld_local);
  } catch (const std::exception& error) {
    return absl::FailedPreconditionError(ErrorText(absl::StrCat("cannot load plugin ", path),
                                                   LoaderMessage(error.what()),
                                                   "check with ldd that its libraries are found"));
  }
  if (!file.library.has(QM_ENTRY_SYMBOL)) {
    return BreaksRule(
        absl::FailedPreconditionError(ErrorText(
            absl::StrCat("cannot load plugin ", path), absl::StrCat("it has no ", QM_ENTRY_SYMBOL),
            absl::StrCat("build it against the headers of ABI major ", QM_ABI_MAJOR))),
        "QM-A-001");
  }
  const auto entry = file.library.get<const qm_plugin*()>(QM_ENTRY_SYMBOL);
  file.plugin = entry();
  QM_RETURN_IF_ERROR(
      WithContext(CheckDescriptor(file.plugin), absl::StrCat("cannot load plugin ", path)));
  return file;
}

absl::StatusOr<const qm_plugin*> Load(const std::string& path, std::string* real_path) {
  std::error_code error;
  const std::filesystem::path real = std::filesystem::canonical(path, error);
  if (error) {
    return absl::NotFoundError(
        ErrorText(absl::StrCat("cannot open plugin ", path), error.message()));
  }
  *real_path = real.string();
  LoadedFiles& files = Files();
  const std::lock_guard<std::mutex> lock(files.mutex);
  auto it = files.by_path.find(*real_path);
  if (it == files.by_path.end()) {
    QM_ASSIGN_OR_RETURN(LoadedFile file, OpenFile(*real_path));
    it = files.by_path.emplace(*real_path, std::move(file)).first;
  }
  return it->second.plugin;
}

}  // namespace

absl::StatusOr<std::vector<LoadedMethod>> LoadPlugin(const std::string& path) {
  std::string real_path;
  QM_ASSIGN_OR_RETURN(const qm_plugin* plugin, Load(path, &real_path));
  std::vector<LoadedMethod> methods;
  for (uint32_t i = 0; i < plugin->method_count; ++i) {
    methods.push_back({plugin, plugin->methods[i], real_path});
  }
  return methods;
}

absl::StatusOr<std::vector<LoadedMethod>> LoadMethods(const Catalog& catalog,
                                                      const std::vector<std::string>& method_ids) {
  std::vector<const PluginInfo*> wanted;
  auto want = [&wanted](const PluginInfo* info) {
    if (std::find(wanted.begin(), wanted.end(), info) == wanted.end()) wanted.push_back(info);
  };
  for (const std::string& id : method_ids) {
    const PluginInfo* info = catalog.FindPlugin(id);
    if (info == nullptr) {
      return absl::NotFoundError(ErrorText(absl::StrCat("no plugin offers method '", id, "'"), "",
                                           "see quantmill plugins"));
    }
    want(info);
  }
  if (method_ids.empty()) {
    for (const PluginInfo& info : catalog.plugins) {
      if (info.rejected.empty()) want(&info);
    }
  }
  std::vector<LoadedMethod> methods;
  for (const PluginInfo* info : wanted) {
    QM_ASSIGN_OR_RETURN(std::vector<LoadedMethod> loaded, LoadPlugin(info->path));
    methods.insert(methods.end(), loaded.begin(), loaded.end());
  }
  return methods;
}

absl::StatusOr<PluginInfo> DescribePlugin(const std::string& path) {
  std::string real_path;
  QM_ASSIGN_OR_RETURN(const qm_plugin* plugin, Load(path, &real_path));
  PluginInfo info = DescriptorInfo(*plugin);
  info.path = std::filesystem::absolute(path).lexically_normal().string();
  QM_ASSIGN_OR_RETURN(info.sha256, Sha256OfFile(path));
  return info;
}

}  // namespace quantmill
