#include "host/plugins/descriptor.h"

#include <string.h>

#include <set>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/text/unicode.h"
#include "host/plugins/option_value.h"
#include "host/plugins/rule_note.h"

namespace quantmill {
namespace {

// No honest plugin comes near these; they keep a wild count from walking through memory.
constexpr uint32_t kMostMethods = 256;
constexpr uint64_t kMostOptions = 256;
constexpr uint64_t kMostTargets = 64;
constexpr size_t kLongestText = 4096;

constexpr char kDescriptorRule[] = "QM-P-002";  // of RULES.md

constexpr const char* kCapabilityIds[] = {QM_EXT_QUANTIZE_LINEAR, QM_EXT_BLOCK_TRANSFORM,
                                          QM_EXT_BLOCK_TUNE,      QM_EXT_REPARAMETRIZE,
                                          QM_EXT_LINEAR_KERNEL,   QM_EXT_FORMAT};

absl::Status Bad(const std::string& text) { return absl::FailedPreconditionError(text); }

absl::Status CheckText(const char* text, const std::string& what, bool may_be_null) {
  if (text == nullptr) {
    return may_be_null ? absl::OkStatus() : Bad(absl::StrCat(what, " is NULL"));
  }
  const size_t size = strnlen(text, kLongestText + 1);
  if (size > kLongestText) {
    return Bad(absl::StrCat(what, " is longer than ", kLongestText, " characters"));
  }
  if (!may_be_null && size == 0) return Bad(absl::StrCat(what, " is empty"));
  if (!IsUtf8({text, size})) return Bad(absl::StrCat(what, " is not UTF-8"));
  return absl::OkStatus();
}

absl::Status CheckId(const std::string& id) {
  for (const char c : id) {
    const bool good =
        (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '-' || c == '_' || c == '.';
    if (!good) {
      return Bad(absl::StrCat("method id '", id,
                              "' has other characters than a-z, 0-9, '-', '_' and '.'"));
    }
  }
  return absl::OkStatus();
}

std::string TextOf(const char* text) { return text == nullptr ? "" : text; }

OptionInfo InfoOf(const qm_option& option) {
  return {TextOf(option.name),
          option.type,
          option.default_value == nullptr,
          TextOf(option.default_value),
          TextOf(option.choices),
          TextOf(option.doc)};
}

absl::Status CheckOptions(const qm_method& method) {
  if (method.option_count > kMostOptions) {
    return Bad(absl::StrCat("option_count is ", method.option_count));
  }
  if (method.option_count > 0 && method.options == nullptr) return Bad("options is NULL");
  std::set<std::string> names;
  for (uint64_t i = 0; i < method.option_count; ++i) {
    const qm_option& option = method.options[i];
    const std::string which = absl::StrCat("options[", i, "]");
    QM_RETURN_IF_ERROR(CheckText(option.name, which + ".name", false));
    QM_RETURN_IF_ERROR(CheckText(option.default_value, which + ".default_value", true));
    QM_RETURN_IF_ERROR(CheckText(option.choices, which + ".choices", true));
    QM_RETURN_IF_ERROR(CheckText(option.doc, which + ".doc", true));
    if (!names.insert(option.name).second) {
      return Bad(absl::StrCat("option ", option.name, " is listed twice"));
    }
    const absl::Status status = CheckOptionInfo(InfoOf(option));
    if (!status.ok()) return BreaksRule(Bad(std::string(status.message())), "QM-P-016");
  }
  return absl::OkStatus();
}

absl::Status CheckFormat(const qm_format& format) {
  QM_RETURN_IF_ERROR(CheckText(format.format_id, "format_id", false));
  if (format.target_count > kMostTargets) {
    return Bad(absl::StrCat("target_count is ", format.target_count));
  }
  if (format.target_count > 0 && format.targets == nullptr) return Bad("targets is NULL");
  for (uint64_t i = 0; i < format.target_count; ++i) {
    QM_RETURN_IF_ERROR(CheckText(format.targets[i], absl::StrCat("targets[", i, "]"), false));
  }
  return absl::OkStatus();
}

// True when the table is long enough and has every function that is not optional.
bool IsComplete(const std::string& id, const void* table) {
  if (id == QM_EXT_QUANTIZE_LINEAR) {
    const auto* t = static_cast<const qm_quantize_linear*>(table);
    return QM_HAS(t, plan) && QM_HAS(t, run);
  }
  if (id == QM_EXT_BLOCK_TRANSFORM) {
    const auto* t = static_cast<const qm_block_transform*>(table);
    return QM_HAS(t, plan) && QM_HAS(t, run);
  }
  if (id == QM_EXT_BLOCK_TUNE) {
    const auto* t = static_cast<const qm_block_tune*>(table);
    return QM_HAS(t, plan) && QM_HAS(t, run);
  }
  if (id == QM_EXT_REPARAMETRIZE) {
    const auto* t = static_cast<const qm_reparametrize*>(table);
    return QM_HAS(t, plan) && QM_HAS(t, init) && QM_HAS(t, forward) && QM_HAS(t, vjp);
  }
  if (id == QM_EXT_LINEAR_KERNEL) {
    const auto* t = static_cast<const qm_linear_kernel*>(table);
    return QM_HAS(t, accepts) && QM_HAS(t, dequantize);
  }
  const auto* t = static_cast<const qm_format*>(table);
  return QM_HAS(t, format_id) && QM_HAS(t, check) && QM_HAS(t, can_store) &&
         QM_HAS(t, to_checkpoint) && QM_HAS(t, from_checkpoint);
}

absl::Status CheckTables(const qm_method& method) {
  for (const char* id : kCapabilityIds) {
    const void* table = method.ext(&method, id);
    if (table == nullptr) continue;
    if (!IsComplete(id, table)) {
      return Bad(absl::StrCat("the table of ", id,
                              " is too short or lacks a function that is not optional"));
    }
    if (std::string(id) == QM_EXT_FORMAT) {
      QM_RETURN_IF_ERROR(
          WithContext(CheckFormat(*static_cast<const qm_format*>(table)), QM_EXT_FORMAT));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckMethod(const qm_method* method) {
  if (method == nullptr) return Bad("is NULL");
  if (method->struct_size < sizeof(qm_method)) {
    return Bad(absl::StrCat("struct_size is ", method->struct_size, ", less than the ",
                            sizeof(qm_method), " of minor 0"));
  }
  QM_RETURN_IF_ERROR(CheckText(method->id, "id", false));
  QM_RETURN_IF_ERROR(CheckId(method->id));
  QM_RETURN_IF_ERROR(CheckText(method->version, "version", false));
  QM_RETURN_IF_ERROR(CheckText(method->summary, "summary", true));
  QM_RETURN_IF_ERROR(CheckOptions(*method));
  if (method->ext == nullptr) return Bad("ext is NULL");
  return CheckTables(*method);
}

MethodInfo InfoOf(const qm_method& method) {
  MethodInfo info;
  info.id = method.id;
  info.version = method.version;
  info.summary = TextOf(method.summary);
  info.flags = method.flags;
  for (uint64_t i = 0; i < method.option_count; ++i) {
    info.options.push_back(InfoOf(method.options[i]));
  }
  for (const char* id : kCapabilityIds) {
    const void* table = method.ext(&method, id);
    if (table == nullptr) continue;
    info.capabilities.push_back(id);
    if (std::string(id) != QM_EXT_FORMAT) continue;
    const auto& format = *static_cast<const qm_format*>(table);
    info.formats.push_back(
        {format.format_id,
         std::vector<std::string>(format.targets, format.targets + format.target_count)});
  }
  return info;
}

}  // namespace

absl::Status CheckVersion(uint32_t abi_major, uint32_t abi_minor, uint32_t min_host_minor) {
  if (abi_major != QM_ABI_MAJOR) {
    return Bad(absl::StrCat("it was built for ABI major ", abi_major, "; this host has ",
                            QM_ABI_MAJOR, "; rebuild it against this host's headers"));
  }
  if (min_host_minor > QM_ABI_MINOR) {
    return Bad(absl::StrCat("it needs ABI ", abi_major, ".", min_host_minor, " (built for ",
                            abi_major, ".", abi_minor, "); this host has ", QM_ABI_MAJOR, ".",
                            QM_ABI_MINOR, "; use a newer quantmill"));
  }
  return absl::OkStatus();
}

namespace {

// What follows the version, which another host may have.
absl::Status CheckContent(const qm_plugin* plugin) {
  if (plugin->struct_size < sizeof(qm_plugin)) {
    return Bad(absl::StrCat("the descriptor's struct_size is ", plugin->struct_size,
                            ", less than the ", sizeof(qm_plugin), " of minor 0"));
  }
  QM_RETURN_IF_ERROR(CheckText(plugin->vendor, "the descriptor's vendor", false));
  QM_RETURN_IF_ERROR(CheckText(plugin->license, "the descriptor's license", false));
  QM_RETURN_IF_ERROR(CheckText(plugin->build_info, "the descriptor's build_info", true));
  if (plugin->method_count == 0 || plugin->method_count > kMostMethods) {
    return Bad(absl::StrCat("method_count is ", plugin->method_count, ", not 1 .. ", kMostMethods));
  }
  if (plugin->methods == nullptr) return Bad("the descriptor's methods is NULL");
  std::set<std::string> ids;
  for (uint32_t i = 0; i < plugin->method_count; ++i) {
    const qm_method* method = plugin->methods[i];
    QM_RETURN_IF_ERROR(WithContext(CheckMethod(method), absl::StrCat("methods[", i, "]")));
    if (!ids.insert(method->id).second) {
      return Bad(absl::StrCat("two methods have the id '", method->id, "'"));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status CheckDescriptor(const qm_plugin* plugin) {
  if (plugin == nullptr) {
    return BreaksRule(Bad(absl::StrCat(QM_ENTRY_SYMBOL, " returned NULL")), kDescriptorRule);
  }
  if (plugin->struct_size < offsetof(qm_plugin, method_count)) {
    return BreaksRule(Bad(absl::StrCat("the descriptor's struct_size is ", plugin->struct_size,
                                       ", too short to hold a version")),
                      kDescriptorRule);
  }
  QM_RETURN_IF_ERROR(CheckVersion(plugin->abi_major, plugin->abi_minor, plugin->min_host_minor));
  return BreaksRule(CheckContent(plugin), kDescriptorRule);
}

PluginInfo DescriptorInfo(const qm_plugin& plugin) {
  PluginInfo info;
  info.vendor = plugin.vendor;
  info.license = plugin.license;
  info.build_info = TextOf(plugin.build_info);
  info.abi_major = plugin.abi_major;
  info.abi_minor = plugin.abi_minor;
  info.min_host_minor = plugin.min_host_minor;
  for (uint32_t i = 0; i < plugin.method_count; ++i) {
    info.methods.push_back(InfoOf(*plugin.methods[i]));
  }
  return info;
}

}  // namespace quantmill
