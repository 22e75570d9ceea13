#include "host/plugins/inspect_cache.h"

#include <stdlib.h>
#include <sys/auxv.h>
#include <sys/stat.h>

#include <filesystem>

#include "absl/strings/str_cat.h"
#include "core/io/files.h"
#include "core/io/json.h"
#include "core/io/sha256.h"

namespace quantmill {
namespace {

std::string CacheFolder() {
  if (getauxval(AT_SECURE) != 0) return "";
  const char* cache = getenv("XDG_CACHE_HOME");
  if (cache != nullptr && cache[0] == '/') return absl::StrCat(cache, "/quantmill/plugins");
  const char* home = getenv("HOME");
  if (home == nullptr || home[0] != '/') return "";
  return absl::StrCat(home, "/.cache/quantmill/plugins");
}

}  // namespace

InspectCache::InspectCache(const std::string& plugin, const std::string& sha256) : plugin_(plugin) {
  struct stat info;
  const std::string folder = CacheFolder();
  if (folder.empty() || stat(plugin.c_str(), &info) != 0) return;
  file_ = absl::StrCat(folder, "/", Sha256Hex(plugin).substr(0, 32), ".json");
  key_ = absl::StrCat(plugin, "|", info.st_size, "|", info.st_mtim.tv_sec, ".",
                      info.st_mtim.tv_nsec, "|", sha256, "|", QM_ABI_MAJOR, ".", QM_ABI_MINOR);
}

std::optional<PluginInfo> InspectCache::Read() const {
  if (file_.empty()) return std::nullopt;
  const auto json = ReadJson(file_);
  if (!json.ok() || !json->is_object()) return std::nullopt;
  const auto key = json->find("key"), rejected = json->find("rejected"), info = json->find("info");
  if (key == json->end() || *key != key_ || rejected == json->end() || !rejected->is_string() ||
      info == json->end()) {
    return std::nullopt;
  }
  PluginInfo result;
  result.rejected = rejected->get<std::string>();
  if (result.rejected.empty()) {
    auto parsed = PluginInfoFromJson(*info);
    if (!parsed.ok()) return std::nullopt;
    result = *std::move(parsed);
  }
  result.path = plugin_;
  return result;
}

void InspectCache::Write(const PluginInfo& info) const {
  if (file_.empty()) return;
  std::error_code error;
  std::filesystem::create_directories(std::filesystem::path(file_).parent_path(), error);
  const nlohmann::json json = {{"key", key_}, {"rejected", info.rejected}, {"info", ToJson(info)}};
  WriteFile(file_, json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace))
      .IgnoreError();
}

}  // namespace quantmill
