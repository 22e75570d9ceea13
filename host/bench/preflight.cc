#include "host/bench/preflight.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <map>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "core/base/status.h"
#include "core/io/files.h"
#include "core/io/json.h"
#include "core/model/config.h"
#include "host/cli/command.h"
#include "host/pipeline/check.h"

namespace quantmill {
namespace {

namespace fs = std::filesystem;

constexpr char kMark[] = "/bench.json";
constexpr char kMarkText[] = "{\"quantmill_bench\": 1}\n";

// Lines of several errors, each once.
class Refusals {
 public:
  void Add(const absl::Status& status) {
    if (status.ok()) return;
    for (const absl::string_view line : absl::StrSplit(status.message(), '\n')) {
      if (std::find(lines_.begin(), lines_.end(), line) == lines_.end()) lines_.emplace_back(line);
    }
  }
  absl::Status ToStatus() const {
    if (lines_.empty()) return absl::OkStatus();
    return RefusedError(absl::InvalidArgumentError(absl::StrJoin(lines_, "\n")));
  }

 private:
  std::vector<std::string> lines_;
};

absl::Status CheckPositions(const BenchFile& bench, const BenchModel& model,
                            const ModelConfig& config) {
  if (!bench.speed || config.max_positions <= 0) return absl::OkStatus();
  const int64_t wanted = bench.speed->prompt + bench.speed->new_tokens;
  if (wanted <= config.max_positions) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      bench.speed->location.ToString(), ": ",
      ErrorText(absl::StrCat("'speed' asks for ", wanted, " tokens"),
                absl::StrCat("model '", model.name, "' takes at most ", config.max_positions),
                "lower prompt or new_tokens")));
}

absl::StatusOr<std::map<std::string, ModelConfig>> ReadConfigs(const BenchFile& bench) {
  Refusals refusals;
  for (const BenchCell& cell : bench.cells) {
    refusals.Add(CheckFiles(cell.pipeline, /*resume=*/true));
  }
  QM_RETURN_IF_ERROR(refusals.ToStatus());
  std::map<std::string, ModelConfig> configs;
  for (const BenchModel& model : bench.models) {
    absl::StatusOr<ModelConfig> config = ReadModelConfig(model.path);
    refusals.Add(config.status());
    if (!config.ok()) continue;
    refusals.Add(CheckPositions(bench, model, *config));
    configs.emplace(model.name, *std::move(config));
  }
  QM_RETURN_IF_ERROR(refusals.ToStatus());
  return configs;
}

absl::Status NotABench(const std::string& path, const std::string& why) {
  return RefusedError(absl::FailedPreconditionError(
      ErrorText(absl::StrCat("the directory ", path, " exists"), why, "choose another --out")));
}

}  // namespace

absl::StatusOr<std::vector<absl::Status>> CheckBench(const BenchFile& bench,
                                                     const Catalog& catalog) {
  QM_ASSIGN_OR_RETURN(const auto configs, ReadConfigs(bench));
  std::vector<absl::Status> statuses;
  for (const BenchCell& cell : bench.cells) {
    statuses.push_back(
        cell.baseline ? absl::OkStatus()
                      : CheckPipeline(cell.pipeline, catalog, configs.at(cell.model)).status());
  }
  Refusals refusals;
  for (const std::string& row : bench.rows) {
    absl::Status refused;
    bool possible = false;
    for (size_t i = 0; i < bench.cells.size(); ++i) {
      if (bench.cells[i].row != row) continue;
      possible = possible || statuses[i].ok();
      if (refused.ok()) refused = statuses[i];
    }
    if (!possible) refusals.Add(refused);
  }
  QM_RETURN_IF_ERROR(refusals.ToStatus());
  return statuses;
}

absl::Status CheckBenchDirectory(const std::string& path, bool resume) {
  std::error_code error;
  if (!fs::exists(path, error)) return absl::OkStatus();
  if (!fs::is_directory(path, error)) return NotABench(path, "it is no directory");
  if (fs::is_empty(path, error)) return absl::OkStatus();
  const auto mark = ReadJson(path + kMark);
  if (!mark.ok() || !mark->is_object() || !mark->contains("quantmill_bench")) {
    return NotABench(path, "it holds something else than a bench");
  }
  if (resume) return absl::OkStatus();
  return RefusedError(absl::FailedPreconditionError(
      ErrorText(absl::StrCat("the directory ", path, " holds an earlier bench"), "",
                "add --resume to compute only what is missing or has changed, or choose another "
                "--out")));
}

absl::StatusOr<std::unique_ptr<BenchDirectory>> BenchDirectory::Open(const std::string& path,
                                                                     bool resume) {
  QM_RETURN_IF_ERROR(CheckBenchDirectory(path, resume));
  std::error_code error;
  fs::create_directories(path, error);
  if (error) return RefusedError(SystemError("create", path, error.value()));
  const std::string mark = path + kMark;
  if (!FileExists(mark)) {
    if (const absl::Status status = WriteFile(mark, kMarkText); !status.ok()) {
      return RefusedError(status);
    }
  }
  const int descriptor = open(mark.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) return RefusedError(SystemError("open", mark, errno));
  auto directory = std::unique_ptr<BenchDirectory>(new BenchDirectory(descriptor));
  if (flock(descriptor, LOCK_EX | LOCK_NB) != 0) {
    return RefusedError(absl::FailedPreconditionError(
        ErrorText(absl::StrCat("another process works in ", path), "", "wait for its end")));
  }
  return directory;
}

BenchDirectory::~BenchDirectory() { close(descriptor_); }

}  // namespace quantmill
