#include "host/bench/comparison.h"

#include <cmath>
#include <string>

#include "absl/strings/match.h"
#include "core/eval/evaluate.h"

namespace quantmill {
namespace {

void PutRatio(const std::string& key, const std::string& ratio,
              const nlohmann::ordered_json& original, nlohmann::ordered_json* row) {
  if (!original.contains(key) || !row->contains(key)) return;
  const double base = original.at(key).get<double>();
  if (base > 0) (*row)[ratio] = row->at(key).get<double>() / base;
}

void PutRatios(const nlohmann::ordered_json& original, nlohmann::ordered_json* row) {
  PutRatio("size_bytes", "size_ratio", original, row);
  for (const auto& [key, value] : original.items()) {
    const bool rate = absl::StrContains(key, "tokens_per_second_b") &&
                      !absl::EndsWith(key, "_stderr") && !absl::EndsWith(key, "_ratio");
    if (rate) PutRatio(key, key + "_ratio", original, row);
  }
}

}  // namespace

bool KlIsTied(const std::vector<double>& a, const std::vector<double>& b) {
  if (a.size() < 2 || a.size() != b.size()) return false;
  std::vector<double> differences(a.size());
  for (size_t i = 0; i < a.size(); ++i) differences[i] = a[i] - b[i];
  const Estimate difference = EstimateFromWindows(differences);
  return std::abs(difference.value) <= 2 * *difference.standard_error;
}

void CompareRows(std::vector<BenchResultRow>* rows) {
  for (BenchResultRow& row : *rows) {
    const std::string model = row.json.at("model");  // ratios are added to the object below
    nlohmann::ordered_json ties = nlohmann::ordered_json::array();
    for (const BenchResultRow& other : *rows) {
      if (other.json.at("model") != model) continue;
      // A copy: the original is compared with itself, too.
      if (other.baseline) PutRatios(nlohmann::ordered_json(other.json), &row.json);
      if (&other != &row && KlIsTied(row.window_kl, other.window_kl)) {
        ties.push_back(other.json.at("row"));
      }
    }
    if (row.window_kl.size() >= 2) row.json["kl_ties"] = ties;
  }
}

}  // namespace quantmill
