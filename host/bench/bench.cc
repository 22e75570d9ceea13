#include "host/bench/bench.h"

#include <cstdlib>
#include <filesystem>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "core/base/clock.h"
#include "core/base/status.h"
#include "core/io/files.h"
#include "core/io/sha256.h"
#include "core/threads/thread_pool.h"
#include "host/bench/cell_keys.h"
#include "host/bench/cell_runner.h"
#include "host/bench/comparison.h"
#include "host/bench/preflight.h"
#include "host/bench/tables.h"
#include "host/bench/tasks.h"
#include "host/cli/command.h"
#include "host/pipeline/bench_file.h"
#include "host/plugins/catalog.h"
#include "host/plugins/inspect_child.h"

namespace quantmill {
namespace {

class Bench {
 public:
  explicit Bench(const BenchOptions& options) : options_(options) {}

  absl::StatusOr<nlohmann::ordered_json> Run() {
    QM_RETURN_IF_ERROR(Prepare());
    CellRunner runner(directory_, options_.plugins, context_, digests_.get(), bench_.speed);
    std::vector<BenchResultRow> rows;
    for (size_t i = 0; i < bench_.cells.size(); ++i) {
      QM_ASSIGN_OR_RETURN(BenchResultRow row, RunCell(i, runner));
      rows.push_back(std::move(row));
    }
    QM_RETURN_IF_ERROR(digests_->Save());
    CompareRows(&rows);
    return Results(std::move(rows));
  }

 private:
  absl::Status Prepare() {
    std::error_code error;
    directory_ = std::filesystem::absolute(options_.directory, error).lexically_normal().string();
    absl::StatusOr<BenchFile> bench = ParseBenchFile(options_.file, directory_, options_.device);
    if (!bench.ok()) return UsageError(bench.status());
    bench_ = *std::move(bench);
    QM_RETURN_IF_ERROR(CheckBenchDirectory(directory_, options_.resume));
    const Pipeline& any = bench_.cells.front().pipeline;
    std::vector<std::string> files = options_.plugins;
    files.insert(files.end(), any.plugins.begin(), any.plugins.end());
    absl::StatusOr<Catalog> catalog = DiscoverPlugins(files);
    if (!catalog.ok()) return RefusedError(catalog.status());
    catalog_ = *std::move(catalog);
    if (const absl::Status status = CheckNamedPlugins(catalog_, files); !status.ok()) {
      return RefusedError(status);
    }
    QM_ASSIGN_OR_RETURN(refused_, CheckBench(bench_, catalog_));
    absl::StatusOr<DeviceFacts> facts = BenchFacts(any);
    if (!facts.ok()) return RefusedError(facts.status());
    context_.catalog = &catalog_;
    context_.facts = *std::move(facts);
    QM_ASSIGN_OR_RETURN(context_.program_sha256, Sha256OfFile(QuantmillProgram()));
    QM_ASSIGN_OR_RETURN(lock_, BenchDirectory::Open(directory_, options_.resume));
    digests_ = std::make_unique<InputDigests>(directory_ + "/digests.json", threads_);
    return absl::OkStatus();
  }

  // The cell's name in front of the stages, so that progress of one is not taken for another's.
  EventSink SinkOf(const std::string& name) const {
    return [this, name](const nlohmann::json& event) {
      nlohmann::json named = event;
      if (event.value("type", "") == "progress") {
        named["stage"] = absl::StrCat(name, " ", event.value("stage", ""));
      }
      options_.sink(named);
    };
  }

  std::string NameOf(const BenchCell& cell) const {
    return bench_.models.size() > 1 ? absl::StrCat(cell.model, "/", cell.row) : cell.row;
  }

  absl::StatusOr<BenchResultRow> RunCell(size_t index, CellRunner& runner) {
    const BenchCell& cell = bench_.cells[index];
    const auto start = Clock::now();
    const EventSink sink =
        SinkOf(absl::StrCat("[", index + 1, "/", bench_.cells.size(), "] ", NameOf(cell)));
    BenchResultRow row;
    row.baseline = cell.baseline;
    row.json = {{"model", cell.model}, {"row", cell.row}, {"status", "done"}};
    bool kept = false;
    absl::Status status = refused_[index];
    if (status.ok()) {
      absl::StatusOr<CellFigures> figures = runner.Quality(cell, sink);
      status = figures.status();
      if (figures.ok()) {
        row.json.update(figures->row);
        row.window_kl = std::move(figures->window_kl);
        kept = figures->kept;
      }
    } else {
      status = RefusedError(status);
    }
    if (absl::IsCancelled(status)) return Interrupted();
    if (!status.ok()) {
      row.json["status"] = ExitCodeOf(status) == kExitRefused ? "refused" : "failed";
      row.json["error"] = std::string(status.message());
    } else if (runner.MeasuresSpeed()) {
      const absl::StatusOr<CellFigures> speed = runner.Speed(cell, sink);
      if (absl::IsCancelled(speed.status())) return Interrupted();
      if (speed.ok()) {
        row.json.update(speed->row);
        kept = kept && speed->kept;
      } else {
        row.json["speed_error"] = std::string(speed.status().message());
      }
    }
    // So that an interrupted bench does not read its models again.
    QM_RETURN_IF_ERROR(digests_->Save());
    Say(index, row.json, kept ? -1 : SecondsSince(start));
    return row;
  }

  static absl::Status Interrupted() {
    return absl::CancelledError(ErrorText("interrupted", "finished rows and units are kept",
                                          "continue with the same command and --resume"));
  }

  void Say(size_t index, const nlohmann::ordered_json& row, double seconds) const {
    if (!options_.say) return;
    std::string text = absl::StrCat("[", index + 1, "/", bench_.cells.size(), "] ",
                                    NameOf(bench_.cells[index]), ": ");
    if (row.contains("error")) {
      absl::StrAppend(&text, row.at("status").get<std::string>(), "; ",
                      row.at("error").get<std::string>());
    } else {
      absl::StrAppendFormat(&text, "perplexity %.5g", row.value("perplexity", 0.0));
      if (row.contains("kl_mean")) {
        absl::StrAppendFormat(&text, ", KL %.4g", row.value("kl_mean", 0.0));
      }
      absl::StrAppend(&text, seconds < 0 ? ", kept" : absl::StrFormat(", %.1f s", seconds));
      if (row.contains("speed_error")) {
        absl::StrAppend(&text, "; no speed: ", row.at("speed_error").get<std::string>());
      }
    }
    options_.say(text);
  }

  nlohmann::ordered_json Results(std::vector<BenchResultRow> rows) const {
    const char* commit = getenv("QM_COMMIT");
    nlohmann::ordered_json results = {
        {"bench", std::filesystem::path(bench_.file).filename().string()},
        {"version", QM_VERSION},
        {"commit", commit != nullptr ? commit : "unknown"},
        {"program_sha256", context_.program_sha256},
        {"date", absl::FormatTime("%Y-%m-%dT%H:%M:%SZ", absl::Now(), absl::UTCTimeZone())},
        {"device", context_.facts.device},
        {"processor", context_.facts.processor},
        {"threads", context_.facts.threads}};
    if (!context_.facts.gpu.empty()) {
      results["gpu"] = context_.facts.gpu;
      results["driver"] = context_.facts.driver;
    }
    if (bench_.speed) {
      results["speed_prompt"] = bench_.speed->prompt;
      results["speed_new_tokens"] = bench_.speed->new_tokens;
      results["speed_batch"] = bench_.speed->batch;
    }
    results["rows"] = nlohmann::ordered_json::array();
    for (BenchResultRow& row : rows) results["rows"].push_back(std::move(row.json));
    return results;
  }

  const BenchOptions& options_;
  std::string directory_;
  BenchFile bench_;
  Catalog catalog_;
  std::vector<absl::Status> refused_;  // per cell
  CellContext context_;
  ThreadPool threads_;
  std::unique_ptr<BenchDirectory> lock_;
  std::unique_ptr<InputDigests> digests_;
};

}  // namespace

absl::StatusOr<nlohmann::ordered_json> RunBench(const BenchOptions& options) {
  return Bench(options).Run();
}

bool BenchIsComplete(const nlohmann::ordered_json& results) {
  for (const auto& row : results.at("rows")) {
    if (row.contains("error") || row.contains("speed_error")) return false;
  }
  return true;
}

absl::Status WriteBenchFiles(const std::string& directory, const nlohmann::ordered_json& results) {
  const std::string json =
      results.dump(1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
  QM_RETURN_IF_ERROR(WriteFile(directory + "/results.json", json));
  QM_RETURN_IF_ERROR(WriteFile(directory + "/results.csv", BenchCsv(results)));
  QM_RETURN_IF_ERROR(WriteFile(directory + "/results.md", BenchMarkdown(results)));
  return WriteFile(directory + "/index.html", BenchPage(results));
}

}  // namespace quantmill
