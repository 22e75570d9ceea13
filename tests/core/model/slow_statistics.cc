#include "tests/core/model/slow_statistics.h"

#include <cstdint>
#include <vector>

namespace quantmill::testing {

std::map<std::string, Matrix> SlowInputs(const nlohmann::ordered_json& config,
                                         const MemorySource& source, const Tensor& windows) {
  std::map<std::string, Matrix> inputs;
  for (int64_t w = 0; w < windows.dim(0); ++w) {
    const int32_t* ids = windows.as<int32_t>() + w * windows.dim(1);
    const SlowResult result = RunSlowReference(config, source.Matrices(),
                                               std::vector<int32_t>(ids, ids + windows.dim(1)));
    for (const auto& [name, rows] : result.inputs) {
      inputs[name].insert(inputs[name].end(), rows.begin(), rows.end());
    }
  }
  return inputs;
}

Matrix Gram(const Matrix& a, const Matrix& b) {
  Matrix gram(b[0].size(), std::vector<double>(b[0].size(), 0.0));
  for (size_t row = 0; row < b.size(); ++row) {
    for (size_t i = 0; i < b[row].size(); ++i) {
      for (size_t j = 0; j < b[row].size(); ++j) gram[i][j] += a[row][i] * b[row][j];
    }
  }
  return gram;
}

Matrix Subtract(Matrix a, const Matrix& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    for (size_t j = 0; j < a[i].size(); ++j) a[i][j] -= b[i][j];
  }
  return a;
}

}  // namespace quantmill::testing
