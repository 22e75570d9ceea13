#include "core/io/files.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <utility>

#include "core/base/status.h"

namespace quantmill {
namespace {

class Descriptor {
 public:
  explicit Descriptor(int value) : value_(value) {}
  ~Descriptor() {
    if (value_ >= 0) ::close(value_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return value_; }

 private:
  int value_;
};

absl::string_view Remedy(int error_number) {
  switch (error_number) {
    case ENOSPC:
    case EDQUOT:
    case EFBIG:
      return "free some space or choose another directory";
    case EACCES:
    case EPERM:
    case EROFS:
      return "change the permissions or choose another path";
    case ENOENT:
    case ENOTDIR:
      return "check the path";
    default:
      return "";
  }
}

absl::StatusCode Code(int error_number) {
  switch (error_number) {
    case ENOSPC:
    case EDQUOT:
    case EFBIG:
      return absl::StatusCode::kResourceExhausted;
    case EROFS:
      return absl::StatusCode::kPermissionDenied;
    default:
      return absl::ErrnoToStatusCode(error_number);
  }
}

}  // namespace

absl::Status SystemError(absl::string_view what, absl::string_view path, int error_number) {
  return absl::Status(Code(error_number),
                      ErrorText(absl::StrCat("cannot ", what, " ", path),
                                std::strerror(error_number), Remedy(error_number)));
}

absl::StatusOr<std::string> ReadFile(const std::string& path) {
  const Descriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (file.get() < 0) return SystemError("read", path, errno);
  struct stat info = {};
  if (::fstat(file.get(), &info) != 0) return SystemError("read", path, errno);
  if (S_ISDIR(info.st_mode)) return SystemError("read", path, EISDIR);
  std::string content;
  content.reserve(static_cast<size_t>(info.st_size) + 1);
  std::string chunk(size_t{1} << 16, '\0');
  while (true) {  // until the end, not st_size: pipes and /proc files report 0
    const ssize_t got = ::read(file.get(), chunk.data(), chunk.size());
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return SystemError("read", path, errno);
    if (got == 0) return content;
    content.append(chunk.data(), static_cast<size_t>(got));
  }
}

bool FileExists(const std::string& path) {
  struct stat info = {};
  return ::stat(path.c_str(), &info) == 0;
}

absl::Status WriteFile(const std::string& path, std::string_view content) {
  QM_ASSIGN_OR_RETURN(const auto file, OutputFile::Create(path, content.size()));
  QM_RETURN_IF_ERROR(file->WriteAt(0, content));
  QM_RETURN_IF_ERROR(file->Sync());
  QM_RETURN_IF_ERROR(file->Publish());
  return SyncDirectory(std::filesystem::path(path).parent_path().string());
}

absl::Status RemoveFile(const std::string& path) {
  if (::unlink(path.c_str()) == 0 || errno == ENOENT) return absl::OkStatus();
  return SystemError("delete", path, errno);
}

absl::Status SyncDirectory(const std::string& directory) {
  const std::string name = directory.empty() ? "." : directory;
  const Descriptor handle(::open(name.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (handle.get() < 0) return SystemError("open directory", name, errno);
  // EINVAL: a file system whose directories cannot be synced, and need not be.
  if (::fsync(handle.get()) != 0 && errno != EINVAL) {
    return SystemError("sync directory", name, errno);
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<OutputFile>> OutputFile::Create(const std::string& path,
                                                               uint64_t size) {
  std::unique_ptr<OutputFile> file(new OutputFile(path));
  file->descriptor_ =
      ::open(file->temporary_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (file->descriptor_ < 0) {
    file->published_ = true;  // nothing of ours to delete
    return SystemError("write", path, errno);
  }
  if (size > 0 && ::fallocate(file->descriptor_, 0, 0, static_cast<off_t>(size)) != 0) {
    // Other failures mean that the file system cannot reserve; writing will tell.
    if (errno == ENOSPC || errno == EDQUOT || errno == EFBIG) {
      return SystemError(absl::StrCat("reserve ", size, " bytes for"), path, errno);
    }
  }
  return file;
}

OutputFile::~OutputFile() {
  if (descriptor_ >= 0) ::close(descriptor_);
  if (!published_) ::unlink(temporary_.c_str());
}

absl::Status OutputFile::WriteAt(uint64_t offset, std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t put =
        ::pwrite(descriptor_, bytes.data(), bytes.size(), static_cast<off_t>(offset));
    if (put < 0 && errno == EINTR) continue;
    if (put < 0) return SystemError("write", path_, errno);
    offset += static_cast<uint64_t>(put);
    bytes.remove_prefix(static_cast<size_t>(put));
  }
  return absl::OkStatus();
}

absl::Status OutputFile::Sync() {
  if (::fsync(descriptor_) != 0) return SystemError("write", path_, errno);
  const int result = ::close(descriptor_);
  descriptor_ = -1;
  if (result != 0) return SystemError("write", path_, errno);
  return absl::OkStatus();
}

absl::Status OutputFile::Publish() {
  if (::rename(temporary_.c_str(), path_.c_str()) != 0) return SystemError("write", path_, errno);
  published_ = true;
  return absl::OkStatus();
}

}  // namespace quantmill
