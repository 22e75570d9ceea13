// What the file system says to a pipeline.
#include <stdlib.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/io/gguf_file.h"
#include "host/pipeline/check.h"
#include "host/pipeline/section.h"

namespace quantmill {
namespace {

namespace fs = std::filesystem;

SourceLocation LocationOf(const Pipeline& pipeline, const std::string& key) {
  const auto it = pipeline.locations.find(key);
  return it == pipeline.locations.end() ? SourceLocation{pipeline.file, 0, 0} : it->second;
}

void CheckText(const SourceLocation& location, const std::string& key, const std::string& path,
               ErrorList* errors) {
  std::error_code error;
  if (fs::is_directory(path, error)) {
    errors->Add(location, absl::StrCat("'", key, "' is a directory: ", path, "; name a text file"));
  } else if (!fs::exists(path, error)) {
    errors->Add(location, absl::StrCat("'", key, "' does not exist: ", path,
                                       "; paths are relative to the pipeline file"));
  } else if (access(path.c_str(), R_OK) != 0) {
    errors->Add(location, absl::StrCat("'", key, "' cannot be read: ", path));
  }
}

void CheckText(const Pipeline& pipeline, const std::string& key, const std::string& path,
               ErrorList* errors) {
  CheckText(LocationOf(pipeline, key), key, path, errors);
}

void CheckTrainingText(const Stage& stage, ErrorList* errors) {
  if (!stage.train.is_object() || !stage.train.contains("data")) return;
  const auto& data = stage.train["data"];
  if (data.is_string()) {
    CheckText(stage.location, "train.data", data.get<std::string>(), errors);
  }
}

void CheckModel(const Pipeline& pipeline, ErrorList* errors) {
  std::error_code error;
  const SourceLocation location = LocationOf(pipeline, "model.path");
  const absl::StatusOr<std::string> gguf = FindGguf(pipeline.model_path);
  if (fs::exists(pipeline.model_path, error) && !gguf.ok()) {
    errors->Add(location, absl::StrCat("'model.path': ", gguf.status().message()));
  } else if (gguf.ok() && !gguf->empty()) {
    return;
  } else if (!fs::is_directory(pipeline.model_path, error)) {
    errors->Add(location, absl::StrCat("'model.path' is no directory: ", pipeline.model_path,
                                       "; paths are relative to the pipeline file"));
  } else if (!fs::exists(fs::path(pipeline.model_path) / "config.json", error)) {
    errors->Add(location,
                absl::StrCat("'model.path' holds no config.json: ", pipeline.model_path,
                             "; name a Hugging Face checkpoint directory or a GGUF file"));
  }
}

// Rights do not tell everything: to root, to a server of network files that maps users, or in a
// file system of the kernel's.
bool CanMakeFolder(const fs::path& parent) {
  std::string probe = (parent / ".quantmill-XXXXXX").string();
  return mkdtemp(probe.data()) != nullptr && rmdir(probe.c_str()) == 0;
}

// The nearest existing folder above a path that will be made must be writable.
void CheckWritable(const Pipeline& pipeline, const std::string& key, const std::string& path,
                   ErrorList* errors) {
  std::error_code error;
  fs::path folder = path;
  while (!fs::exists(folder, error) && folder.has_parent_path() && folder != folder.parent_path()) {
    folder = folder.parent_path();
  }
  if (!fs::is_directory(folder, error)) {
    errors->Add(
        LocationOf(pipeline, key),
        absl::StrCat("'", key, "' cannot be made: ", folder.string(), " is not a directory"));
  } else if (access(folder.c_str(), W_OK | X_OK) != 0) {
    errors->Add(LocationOf(pipeline, key),
                absl::StrCat("'", key, "' cannot be made: ", folder.string(), " is not writable"));
  } else if (!CanMakeFolder(folder)) {
    errors->Add(LocationOf(pipeline, key),
                absl::StrCat("'", key, "' cannot be made in ", folder.string(), ": ",
                             std::strerror(errno), "; choose another folder"));
  }
}

bool IsInside(const fs::path& inner, const fs::path& outer) {
  const fs::path relative = inner.lexically_relative(outer);
  return !relative.empty() && *relative.begin() != "..";
}

void CheckOutput(const Pipeline& pipeline, bool resume, ErrorList* errors) {
  std::error_code error;
  const SourceLocation location = LocationOf(pipeline, "export.path");
  const std::string& out = pipeline.export_path;
  if (IsInside(pipeline.model_path, out) || IsInside(pipeline.work_dir, out)) {
    errors->Add(location, absl::StrCat("'export.path' ", out,
                                       " holds the model or the work directory; name another"));
    return;
  }
  if (fs::exists(out, error)) {
    if (resume && fs::is_directory(out, error)) return;
    errors->Add(location, absl::StrCat("'export.path' exists already: ", out,
                                       "; nothing is overwritten; remove it, name another, or use "
                                       "--resume if this pipeline wrote it"));
    return;
  }
  CheckWritable(pipeline, "export.path", out, errors);
}

}  // namespace

absl::Status CheckFiles(const Pipeline& pipeline, bool resume) {
  ErrorList errors;
  CheckModel(pipeline, &errors);
  if (pipeline.calibration && pipeline.calibration->text != "self") {
    CheckText(pipeline, "calibration.text", pipeline.calibration->text, &errors);
  }
  if (pipeline.evaluate) CheckText(pipeline, "evaluate.text", pipeline.evaluate->text, &errors);
  for (const Stage& stage : pipeline.stages) CheckTrainingText(stage, &errors);
  CheckOutput(pipeline, resume, &errors);
  CheckWritable(pipeline, "run.work_dir", pipeline.work_dir, &errors);
  return errors.ToStatus();
}

}  // namespace quantmill
