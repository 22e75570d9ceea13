// A whole file mapped into memory, read-only.
#ifndef QUANTMILL_CORE_IO_MAPPED_FILE_H_
#define QUANTMILL_CORE_IO_MAPPED_FILE_H_

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace quantmill {

// Owns the mapped pages.
class MappedFile {
 public:
  // Errors as SystemError's, with the path.
  static absl::StatusOr<std::shared_ptr<MappedFile>> Open(const std::string& path);

  MappedFile(char* base, size_t size) : base_(base), size_(size) {}
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::string_view bytes() const { return {base_, size_}; }
  char* at(uint64_t offset) const { return base_ + offset; }
  // Tells the kernel that the pages of these bytes are not needed now; they are read again from the
  // file when touched.
  void Drop(uint64_t begin, uint64_t end) const;

 private:
  char* base_;
  size_t size_;
};

}  // namespace quantmill

#endif  // QUANTMILL_CORE_IO_MAPPED_FILE_H_
