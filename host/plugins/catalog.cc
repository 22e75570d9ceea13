#include "host/plugins/catalog.h"

#include <stdlib.h>
#include <sys/auxv.h>

#include <algorithm>
#include <filesystem>
#include <map>
#include <set>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "core/base/status.h"
#include "core/io/files.h"
#include "core/io/json.h"
#include "core/io/sha256.h"
#include "host/plugins/descriptor.h"
#include "host/plugins/inspect_cache.h"
#include "host/plugins/inspect_child.h"
#include "host/plugins/manifest.h"
#include "host/plugins/rule_note.h"

namespace quantmill {
namespace {

namespace fs = std::filesystem;

constexpr double kInspectSeconds = 20;

// Environment variables count only for the user who owns the process.
std::string Environment(const char* name) {
  if (getauxval(AT_SECURE) != 0) return "";
  const char* value = getenv(name);
  return value == nullptr ? "" : value;
}

bool IsPluginName(const std::string& name) {
  return absl::StartsWith(name, "libqm_") && absl::EndsWith(name, ".so");
}

// Plugin files of a directory, sorted; empty when it cannot be read.
std::vector<std::string> PluginFiles(const std::string& directory) {
  std::vector<std::string> files;
  std::error_code error;
  for (fs::directory_iterator it(directory, error), end; !error && it != end; it.increment(error)) {
    if (IsPluginName(it->path().filename().string())) files.push_back(it->path().string());
  }
  std::sort(files.begin(), files.end());
  return files;
}

std::string InstalledFolder() {
  std::error_code error;
  const fs::path self = fs::read_symlink("/proc/self/exe", error);
  if (error) return "";
  return (self.parent_path() / ".." / "lib" / "quantmill" / "plugins").lexically_normal().string();
}

PluginInfo Rejected(const std::string& path, const std::string& sha256, const std::string& why) {
  PluginInfo info;
  info.path = path;
  info.sha256 = sha256;
  info.rejected = why;
  return info;
}

PluginInfo FromManifest(const std::string& path, const std::string& sha256) {
  const std::string manifest = ManifestPath(path);
  const std::string remedy = absl::StrCat("rerun quantmill inspect --manifest ", path);
  const auto json = ReadJson(manifest);
  if (!json.ok()) {
    return Rejected(path, sha256, ErrorText(std::string(json.status().message()), "", remedy));
  }
  absl::StatusOr<PluginInfo> info = PluginInfoFromJson(*json);
  if (!info.ok()) {
    return Rejected(path, sha256,
                    ErrorText(absl::StrCat("manifest ", manifest, " cannot be used"),
                              std::string(info.status().message()), remedy));
  }
  if (info->sha256 != sha256) {
    return Rejected(
        path, sha256,
        ErrorText("manifest is stale",
                  absl::StrCat(manifest, " describes another build of the file"), remedy));
  }
  info->path = path;
  return *std::move(info);
}

PluginInfo FromChild(const std::string& path, const std::string& sha256) {
  const InspectCache cache(path, sha256);
  if (!AuthorMode()) {  // whose answers say more
    if (auto cached = cache.Read()) return *std::move(cached);
  }
  absl::StatusOr<InspectResult> result = InspectInChild(QuantmillProgram(), path, kInspectSeconds);
  if (!result.ok()) return Rejected(path, sha256, std::string(result.status().message()));
  result->info.sha256 = sha256;
  if (result->lasting && !AuthorMode()) cache.Write(result->info);
  return std::move(result->info);
}

PluginInfo Describe(const std::string& path) {
  const absl::StatusOr<std::string> sha256 = Sha256OfFile(path);
  if (!sha256.ok()) return Rejected(path, "", std::string(sha256.status().message()));
  PluginInfo info =
      FileExists(ManifestPath(path)) ? FromManifest(path, *sha256) : FromChild(path, *sha256);
  if (!info.rejected.empty()) return info;
  // A manifest or a cached answer may be of another host's making.
  const absl::Status version = CheckVersion(info.abi_major, info.abi_minor, info.min_host_minor);
  if (!version.ok()) info.rejected = std::string(version.message());
  return info;
}

class Discovery {
 public:
  // A file, or a directory whose plugin files are taken.
  void Add(const std::string& path) {
    if (path.empty()) return;
    std::error_code error;
    const std::string absolute = fs::absolute(path, error).lexically_normal().string();
    if (std::find(catalog_.searched.begin(), catalog_.searched.end(), absolute) !=
        catalog_.searched.end()) {
      return;
    }
    catalog_.searched.push_back(absolute);
    if (!fs::is_directory(absolute, error)) {
      if (fs::exists(absolute, error)) AddFile(absolute);
      return;
    }
    for (const std::string& file : PluginFiles(absolute)) AddFile(file);
  }

  absl::StatusOr<Catalog> Finish() {
    std::map<std::string, std::string> owners;
    for (const PluginInfo& plugin : catalog_.plugins) {
      if (!plugin.rejected.empty()) continue;
      for (const MethodInfo& method : plugin.methods) {
        const auto [it, fresh] = owners.emplace(method.id, plugin.path);
        if (fresh) continue;
        return absl::AlreadyExistsError(
            ErrorText(absl::StrCat("two plugins offer the method '", method.id, "'"),
                      absl::StrCat(it->second, " and ", plugin.path),
                      "remove one of them from the search path"));
      }
    }
    return std::move(catalog_);
  }

 private:
  void AddFile(const std::string& path) {
    std::error_code error;
    const std::string real = fs::canonical(path, error).string();
    if (!real_paths_.insert(error ? path : real).second) return;
    catalog_.plugins.push_back(Describe(path));
  }

  Catalog catalog_;
  std::set<std::string> real_paths_;
};

}  // namespace

bool MethodInfo::Has(std::string_view capability) const {
  return std::find(capabilities.begin(), capabilities.end(), capability) != capabilities.end();
}

const PluginInfo* Catalog::FindPlugin(std::string_view method_id) const {
  for (const PluginInfo& plugin : plugins) {
    if (!plugin.rejected.empty()) continue;
    for (const MethodInfo& method : plugin.methods) {
      if (method.id == method_id) return &plugin;
    }
  }
  return nullptr;
}

const MethodInfo* Catalog::FindMethod(std::string_view id) const {
  const PluginInfo* plugin = FindPlugin(id);
  if (plugin == nullptr) return nullptr;
  for (const MethodInfo& method : plugin->methods) {
    if (method.id == id) return &method;
  }
  return nullptr;
}

std::vector<std::string> Catalog::MethodIds() const {
  std::vector<std::string> ids;
  for (const PluginInfo& plugin : plugins) {
    if (!plugin.rejected.empty()) continue;
    for (const MethodInfo& method : plugin.methods) {
      if ((method.flags & QM_METHOD_NO_STAGE) == 0) ids.push_back(method.id);
    }
  }
  std::sort(ids.begin(), ids.end());
  return ids;
}

std::vector<std::string> Catalog::Targets(std::string_view format_id) const {
  std::set<std::string> targets;
  for (const PluginInfo& plugin : plugins) {
    if (!plugin.rejected.empty()) continue;
    for (const MethodInfo& method : plugin.methods) {
      for (const MethodInfo::Format& format : method.formats) {
        if (format.id == format_id) targets.insert(format.targets.begin(), format.targets.end());
      }
    }
  }
  return {targets.begin(), targets.end()};
}

absl::Status CheckNamedPlugins(const Catalog& catalog, const std::vector<std::string>& files) {
  for (const std::string& file : files) {
    for (const PluginInfo& plugin : catalog.plugins) {
      std::error_code error;
      if (plugin.rejected.empty() || !fs::equivalent(file, plugin.path, error)) continue;
      return absl::FailedPreconditionError(
          ErrorText(absl::StrCat("cannot use plugin ", file), plugin.rejected));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<Catalog> DiscoverPlugins(const std::vector<std::string>& files) {
  Discovery discovery;
  for (const std::string& file : files) {
    if (!FileExists(file)) {
      return absl::NotFoundError(ErrorText(absl::StrCat("cannot open plugin ", file),
                                           "there is no such file", "check the path"));
    }
    discovery.Add(file);
  }
  for (const absl::string_view part : absl::StrSplit(Environment("QUANTMILL_PLUGIN_PATH"), ':')) {
    discovery.Add(std::string(part));
  }
  discovery.Add(InstalledFolder());
  return discovery.Finish();
}

}  // namespace quantmill
