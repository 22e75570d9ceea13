// What every call of a method needs around it: views for the ABI, last words, statistics requests.
#ifndef QUANTMILL_HOST_RUN_CALL_PARTS_H_
#define QUANTMILL_HOST_RUN_CALL_PARTS_H_

#include "absl/status/statusor.h"
#include "core/calib/statistics.h"
#include "core/model/graph.h"
#include "host/run/method_runner.h"
#include "host/supervisor/last_words.h"
#include "nlohmann/json.hpp"
#include "quantmill/all.h"

namespace quantmill {

// Small arrays a result is described with, beyond what plan() asked for.
inline constexpr uint64_t kScratchSlack = 64 << 10;

// A slot as a plugin sees it; valid while `slot` lives.
class LinearInfoView {
 public:
  LinearInfoView(const LinearSlot& slot, DType weight_dtype, DType scale_dtype);
  const qm_linear_info* get() const { return &info_; }

 private:
  qm_linear_info info_;
};

// Those of the wanted statistics that were measured on an input group, by StatId, and the rows they
// were measured on. `stats` may be null. `single_original`: the only stream there is is the
// untouched model's.
std::vector<NamedTensor> MeasuredStatistics(const std::vector<SlotPlan::Stat>& wanted,
                                            int input_group, const Statistics* stats,
                                            bool single_original, int64_t* row_count);

// The same as a plugin sees them.
class StatisticsView {
 public:
  StatisticsView(const std::vector<SlotPlan::Stat>& wanted, int input_group,
                 const Statistics* stats, bool single_original);
  const qm_stats* get() const { return &stats_; }

 private:
  std::vector<NamedTensor> named_;
  std::vector<qm_named_tensor> items_;
  qm_stats stats_;
};

qm_tensor ReadOnlyView(const Tensor& tensor);

// Marks the last words for as long as it lives, or for good.
class LastWordsMark {
 public:
  LastWordsMark(LastWords* words, const nlohmann::json& text) : words_(words) {
    if (words_ != nullptr) words_->Begin(text);
  }
  ~LastWordsMark() {
    if (words_ != nullptr) words_->End();
  }
  LastWordsMark(const LastWordsMark&) = delete;
  LastWordsMark& operator=(const LastWordsMark&) = delete;
  void Keep() { words_ = nullptr; }

 private:
  LastWords* words_;
};

// A failed call may have taken the device with it: every later use of it would fail, so that this
// process ends and the call must still be known then.
absl::Status AfterFailure(const absl::Status& failure, Backend& backend, LastWordsMark& mark);

// What every call gets: texts, options, seed, signs of life to `words` (may be null), lines to
// `log`, which must outlive the call.
CallSettings SettingsOf(const std::string& what, const ResolvedOptions& options, uint64_t seed,
                        LastWords* words, PluginLog* log);

// A plan's requests. Those that are optional and not offered by this host are left out; others that
// are not give INVALID_ARGUMENT.
absl::StatusOr<std::vector<SlotPlan::Stat>> ReadStatRequests(const qm_quant_plan& plan,
                                                             int input_group);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_RUN_CALL_PARTS_H_
