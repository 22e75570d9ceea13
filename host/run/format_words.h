// Last words of calls of formats and kernels: a check, dequantizing, a product.
#ifndef QUANTMILL_HOST_RUN_FORMAT_WORDS_H_
#define QUANTMILL_HOST_RUN_FORMAT_WORDS_H_

#include <string>
#include <string_view>
#include <utility>

#include "host/supervisor/last_words.h"
#include "host/worker/call_watch.h"
#include "nlohmann/json.hpp"

namespace quantmill {

class FormatWords : public CallWatch {
 public:
  // words: may be null; must outlive this.
  explicit FormatWords(LastWords* words) : words_(words) {}

  // Calls that a plugin's own call leads to (a run of the block) stay that call's.
  void Begin(const LoadedMethod& method, std::string_view function) override;
  void End() override;

 private:
  friend class FormatWordsScope;
  void SetPurpose(nlohmann::json purpose);

  LastWords* words_;
  bool marked_ = false;
  nlohmann::json purpose_ = nlohmann::json::object();
  // Of the last call: products are small and many, and nearly all of one kernel.
  const qm_method* method_ = nullptr;
  std::string function_, text_;
};

// For as long as it lives, calls are made for one result: `purpose` has the stage, the slot, its
// shape, the unit's key and the folder of the bundle, as far as there are. A crash is then that
// result's; without a purpose it is laid to the plugin alone.
class FormatWordsScope {
 public:
  // words: may be null.
  FormatWordsScope(FormatWords* words, nlohmann::json purpose) : words_(words) {
    if (words_ == nullptr) return;
    before_ = words_->purpose_;
    words_->SetPurpose(std::move(purpose));
  }
  ~FormatWordsScope() {
    if (words_ != nullptr) words_->SetPurpose(std::move(before_));
  }
  FormatWordsScope(const FormatWordsScope&) = delete;
  FormatWordsScope& operator=(const FormatWordsScope&) = delete;

 private:
  FormatWords* words_;
  nlohmann::json before_;
};

}  // namespace quantmill

#endif  // QUANTMILL_HOST_RUN_FORMAT_WORDS_H_
