// What a shared object says of itself, read from the file without loading it.
#ifndef QUANTMILL_SDK_CHECK_ELF_FILE_H_
#define QUANTMILL_SDK_CHECK_ELF_FILE_H_

#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace quantmill::check {

struct ElfFacts {
  std::vector<std::string> exported;  // names of defined, visible dynamic symbols, sorted
  std::vector<std::string> needed;    // libraries it is linked against
  bool no_delete = false;             // linked with -z nodelete
};

// INVALID_ARGUMENT when the file is no 64-bit little-endian ELF shared object or is cut short.
absl::StatusOr<ElfFacts> ReadElf(const std::string& path);

}  // namespace quantmill::check

#endif  // QUANTMILL_SDK_CHECK_ELF_FILE_H_
