#include "core/io/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "core/io/files.h"

namespace quantmill {

absl::StatusOr<std::shared_ptr<MappedFile>> MappedFile::Open(const std::string& path) {
  const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) return SystemError("read", path, errno);
  struct stat info = {};
  int error = ::fstat(file, &info) != 0 ? errno : 0;
  if (error == 0 && S_ISDIR(info.st_mode)) error = EISDIR;
  void* base = nullptr;
  const size_t size = static_cast<size_t>(info.st_size);
  if (error == 0 && size > 0) {
    base = ::mmap(nullptr, size, PROT_READ, MAP_SHARED, file, 0);
    if (base == MAP_FAILED) error = errno;
  }
  ::close(file);
  if (error != 0) return SystemError("read", path, error);
  return std::make_shared<MappedFile>(static_cast<char*>(base), size);
}

MappedFile::~MappedFile() {
  if (base_ != nullptr) ::munmap(base_, size_);
}

void MappedFile::Drop(uint64_t begin, uint64_t end) const {
  // Outwards to whole pages: a neighbour's page is merely read again.
  const uint64_t page = static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
  begin -= begin % page;
  end = std::min<uint64_t>(size_, (end + page - 1) / page * page);
  if (begin < end) ::madvise(base_ + begin, end - begin, MADV_DONTNEED);
}

}  // namespace quantmill
