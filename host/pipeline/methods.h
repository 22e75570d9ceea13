// What the word after `use:` means: which method, which ABI tables.
#ifndef QUANTMILL_HOST_PIPELINE_METHODS_H_
#define QUANTMILL_HOST_PIPELINE_METHODS_H_

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "host/plugins/catalog.h"

namespace quantmill {

struct MethodUse {
  const MethodInfo* method = nullptr;  // points into the catalog
  std::vector<std::string> tables;     // ABI tables to run, in order
  bool Runs(std::string_view table) const;
  // Leaves its slots packed.
  bool Packs() const;
  bool Trains() const;
};

// A method runs all tables it has, transforms first. Parts of a method that can be used alone are
// methods of their own: "awq" is all of awq, "awq.scale" its function-preserving scaling. NOT_FOUND
// or INVALID_ARGUMENT with the nearest name; says so when a plugin that was rejected may be what is
// missing.
absl::StatusOr<MethodUse> FindUse(const Catalog& catalog, const std::string& use);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_PIPELINE_METHODS_H_
