#include "host/worker/plugin_log.h"

#include <cstdio>

#include "absl/strings/str_cat.h"

namespace quantmill {
namespace {

constexpr int kEqualLines = 3;

}  // namespace

void PrintWarning(int32_t severity, const std::string& text) {
  if (severity >= 2) std::fprintf(stderr, "warning: %s\n", text.c_str());
}

void PluginLog::Line(const std::string& what, int32_t severity, const std::string& text) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const int count = ++counts_[text];
  if (count > kEqualLines) return;
  const char* end = count == kEqualLines ? " (more lines like this are not shown)" : "";
  sink_(severity, absl::StrCat(what, ": ", text, end));
}

}  // namespace quantmill
