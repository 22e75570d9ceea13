// Rows of a bench set against one another: ratios to the original, and which differences are noise.
#ifndef QUANTMILL_HOST_BENCH_COMPARISON_H_
#define QUANTMILL_HOST_BENCH_COMPARISON_H_

#include <vector>

#include "nlohmann/json.hpp"

namespace quantmill {

struct BenchResultRow {
  nlohmann::ordered_json json;  // flat; has model, row, status
  bool baseline = false;
  std::vector<double> window_kl;  // empty when not measured
};

// Whether the means of two models' KL on the same windows differ by less than two standard errors
// of the paired difference. False when there are fewer than two windows, or not equally many.
bool KlIsTied(const std::vector<double>& a, const std::vector<double>& b);

// Adds to every row that has the figures: size_ratio, and KEY_ratio for each of the original's
// KEYs prompt_tokens_per_second_bB and tokens_per_second_bB; kl_ties, the names of the model's
// other rows whose KL cannot be told from this one's, in the order of the rows.
void CompareRows(std::vector<BenchResultRow>* rows);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_BENCH_COMPARISON_H_
