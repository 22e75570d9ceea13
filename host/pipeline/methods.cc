#include "host/pipeline/methods.h"

#include <algorithm>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "core/base/nearest.h"
#include "core/base/status.h"
#include "quantmill/all.h"

namespace quantmill {
namespace {

// "awq.clamp" where awq is there: what of it can be used.
absl::Status UnknownPart(const Catalog& catalog, const std::string& method,
                         const std::string& part) {
  std::vector<std::string> uses;
  for (const std::string& id : catalog.MethodIds()) {
    if (id == method || absl::StartsWith(id, method + ".")) uses.push_back(id);
  }
  return absl::NotFoundError(
      ErrorText(absl::StrCat("method '", method, "' has no part '", part, "'"), "",
                absl::StrCat("use ", absl::StrJoin(uses, " or "))));
}

absl::Status UnknownMethod(const Catalog& catalog, const std::string& use) {
  const size_t dot = use.rfind('.');
  if (dot != std::string::npos && catalog.FindMethod(use.substr(0, dot)) != nullptr) {
    return UnknownPart(catalog, use.substr(0, dot), use.substr(dot + 1));
  }
  std::string remedy;
  for (const PluginInfo& plugin : catalog.plugins) {
    if (plugin.rejected.empty()) continue;
    remedy = absl::StrCat("plugin ", plugin.path, " was rejected: ", plugin.rejected);
    break;
  }
  const std::vector<std::string> ids = catalog.MethodIds();
  const std::string why =
      ids.empty() ? absl::StrCat("no plugins were found in ", absl::StrJoin(catalog.searched, ", "))
                  : NearestHint(use, ids);
  return absl::NotFoundError(ErrorText(absl::StrCat("unknown method '", use, "'"), why, remedy));
}

absl::Status CheckStage(const MethodInfo& method) {
  const bool stage = (method.flags & QM_METHOD_NO_STAGE) == 0 &&
                     (method.Has(QM_EXT_QUANTIZE_LINEAR) || method.Has(QM_EXT_BLOCK_TRANSFORM) ||
                      method.Has(QM_EXT_BLOCK_TUNE) || method.Has(QM_EXT_REPARAMETRIZE));
  if (stage) return absl::OkStatus();
  return absl::InvalidArgumentError(ErrorText(absl::StrCat("'", method.id, "' cannot be a stage"),
                                              "it offers formats or kernels only",
                                              "see quantmill plugins"));
}

}  // namespace

bool MethodUse::Runs(std::string_view table) const {
  return std::find(tables.begin(), tables.end(), table) != tables.end();
}

bool MethodUse::Packs() const {
  return Runs(QM_EXT_QUANTIZE_LINEAR) ||
         (Trains() && (method->flags & QM_METHOD_TRAINS_TO_PACKED) != 0);
}

bool MethodUse::Trains() const { return Runs(QM_EXT_REPARAMETRIZE); }

absl::StatusOr<MethodUse> FindUse(const Catalog& catalog, const std::string& use) {
  const MethodInfo* method = catalog.FindMethod(use);
  if (method == nullptr) return UnknownMethod(catalog, use);
  QM_RETURN_IF_ERROR(CheckStage(*method));
  MethodUse result{method, {}};
  for (const char* table :
       {QM_EXT_BLOCK_TRANSFORM, QM_EXT_QUANTIZE_LINEAR, QM_EXT_BLOCK_TUNE, QM_EXT_REPARAMETRIZE}) {
    if (method->Has(table)) result.tables.push_back(table);
  }
  return result;
}

}  // namespace quantmill
