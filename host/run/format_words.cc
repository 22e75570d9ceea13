#include "host/run/format_words.h"

namespace quantmill {

void FormatWords::Begin(const LoadedMethod& method, const std::string& function) {
  marked_ = words_ != nullptr && !words_->IsMarked();
  if (!marked_) return;
  nlohmann::json words = purpose_;
  words["plugin"] = method.method->id;
  words["version"] = method.method->version;
  words["path"] = method.path;
  words["function"] = function;
  words_->Begin(words);
}

void FormatWords::End() {
  if (marked_) words_->End();
  marked_ = false;
}

}  // namespace quantmill
