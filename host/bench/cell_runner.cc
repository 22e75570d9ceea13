#include "host/bench/cell_runner.h"

#include <filesystem>
#include <memory>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "core/base/status.h"
#include "core/io/files.h"
#include "core/io/json.h"
#include "host/bench/stored_bits.h"
#include "host/bench/tasks.h"
#include "host/run/supervised_run.h"

namespace quantmill {
namespace {

namespace fs = std::filesystem;

constexpr char kResultFile[] = "/result.json";  // quality and size, with the key they belong to
constexpr char kSpeedFile[] = "/speed.json";
constexpr char kBegunFile[] = "/cell.json";  // the key of what lies in the folder, finished or not

std::string Now() {
  return absl::FormatTime("%Y-%m-%dT%H:%M:%SZ", absl::Now(), absl::UTCTimeZone());
}

nlohmann::ordered_json ReadOrNull(const std::string& path) {
  const auto json = ReadOrderedJson(path);
  return json.ok() ? *json : nlohmann::ordered_json();
}

std::string KeyIn(const nlohmann::ordered_json& json) {
  const auto it = json.is_object() ? json.find("key") : json.end();
  return it != json.end() && it->is_string() ? it->get<std::string>() : "";
}

// Copies the scores under the names of the table; times of scoring get a name of their own.
void PutScores(const nlohmann::ordered_json& evaluation, nlohmann::ordered_json* row) {
  for (const auto& [key, value] : evaluation.items()) {
    if (key == "seconds") {
      (*row)["evaluation_seconds"] = value;
    } else if (key != "tokens_per_second") {
      (*row)[key] = value;
    }
  }
}

// Means over the slots of all stages that measured one.
void PutStageMeans(const nlohmann::ordered_json& stages, nlohmann::ordered_json* row) {
  for (const char* key : {"weight_nmse", "output_nmse"}) {
    double sum = 0, slots = 0;
    for (const auto& stage : stages) {
      if (!stage.contains(key)) continue;
      sum += stage.at(key).get<double>() * stage.at("slots").get<double>();
      slots += stage.at("slots").get<double>();
    }
    if (slots > 0) (*row)[key] = sum / slots;
  }
}

nlohmann::ordered_json RowOfRun(const nlohmann::ordered_json& run) {
  nlohmann::ordered_json row = {{"format", run.at("format")},
                                {"bits_per_weight", run.at("bits_per_weight")}};
  const auto bits = StoredBitsPerWeight(run.at("output"));
  // Not a directory of safetensors: all that is known is what the run says.
  row["bits_per_weight_all"] = bits.ok() ? *bits : run.at("bits_per_weight").get<double>();
  row["size_bytes"] = run.at("size_bytes");
  // Of a run that was interrupted the time is not known.
  if (run.value("reused_units", int64_t{0}) == 0) {
    row["quantize_seconds"] = run.at("quantize_seconds");
  } else {
    row["resumed"] = 1;
  }
  row["peak_rss_bytes"] = run.at("peak_rss_bytes");
  row["peak_device_bytes"] = run.at("peak_device_bytes");
  PutStageMeans(run.at("stages"), &row);
  if (run.contains("evaluation")) PutScores(run.at("evaluation"), &row);
  if (!run.at("warnings").empty()) row["warnings"] = run.at("warnings");
  return row;
}

nlohmann::ordered_json RowOfBaseline(const nlohmann::ordered_json& baseline) {
  nlohmann::ordered_json row = {{"format", "original"},
                                {"bits_per_weight", baseline.at("bits_per_weight")},
                                {"bits_per_weight_all", baseline.at("bits_per_weight")},
                                {"size_bytes", baseline.at("size_bytes")},
                                {"peak_rss_bytes", baseline.at("peak_rss_bytes")},
                                {"peak_device_bytes", baseline.at("peak_device_bytes")}};
  nlohmann::ordered_json scores = baseline;
  for (const char* key : {"bits_per_weight", "size_bytes", "peak_rss_bytes", "peak_device_bytes",
                          "window_nll", "window_kl"}) {
    scores.erase(key);
  }
  PutScores(scores, &row);
  return row;
}

// Best effort: text that could not be copied is drawn again.
void CopySelfText(const std::string& from, const std::string& to) {
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(from, error)) {
    const std::string name = entry.path().filename().string();
    if (!absl::StartsWith(name, "self-text-") || entry.path().extension() != ".safetensors") {
      continue;
    }
    const std::string target = absl::StrCat(to, "/", name);
    if (fs::exists(target, error)) continue;
    fs::create_directories(to, error);
    fs::copy_file(entry.path(), target + ".tmp", fs::copy_options::overwrite_existing, error);
    if (!error) fs::rename(target + ".tmp", target, error);
  }
}

}  // namespace

bool CellRunner::IsKept(const BenchCell& cell, const std::string& key,
                        const nlohmann::ordered_json& saved) const {
  if (KeyIn(saved) != key || !saved.contains("row")) return false;
  if (!SameOwners(saved.value("formats", nlohmann::json()), *context_.catalog)) return false;
  if (cell.baseline || !speed_) return true;
  // The checkpoint is needed again if its speed is still to be measured.
  const std::string folder = BenchCellPath(directory_, cell);
  std::error_code error;
  return fs::exists(folder + "/out", error) ||
         KeyIn(ReadOrNull(folder + kSpeedFile)) == SpeedKey(key, *speed_, context_.facts);
}

absl::StatusOr<CellFigures> CellRunner::Quality(const BenchCell& cell, const EventSink& sink) {
  QM_ASSIGN_OR_RETURN(const std::string key, CellKey(cell, context_, digests_));
  const std::string path = BenchCellPath(directory_, cell) + kResultFile;
  CellFigures figures;
  nlohmann::ordered_json saved = ReadOrNull(path);
  figures.kept = IsKept(cell, key, saved);
  if (!figures.kept) {
    QM_ASSIGN_OR_RETURN(saved, Compute(cell, key, sink));
    QM_RETURN_IF_ERROR(WriteFile(path, saved.dump(1) + "\n"));
    std::error_code error;
    fs::remove_all(cell.pipeline.work_dir, error);
  }
  figures.row = saved.at("row");
  figures.window_kl = saved.value("window_kl", std::vector<double>());
  return figures;
}

absl::StatusOr<nlohmann::ordered_json> CellRunner::Compute(const BenchCell& cell,
                                                           const std::string& key,
                                                           const EventSink& sink) {
  const std::string folder = BenchCellPath(directory_, cell);
  std::error_code error;
  if (KeyIn(ReadOrNull(folder + kBegunFile)) != key) {
    fs::remove_all(folder, error);
    if (error) return SystemError("remove", folder, error.value());
    fs::create_directories(folder, error);
    if (error) return SystemError("create", folder, error.value());
    QM_RETURN_IF_ERROR(
        WriteFile(folder + kBegunFile, nlohmann::json({{"key", key}}).dump() + "\n"));
  }
  nlohmann::ordered_json saved = {{"key", key}};
  if (cell.baseline) {
    QM_ASSIGN_OR_RETURN(const nlohmann::ordered_json baseline, BenchBaseline(cell.pipeline, sink));
    saved["row"] = RowOfBaseline(baseline);
    saved["formats"] = nlohmann::json::object();
    saved["window_kl"] = baseline.at("window_kl");
  } else {
    QM_ASSIGN_OR_RETURN(const nlohmann::ordered_json run, RunPipeline(cell, sink));
    saved["row"] = RowOfRun(run);
    saved["formats"] = FormatOwners(cell.pipeline.export_path, *context_.catalog);
    const auto windows = ReadOrNull(cell.pipeline.work_dir + "/evaluation_windows.json");
    if (windows.contains("kl")) saved["window_kl"] = windows.at("kl");
  }
  saved["row"]["measured"] = Now();
  return saved;
}

absl::StatusOr<std::string> CellRunner::SelfTextFolder(const BenchCell& cell) {
  QM_ASSIGN_OR_RETURN(const std::string model, digests_->Model(cell.pipeline.model_path));
  const std::string key = SelfTextKey(model, context_, cell.pipeline);
  return absl::StrCat(directory_, "/calibration/", key.substr(0, 16));
}

absl::StatusOr<nlohmann::ordered_json> CellRunner::RunPipeline(const BenchCell& cell,
                                                               const EventSink& sink) {
  const std::string file = BenchCellPath(directory_, cell) + "/pipeline.yaml";
  const std::string text = absl::StrCat(
      "# Row ", cell.row, " on ", cell.model, ", as bench ran it: quantmill run repeats it.\n",
      cell.tree.dump(2, ' ', false, nlohmann::json::error_handler_t::replace), "\n");
  QM_RETURN_IF_ERROR(WriteFile(file, text));
  JobRequest request;
  request.pipeline_file = file;
  request.plugins = plugins_;
  request.resume = true;
  QM_ASSIGN_OR_RETURN(const Pipeline pipeline, PipelineOf(request));
  QM_ASSIGN_OR_RETURN(const std::unique_ptr<Journal> journal, OpenRunJournal(pipeline, true));
  const bool draws = pipeline.calibration && pipeline.calibration->text == "self";
  std::string drawn;
  if (draws) {
    QM_ASSIGN_OR_RETURN(drawn, SelfTextFolder(cell));
    CopySelfText(drawn, pipeline.work_dir);
  }
  absl::StatusOr<nlohmann::ordered_json> result = RunSupervised(request, pipeline, *journal, sink);
  if (draws) CopySelfText(pipeline.work_dir, drawn);
  if (result.ok()) QM_RETURN_IF_ERROR(journal->Done());
  return result;
}

absl::StatusOr<CellFigures> CellRunner::Speed(const BenchCell& cell, const EventSink& sink) {
  QM_ASSIGN_OR_RETURN(const std::string cell_key, CellKey(cell, context_, digests_));
  const std::string key = SpeedKey(cell_key, *speed_, context_.facts);
  const std::string path = BenchCellPath(directory_, cell) + kSpeedFile;
  nlohmann::ordered_json saved = ReadOrNull(path);
  CellFigures figures;
  figures.kept = KeyIn(saved) == key && saved.contains("row");
  if (!figures.kept) {
    const std::string& model = cell.baseline ? cell.pipeline.model_path : cell.pipeline.export_path;
    std::vector<std::string> plugins = plugins_;
    plugins.insert(plugins.end(), cell.pipeline.plugins.begin(), cell.pipeline.plugins.end());
    QM_ASSIGN_OR_RETURN(const nlohmann::ordered_json row,
                        BenchGeneration(cell.pipeline, model, plugins, *speed_, sink));
    saved = {{"key", key}, {"row", row}};
    QM_RETURN_IF_ERROR(WriteFile(path, saved.dump(1) + "\n"));
  }
  figures.row = saved.at("row");
  return figures;
}

}  // namespace quantmill
