#include "host/bench/tables.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <set>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/string_view.h"
#include "host/cli/table.h"

namespace quantmill {
namespace {

using Json = nlohmann::ordered_json;

constexpr char kNone[] = "-";

double Number(const Json& row, const std::string& key) {
  const auto it = row.find(key);
  return it != row.end() && it->is_number() ? it->get<double>() : NAN;
}

std::string Fixed(double value, int digits) {
  return std::isnan(value) ? kNone : absl::StrFormat("%.*f", digits, value);
}

// Digits behind the point that show a value of this size with three significant ones.
int DigitsFor(double value) {
  if (!(std::abs(value) > 0)) return 2;
  return std::clamp(2 - static_cast<int>(std::floor(std::log10(std::abs(value)))), 0, 6);
}

// "30.4 ± 0.9": as many digits as the error has two significant of.
std::string WithError(const Json& row, const std::string& key, double factor = 1, int least = 0) {
  const double value = Number(row, key) * factor;
  const double error = Number(row, key + "_stderr") * factor;
  if (std::isnan(value)) return kNone;
  if (std::isnan(error)) return Fixed(value, DigitsFor(value));
  if (error == 0 && value == 0) return "0";
  const int digits =
      std::max(least, error > 0 ? std::max(0, DigitsFor(error) - 1) : DigitsFor(value));
  return absl::StrCat(Fixed(value, digits), " ± ", Fixed(error, digits));
}

std::string Rate(const Json& row, const std::string& key) {
  const double value = Number(row, key);
  return Fixed(value, value < 100 ? 1 : 0);
}

std::string Ratio(const Json& row, const std::string& key) {
  const double value = Number(row, key);
  return Fixed(value, 2);
}

std::string Bytes(const Json& row, const std::string& key) {
  const double value = Number(row, key);
  return std::isnan(value) ? kNone : FormatBytes(static_cast<int64_t>(value));
}

std::string QuantizeTime(const Json& row) {
  if (row.contains("resumed")) return "resumed";
  const double value = Number(row, "quantize_seconds");
  return std::isnan(value) ? kNone : Fixed(value, value < 100 ? 2 : 0) + " s";
}

// The numbers, in the table, of the rows this one ties with.
std::string Ties(const Json& row, const Json& rows) {
  std::vector<std::string> numbers;
  const Json ties = row.value("kl_ties", Json::array());
  for (size_t i = 0; i < rows.size(); ++i) {
    if (rows[i].at("model") != row.at("model")) continue;
    if (std::find(ties.begin(), ties.end(), rows[i].at("row")) != ties.end()) {
      numbers.push_back(absl::StrCat(i + 1));
    }
  }
  return absl::StrJoin(numbers, " ");
}

// "_b8" of every batch that some row has a rate for, in order.
std::vector<std::string> Batches(const Json& rows) {
  std::vector<std::string> batches;
  for (const Json& row : rows) {
    for (const auto& [key, value] : row.items()) {
      constexpr absl::string_view kPrefix = "tokens_per_second_b";
      if (!absl::StartsWith(key, kPrefix)) continue;
      const std::string batch = key.substr(kPrefix.size());
      if (batch.find('_') != std::string::npos) continue;
      if (std::find(batches.begin(), batches.end(), batch) == batches.end()) {
        batches.push_back(batch);
      }
    }
  }
  return batches;
}

struct Column {
  std::string head;
  std::function<std::string(const Json& row)> text;
};

std::vector<Column> Columns(const Json& rows) {
  auto key = [](const char* name) {
    return [name](const Json& row) { return row.value(name, ""); };
  };
  std::vector<Column> columns = {
      {"MODEL", key("model")},
      {"ROW", key("row")},
      {"FORMAT", key("format")},
      {"BITS/W", [](const Json& row) { return Fixed(Number(row, "bits_per_weight_all"), 3); }},
      {"SIZE", [](const Json& row) { return Bytes(row, "size_bytes"); }},
      {"x", [](const Json& row) { return Ratio(row, "size_ratio"); }},
      {"QUANTIZE", QuantizeTime},
      {"HOST PEAK", [](const Json& row) { return Bytes(row, "peak_rss_bytes"); }},
      {"GPU PEAK",
       [](const Json& row) {
         return Number(row, "peak_device_bytes") > 0 ? Bytes(row, "peak_device_bytes") : kNone;
       }},
      {"PERPLEXITY", [](const Json& row) { return WithError(row, "perplexity", 1, 2); }},
      {"RATIO", [](const Json& row) { return WithError(row, "ppl_ratio"); }},
      {"KL", [](const Json& row) { return WithError(row, "kl_mean"); }},
      {"TOP-1 %", [](const Json& row) { return WithError(row, "top1_agreement", 100); }}};
  const std::vector<std::string> batches = Batches(rows);
  for (const std::string& batch : batches) {
    const std::string of = batches.size() > 1 ? absl::StrCat(" (", batch, ")") : "";
    const std::string rate = absl::StrCat("tokens_per_second_b", batch);
    columns.push_back({"TOKENS/S" + of, [rate](const Json& row) { return Rate(row, rate); }});
    columns.push_back({"x", [rate](const Json& row) { return Ratio(row, rate + "_ratio"); }});
    columns.push_back(
        {"PROMPT/S" + of, [rate](const Json& row) { return Rate(row, "prompt_" + rate); }});
  }
  columns.push_back({"KL TIES", [&rows](const Json& row) { return Ties(row, rows); }});
  return columns;
}

bool Shown(const std::vector<std::string>& cells) {
  return std::any_of(cells.begin(), cells.end(),
                     [](const std::string& cell) { return !cell.empty() && cell != kNone; });
}

std::string OneLine(const std::string& text) { return absl::StrReplaceAll(text, {{"\n", "; "}}); }

}  // namespace

std::vector<std::vector<std::string>> BenchTable(const Json& results) {
  const Json& rows = results.at("rows");
  std::set<std::string> models;
  for (const Json& row : rows) models.insert(row.at("model").get<std::string>());
  std::vector<std::vector<std::string>> table(rows.size() + 1);
  table[0].push_back("#");
  for (size_t i = 0; i < rows.size(); ++i) table[i + 1].push_back(absl::StrCat(i + 1));
  for (const Column& column : Columns(rows)) {
    if (column.head == "MODEL" && models.size() < 2) continue;
    std::vector<std::string> cells;
    for (const Json& row : rows) {
      const bool failed = row.at("status") != "done" && column.head == "KL";
      cells.push_back(failed ? row.at("status").get<std::string>() : column.text(row));
    }
    if (!Shown(cells)) continue;
    table[0].push_back(column.head);
    for (size_t i = 0; i < cells.size(); ++i) table[i + 1].push_back(cells[i]);
  }
  return table;
}

std::string BenchMachine(const Json& results) {
  const std::string gpu = results.value("gpu", "");
  return absl::StrCat("quantmill ", results.value("version", ""), ", ",
                      gpu.empty() ? "" : absl::StrCat(gpu, ", "), results.value("processor", ""),
                      ", ", results.value("threads", 0),
                      results.value("threads", 0) == 1 ? " thread, " : " threads, ",
                      results.value("date", "").substr(0, 10));
}

std::vector<std::string> BenchNotes(const Json& results) {
  std::vector<std::string> notes = {
      BenchMachine(results),
      "BITS/W counts all that is stored for the linears of the blocks; x is the ratio to the "
      "original."};
  bool errors = false, ties = false, speed = false;
  for (const Json& row : results.at("rows")) {
    errors = errors || row.contains("perplexity_stderr");
    ties = ties || !row.value("kl_ties", Json::array()).empty();
    for (const auto& [key, value] : row.items()) {
      speed = speed || absl::StartsWith(key, "tokens_per_second_b");
    }
  }
  if (errors) {
    notes.push_back(
        "± is one standard error over the windows of the text. That of a perplexity is mostly the "
        "text's own; RATIO (perplexity to the original's), KL and TOP-1 compare both on the same "
        "windows.");
  }
  if (ties) {
    notes.push_back(
        "KL TIES lists the rows whose KL cannot be told from this row's: the paired difference is "
        "below two standard errors.");
  }
  if (speed) {
    notes.push_back(
        absl::StrCat("TOKENS/S and PROMPT/S: ", results.value("speed_prompt", 0),
                     " tokens of prompt and ", results.value("speed_new_tokens", 0),
                     " tokens generated from the stored weights, all sequences together."));
  }
  for (const Json& row : results.at("rows")) {
    const std::string name =
        absl::StrCat(row.at("model").get<std::string>(), "/", row.at("row").get<std::string>());
    if (row.contains("error")) {
      notes.push_back(absl::StrCat(name, " ", row.at("status").get<std::string>(), ": ",
                                   OneLine(row.at("error"))));
    }
    if (row.contains("speed_error")) {
      notes.push_back(absl::StrCat(name, " has no speed: ", OneLine(row.at("speed_error"))));
    }
  }
  return notes;
}

std::string BenchText(const Json& results) {
  const auto table = BenchTable(results);
  std::vector<size_t> right;
  for (size_t c = 0; c < table[0].size(); ++c) {
    const std::string& head = table[0][c];
    if (head != "MODEL" && head != "ROW" && head != "FORMAT" && head != "KL TIES")
      right.push_back(c);
  }
  return absl::StrCat(FormatTable(table, right), "\n", absl::StrJoin(BenchNotes(results), "\n"),
                      "\n");
}

std::string BenchMarkdown(const Json& results) {
  const auto table = BenchTable(results);
  std::string text;
  for (size_t r = 0; r < table.size(); ++r) {
    std::vector<std::string> cells;
    for (const std::string& cell : table[r]) {
      cells.push_back(absl::StrReplaceAll(cell, {{"|", "\\|"}}));
    }
    absl::StrAppend(&text, "| ", absl::StrJoin(cells, " | "), " |\n");
    if (r > 0) continue;
    absl::StrAppend(&text, "|");
    for (size_t c = 0; c < table[0].size(); ++c) absl::StrAppend(&text, "---|");
    absl::StrAppend(&text, "\n");
  }
  absl::StrAppend(&text, "\n");
  for (const std::string& note : BenchNotes(results)) absl::StrAppend(&text, "- ", note, "\n");
  return text;
}

std::string BenchCsv(const Json& results) {
  std::vector<std::string> keys;
  for (const Json& row : results.at("rows")) {
    for (const auto& [key, value] : row.items()) {
      if (std::find(keys.begin(), keys.end(), key) == keys.end()) keys.push_back(key);
    }
  }
  auto plain = [](const Json& value) {
    return value.is_string() ? value.get<std::string>() : value.dump();
  };
  auto field = [&plain](const Json& value) {
    std::vector<std::string> parts;
    if (value.is_array()) {
      for (const Json& item : value) parts.push_back(plain(item));
    } else {
      parts.push_back(plain(value));
    }
    std::string text = absl::StrJoin(parts, "; ");
    if (text.find_first_of(",\"\r\n") == std::string::npos) return text;
    return absl::StrCat("\"", absl::StrReplaceAll(text, {{"\"", "\"\""}}), "\"");
  };
  std::string text = absl::StrCat(absl::StrJoin(keys, ","), "\r\n");
  for (const Json& row : results.at("rows")) {
    std::vector<std::string> fields;
    fields.reserve(keys.size());
    for (const std::string& key : keys)
      fields.push_back(row.contains(key) ? field(row.at(key)) : "");
    absl::StrAppend(&text, absl::StrJoin(fields, ","), "\r\n");
  }
  return text;
}

}  // namespace quantmill
