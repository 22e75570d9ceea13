// The results of a bench for people and for other programs, from what results.json holds. Equal
// results give equal bytes.
#ifndef QUANTMILL_HOST_BENCH_TABLES_H_
#define QUANTMILL_HOST_BENCH_TABLES_H_

#include <string>
#include <vector>

#include "nlohmann/json.hpp"

namespace quantmill {

// The table's cells; the first row is the head. Columns that no row has figures for are left out.
std::vector<std::vector<std::string>> BenchTable(const nlohmann::ordered_json& results);
// What to know when reading it, and what failed: one line each.
std::vector<std::string> BenchNotes(const nlohmann::ordered_json& results);

std::string BenchText(const nlohmann::ordered_json& results);      // for the terminal
std::string BenchMarkdown(const nlohmann::ordered_json& results);  // results.md
// results.csv: every key that some row has, by RFC 4180; lists with "; " between their entries.
std::string BenchCsv(const nlohmann::ordered_json& results);
// index.html: the table and, per model, KL over bits per weight with standard errors. Refers to
// nothing outside of itself.
std::string BenchPage(const nlohmann::ordered_json& results);

// One line about what was measured on what: "quantmill 0.9.0, cpu (NAME, 8 threads), 2026-11-29".
std::string BenchMachine(const nlohmann::ordered_json& results);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_BENCH_TABLES_H_
