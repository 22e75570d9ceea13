#include "host/run/format_words.h"

#include <utility>

namespace quantmill {

void FormatWords::Begin(const LoadedMethod& method, std::string_view function) {
  marked_ = words_ != nullptr && !words_->IsMarked();
  if (!marked_) return;
  if (method_ != method.method || function_ != function) {
    method_ = method.method;
    function_ = function;
    nlohmann::json words = purpose_;
    words["plugin"] = method.method->id;
    words["version"] = method.method->version;
    words["path"] = method.path;
    words["function"] = function_;
    text_ = words.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  }
  words_->BeginWith(text_);
}

void FormatWords::End() {
  if (marked_) words_->End();
  marked_ = false;
}

void FormatWords::SetPurpose(nlohmann::json purpose) {
  purpose_ = std::move(purpose);
  method_ = nullptr;
}

}  // namespace quantmill
