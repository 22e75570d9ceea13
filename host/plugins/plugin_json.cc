// Plugin descriptions as JSON: manifests, the answer of `quantmill inspect`, and the cache.
#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "host/plugins/catalog.h"
#include "host/plugins/option_value.h"

namespace quantmill {
namespace {

using nlohmann::json;

constexpr int kManifestVersion = 1;
constexpr qm_option_type kOptionTypes[] = {QM_OPT_I64, QM_OPT_F64, QM_OPT_STR, QM_OPT_ENUM,
                                           QM_OPT_BOOL};

json ToJson(const OptionInfo& option) {
  json out = {{"name", option.name}, {"type", OptionTypeName(option.type)}, {"doc", option.doc}};
  if (!option.required) out["default"] = option.default_value;
  if (!option.choices.empty()) out["choices"] = option.choices;
  return out;
}

json ToJson(const MethodInfo& method) {
  json out = {
      {"id", method.id},         {"version", method.version},           {"summary", method.summary},
      {"flags", method.flags},   {"capabilities", method.capabilities}, {"options", json::array()},
      {"formats", json::array()}};
  for (const OptionInfo& option : method.options) out["options"].push_back(ToJson(option));
  for (const MethodInfo::Format& format : method.formats) {
    out["formats"].push_back({{"id", format.id}, {"targets", format.targets}});
  }
  return out;
}

OptionInfo ReadOption(const json& in) {
  OptionInfo option;
  option.name = in.at("name").get<std::string>();
  option.doc = in.at("doc").get<std::string>();
  option.choices = in.value("choices", std::string());
  option.required = !in.contains("default");
  option.default_value = in.value("default", std::string());
  const std::string type = in.at("type").get<std::string>();
  option.type = 0;
  for (const qm_option_type known : kOptionTypes) {
    if (OptionTypeName(known) == type) option.type = known;
  }
  return option;
}

MethodInfo ReadMethod(const json& in) {
  MethodInfo method;
  method.id = in.at("id").get<std::string>();
  method.version = in.at("version").get<std::string>();
  method.summary = in.at("summary").get<std::string>();
  method.flags = in.at("flags").get<uint64_t>();
  method.capabilities = in.at("capabilities").get<std::vector<std::string>>();
  for (const json& option : in.at("options")) method.options.push_back(ReadOption(option));
  for (const json& format : in.at("formats")) {
    method.formats.push_back(
        {format.at("id").get<std::string>(), format.at("targets").get<std::vector<std::string>>()});
  }
  return method;
}

absl::Status CheckRead(const PluginInfo& info) {
  if (info.methods.empty()) return absl::InvalidArgumentError("it lists no methods");
  for (const MethodInfo& method : info.methods) {
    if (method.id.empty()) return absl::InvalidArgumentError("a method has no id");
    for (const OptionInfo& option : method.options) {
      QM_RETURN_IF_ERROR(WithContext(CheckOptionInfo(option), method.id));
    }
  }
  return absl::OkStatus();
}

}  // namespace

json ToJson(const PluginInfo& info) {
  json out = {{"manifest_version", kManifestVersion},
              {"sha256", info.sha256},
              {"vendor", info.vendor},
              {"license", info.license},
              {"build_info", info.build_info},
              {"abi_major", info.abi_major},
              {"abi_minor", info.abi_minor},
              {"min_host_minor", info.min_host_minor},
              {"methods", json::array()}};
  for (const MethodInfo& method : info.methods) out["methods"].push_back(ToJson(method));
  return out;
}

absl::StatusOr<PluginInfo> PluginInfoFromJson(const json& in) {
  if (!in.is_object()) return absl::InvalidArgumentError("it is not a JSON object");
  PluginInfo info;
  try {
    if (in.at("manifest_version").get<int>() != kManifestVersion) {
      return absl::InvalidArgumentError(absl::StrCat("manifest_version is not ", kManifestVersion));
    }
    info.sha256 = in.at("sha256").get<std::string>();
    info.vendor = in.at("vendor").get<std::string>();
    info.license = in.at("license").get<std::string>();
    info.build_info = in.at("build_info").get<std::string>();
    info.abi_major = in.at("abi_major").get<uint32_t>();
    info.abi_minor = in.at("abi_minor").get<uint32_t>();
    info.min_host_minor = in.at("min_host_minor").get<uint32_t>();
    for (const json& method : in.at("methods")) info.methods.push_back(ReadMethod(method));
  } catch (const json::exception& error) {
    return absl::InvalidArgumentError(error.what());
  }
  QM_RETURN_IF_ERROR(CheckRead(info));
  return info;
}

}  // namespace quantmill
