// Inputs of linears and sums over them, in f64 from the slow reference: the oracle of calibration.
#ifndef QUANTMILL_TESTS_CORE_MODEL_SLOW_STATISTICS_H_
#define QUANTMILL_TESTS_CORE_MODEL_SLOW_STATISTICS_H_

#include <map>
#include <string>

#include "tests/core/model/random_model.h"
#include "tests/core/model/slow_reference.h"

namespace quantmill::testing {

// Inputs of every linear over all windows (I32 [count, length]), by module name.
std::map<std::string, Matrix> SlowInputs(const nlohmann::ordered_json& config,
                                         const MemorySource& source, const Tensor& windows);

// sum over rows of a_row b_row^T; a and b have the same rows.
Matrix Gram(const Matrix& a, const Matrix& b);

Matrix Subtract(Matrix a, const Matrix& b);

}  // namespace quantmill::testing

#endif  // QUANTMILL_TESTS_CORE_MODEL_SLOW_STATISTICS_H_
