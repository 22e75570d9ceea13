#include <algorithm>
#include <cmath>

#include "oftq.h"
#include "quantmill/sdk/plugin.hpp"

namespace quantmill::oftq {
namespace {

qm_status CheckRange(qm_call* call, const char* name, int64_t value, int64_t low, int64_t high,
                     const char* remedy) {
  if (value >= low && value <= high) return QM_OK;
  return qm::Fail(call, QM_INVALID_ARGUMENT, name, " is ", value, "; use ", low, " to ", high,
                  remedy);
}

bool Matches(std::string_view pattern, std::string_view text) {
  size_t p = 0, t = 0, star = std::string_view::npos, resume = 0;
  while (t < text.size()) {
    if (p < pattern.size() && pattern[p] == '*') {
      star = p++;
      resume = t;
    } else if (p < pattern.size() && (pattern[p] == '?' || pattern[p] == text[t])) {
      ++p;
      ++t;
    } else if (star != std::string_view::npos) {  // let the last * take one character more
      p = star + 1;
      t = ++resume;
    } else {
      return false;
    }
  }
  return pattern.find_first_not_of('*', p) == std::string_view::npos;
}

std::string_view Trimmed(std::string_view text) {
  const size_t first = text.find_first_not_of(" \t");
  if (first == std::string_view::npos) return {};
  return text.substr(first, text.find_last_not_of(" \t") - first + 1);
}

}  // namespace

qm_status ReadOptions(qm_call* call, Options* out) {
  const std::string_view method = qm::OptionStr(call, "method");
  if (method != "oft" && method != "lora") {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "method '", std::string(method),
                    "' is not offered; use oft or lora");
  }
  out->lora = method == "lora";
  out->block = qm::OptionI64(call, "block");
  out->neumann_terms = qm::OptionI64(call, "neumann_terms");
  out->rank = qm::OptionI64(call, "rank");
  out->alpha = qm::OptionF64(call, "alpha");
  out->target = std::string(qm::OptionStr(call, "target"));
  out->merge = qm::OptionBool(call, "merge");
  QM_TRY(CheckRange(call, "block", out->block, 2, kMaxBlock, " (channels that a rotation mixes)"));
  QM_TRY(CheckRange(call, "neumann_terms", out->neumann_terms, 0, kMaxTerms, ", where 0 is exact"));
  if (out->neumann_terms == 1) {
    return qm::Fail(call, QM_INVALID_ARGUMENT,
                    "neumann_terms is 1, with which every rotation is the identity whatever is "
                    "trained; use 2 or more, or 0 for the exact transform");
  }
  QM_TRY(CheckRange(call, "rank", out->rank, 1, kMaxRank, ""));
  if (!std::isfinite(out->alpha)) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "alpha must be a finite number");
  }
  if (Trimmed(out->target).empty()) {
    return qm::Fail(call, QM_INVALID_ARGUMENT,
                    "target is empty; use '*' for every linear, or patterns like 'q_proj,v_proj'");
  }
  return QM_OK;
}

bool Targets(std::string_view patterns, std::string_view linear) {
  const size_t dot = linear.rfind('.');
  const std::string_view last = dot == std::string_view::npos ? linear : linear.substr(dot + 1);
  while (!patterns.empty()) {
    const size_t comma = std::min(patterns.find(','), patterns.size());
    const std::string_view pattern = Trimmed(patterns.substr(0, comma));
    if (!pattern.empty() && (Matches(pattern, last) || Matches(pattern, linear))) return true;
    patterns.remove_prefix(std::min(comma + 1, patterns.size()));
  }
  return false;
}

int64_t NearestBlock(int64_t in_features, int64_t block) {
  if (block >= in_features) return in_features;
  int64_t higher = block, lower = block;
  while (in_features % higher != 0) ++higher;
  while (in_features % lower != 0) --lower;
  return block - lower <= higher - block ? lower : higher;
}

}  // namespace quantmill::oftq
