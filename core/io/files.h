// Whole files in and out. Output appears under its final name complete or not at all.
#ifndef QUANTMILL_CORE_IO_FILES_H_
#define QUANTMILL_CORE_IO_FILES_H_

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace quantmill {

// NOT_FOUND if there is no such file; other failures carry the system's reason.
absl::StatusOr<std::string> ReadFile(const std::string& path);
bool FileExists(const std::string& path);

// Writes PATH.tmp, syncs it, renames it to PATH and syncs the directory. On an error nothing is
// left under either name (an older PATH stays as it was).
absl::Status WriteFile(const std::string& path, std::string_view content);
// Deletes a file; OK if there is none.
absl::Status RemoveFile(const std::string& path);
// Makes renames and deletions in `directory` durable.
absl::Status SyncDirectory(const std::string& directory);

// PATH.tmp until Publish(). Destruction without Publish() deletes the temporary file.
class OutputFile {
 public:
  // Reserves `size` bytes on the disk where the file system can, so that a full disk is reported
  // before work is done. RESOURCE_EXHAUSTED on a full disk, PERMISSION_DENIED on a read-only place.
  static absl::StatusOr<std::unique_ptr<OutputFile>> Create(const std::string& path,
                                                            uint64_t size = 0);
  ~OutputFile();
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;

  const std::string& path() const { return path_; }
  absl::Status WriteAt(uint64_t offset, std::string_view bytes);
  // Flushes to the disk and closes; still under the temporary name.
  absl::Status Sync();
  // Renames to the final name, after Sync(). The caller then calls SyncDirectory().
  absl::Status Publish();

 private:
  explicit OutputFile(std::string path) : path_(std::move(path)), temporary_(path_ + ".tmp") {}

  std::string path_;
  std::string temporary_;
  int descriptor_ = -1;
  bool published_ = false;
};

// "cannot WHAT PATH; REASON; REMEDY" from an errno value, with a code that fits.
absl::Status SystemError(absl::string_view what, absl::string_view path, int error_number);

}  // namespace quantmill

#endif  // QUANTMILL_CORE_IO_FILES_H_
