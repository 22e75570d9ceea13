// "Did you mean": the known name closest to a mistyped one.
#ifndef QUANTMILL_CORE_BASE_NEAREST_H_
#define QUANTMILL_CORE_BASE_NEAREST_H_

#include <algorithm>
#include <cctype>
#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace quantmill {

// Edit distance with insertion, deletion, substitution and swap of neighbours (optimal string
// alignment). Case and the difference between '-' and '_' do not count.
inline size_t NameDistance(std::string_view a, std::string_view b) {
  auto fold = [](char c) {
    return c == '_' ? '-' : static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  };
  std::vector<size_t> before(b.size() + 1), above(b.size() + 1), row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) above[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const bool equal = fold(a[i - 1]) == fold(b[j - 1]);
      row[j] = std::min({above[j] + 1, row[j - 1] + 1, above[j - 1] + (equal ? 0 : 1)});
      if (i > 1 && j > 1 && fold(a[i - 1]) == fold(b[j - 2]) && fold(a[i - 2]) == fold(b[j - 1])) {
        row[j] = std::min(row[j], before[j - 2] + 1);
      }
    }
    before.swap(above);
    above.swap(row);
  }
  return above[b.size()];
}

// The name closest to `wrong`, the first of equals; empty if none is close enough to be meant
// (more than a third of the longer name differs and neither is the start of the other).
inline std::string NearestName(std::string_view wrong, const std::vector<std::string>& names) {
  constexpr size_t kLongest = 200;  // keeps the quadratic distance cheap on hostile input
  if (wrong.empty() || wrong.size() > kLongest) return "";
  std::string best;
  size_t best_distance = 0;
  for (const std::string& name : names) {
    if (name.empty() || name.size() > kLongest) continue;
    const size_t distance = NameDistance(wrong, name);
    const size_t shorter = std::min(wrong.size(), name.size());
    const size_t longer = std::max(wrong.size(), name.size());
    const bool prefix =
        shorter >= 3 &&
        NameDistance(wrong.substr(0, shorter), std::string_view(name).substr(0, shorter)) == 0;
    if (distance > std::max<size_t>(1, longer / 3) && !prefix) continue;
    if (best.empty() || distance < best_distance) {
      best = name;
      best_distance = distance;
    }
  }
  return best;
}

// "did you mean 'name'?", or "known: a, b, c" when nothing is close; empty without names.
inline std::string NearestHint(std::string_view wrong, const std::vector<std::string>& names) {
  const std::string nearest = NearestName(wrong, names);
  if (!nearest.empty()) return "did you mean '" + nearest + "'?";
  if (names.empty()) return "";
  return absl::StrCat("known: ", absl::StrJoin(names, ", "));
}

}  // namespace quantmill

#endif  // QUANTMILL_CORE_BASE_NEAREST_H_
