#include "core/checkpoint/export_files.h"

#include <filesystem>
#include <set>
#include <system_error>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/io/files.h"
#include "core/io/gguf_file.h"
#include "core/io/json.h"
#include "core/io/sha256.h"
#include "core/text/gguf_tokenizer.h"

namespace quantmill {
namespace {

namespace fs = std::filesystem;

constexpr const char* kCopied[] = {"tokenizer.json",
                                   "tokenizer_config.json",
                                   "special_tokens_map.json",
                                   "added_tokens.json",
                                   "tokenizer.model",
                                   "vocab.json",
                                   "merges.txt",
                                   "chat_template.jinja",
                                   "chat_template.json",
                                   "generation_config.json"};

std::string Parent(const std::string& path) {
  const std::string parent = fs::path(path).parent_path().string();
  return parent.empty() ? "." : parent;
}

}  // namespace

absl::StatusOr<TemporaryDirectory> TemporaryDirectory::Create(const std::string& path) {
  std::error_code error;
  fs::remove_all(path, error);
  if (error) return SystemError("delete", path, error.value());
  fs::create_directories(path, error);
  if (error) return SystemError("create directory", path, error.value());
  return TemporaryDirectory(path);
}

TemporaryDirectory::~TemporaryDirectory() {
  if (path_.empty()) return;
  std::error_code error;  // the error that led here is the one to report
  fs::remove_all(path_, error);
}

absl::Status TemporaryDirectory::Publish(const std::string& final_path) {
  QM_RETURN_IF_ERROR(SyncDirectory(path_));
  std::error_code error;
  fs::create_directories(Parent(final_path), error);
  if (error) return SystemError("create directory", Parent(final_path), error.value());
  // rename() would replace an empty directory silently.
  if (fs::exists(final_path, error)) {
    return absl::AlreadyExistsError(ErrorText(absl::StrCat(final_path, " exists"),
                                              "an export does not overwrite",
                                              "delete it or name another directory"));
  }
  fs::rename(path_, final_path, error);
  if (error) return SystemError("rename to", final_path, error.value());
  path_.clear();
  return SyncDirectory(Parent(final_path));
}

absl::StatusOr<TokenizerFiles> ReadTokenizerFiles(const std::string& model) {
  TokenizerFiles files;
  QM_ASSIGN_OR_RETURN(const std::string gguf, FindGguf(model));
  if (!gguf.empty()) {
    QM_ASSIGN_OR_RETURN(const auto file, GgufFile::Open(gguf));
    absl::StatusOr<nlohmann::json> tokenizer = TokenizerFromGguf(file->header());
    if (!tokenizer.ok() && file->header().Find("tokenizer.ggml.tokens") == nullptr) return files;
    QM_RETURN_IF_ERROR(tokenizer.status());
    files.tokenizer = *std::move(tokenizer);
    files.config = TokenizerConfigFromGguf(file->header());
    return files;
  }
  const std::string tokenizer = model + "/tokenizer.json",
                    config = model + "/tokenizer_config.json";
  const std::string chat = model + "/chat_template.jinja";
  if (FileExists(tokenizer)) {
    QM_ASSIGN_OR_RETURN(files.tokenizer, ReadJson(tokenizer));
  }
  if (FileExists(config)) {
    QM_ASSIGN_OR_RETURN(files.config, ReadOrderedJson(config));
  }
  if (FileExists(chat) && (files.config.is_null() || files.config.is_object())) {
    QM_ASSIGN_OR_RETURN(files.config["chat_template"], ReadFile(chat));
  }
  return files;
}

absl::Status CopyModelFiles(const std::string& from, const std::string& to) {
  QM_ASSIGN_OR_RETURN(const std::string gguf, FindGguf(from));
  if (!gguf.empty()) {
    QM_ASSIGN_OR_RETURN(const TokenizerFiles files, ReadTokenizerFiles(from));
    if (files.tokenizer.is_null()) return absl::OkStatus();
    QM_RETURN_IF_ERROR(WriteJsonFile(to + "/tokenizer.json", files.tokenizer));
    return WriteJsonFile(to + "/tokenizer_config.json", files.config);
  }
  for (const char* name : kCopied) {
    const std::string source = absl::StrCat(from, "/", name);
    if (!FileExists(source)) continue;
    QM_ASSIGN_OR_RETURN(const std::string content, ReadFile(source));
    QM_RETURN_IF_ERROR(WriteFile(absl::StrCat(to, "/", name), content));
  }
  return absl::OkStatus();
}

absl::Status WriteJsonFile(const std::string& path, const nlohmann::ordered_json& json) {
  // Text that is not UTF-8 cannot come from a parsed file, but must not throw either.
  const auto replace = nlohmann::ordered_json::error_handler_t::replace;
  return WriteFile(path, json.dump(2, ' ', false, replace) + "\n");
}

absl::StatusOr<int64_t> DirectoryBytes(const std::string& directory) {
  std::error_code error;
  int64_t sum = 0;
  for (fs::directory_iterator it(directory, error), end; !error && it != end; it.increment(error)) {
    if (it->is_regular_file(error)) sum += static_cast<int64_t>(it->file_size(error));
  }
  if (error) return SystemError("read directory", directory, error.value());
  return sum;
}

absl::StatusOr<nlohmann::ordered_json> FileDigests(const std::string& directory) {
  std::set<std::string> names;
  std::error_code error;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(directory, error)) {
    if (!entry.is_regular_file(error)) continue;
    names.insert(entry.path().lexically_relative(directory).string());
  }
  if (error) return SystemError("list", directory, error.value());
  nlohmann::ordered_json digests = nlohmann::ordered_json::object();
  for (const std::string& name : names) {
    QM_ASSIGN_OR_RETURN(digests[name], Sha256OfFile(absl::StrCat(directory, "/", name)));
  }
  return digests;
}

}  // namespace quantmill
