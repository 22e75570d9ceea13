// The directory side of an export: a temporary directory that becomes the output as a whole, and
// the files that are copied or written beside the weights.
#ifndef QUANTMILL_CORE_CHECKPOINT_EXPORT_FILES_H_
#define QUANTMILL_CORE_CHECKPOINT_EXPORT_FILES_H_

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"

namespace quantmill {

// Created empty; deleted with all its content unless Publish() succeeded.
class TemporaryDirectory {
 public:
  // Deletes an old `path` first; creates missing parents.
  static absl::StatusOr<TemporaryDirectory> Create(const std::string& path);
  ~TemporaryDirectory();
  TemporaryDirectory(TemporaryDirectory&& other) noexcept : path_(std::move(other.path_)) {
    other.path_.clear();
  }
  TemporaryDirectory& operator=(TemporaryDirectory&&) = delete;

  const std::string& path() const { return path_; }
  // Renames to `final_path`, which must not exist, and makes that durable.
  absl::Status Publish(const std::string& final_path);

 private:
  explicit TemporaryDirectory(std::string path) : path_(std::move(path)) {}
  std::string path_;
};

// Tokenizer of a model: of a directory the files, of a GGUF file what they would hold.
struct TokenizerFiles {
  nlohmann::json tokenizer;       // null if there is none
  nlohmann::ordered_json config;  // tokenizer_config.json with the chat template; may be null
};
absl::StatusOr<TokenizerFiles> ReadTokenizerFiles(const std::string& model);

// Copies tokenizer, generation and chat template files, those that are there, byte for byte. `from`
// may be a GGUF file; then the tokenizer's are written.
absl::Status CopyModelFiles(const std::string& from, const std::string& to);
// Indented by two, with a newline at the end, as the readers' own writers do.
absl::Status WriteJsonFile(const std::string& path, const nlohmann::ordered_json& json);
// Sum of the sizes of the regular files in a directory.
absl::StatusOr<int64_t> DirectoryBytes(const std::string& directory);

// {"NAME": "SHA-256", ...} of the files in a directory, in the order of their names.
absl::StatusOr<nlohmann::ordered_json> FileDigests(const std::string& directory);

}  // namespace quantmill

#endif  // QUANTMILL_CORE_CHECKPOINT_EXPORT_FILES_H_
