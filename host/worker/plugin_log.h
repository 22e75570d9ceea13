// Log lines of plugin calls on their way to people.
#ifndef QUANTMILL_HOST_WORKER_PLUGIN_LOG_H_
#define QUANTMILL_HOST_WORKER_PLUGIN_LOG_H_

#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <string>

namespace quantmill {

// severity: 0 debug, 1 info, 2 warning.
using LogSink = std::function<void(int32_t severity, const std::string& text)>;

// Warnings to stderr, the rest nowhere.
void PrintWarning(int32_t severity, const std::string& text);

// Passes on the first few of equal lines: a mixture of experts can give thousands that differ in
// the layer's name only. Thread-safe.
class PluginLog {
 public:
  explicit PluginLog(LogSink sink) : sink_(std::move(sink)) {}

  // A line of the call named `what` (CallSettings::what).
  void Line(const std::string& what, int32_t severity, const std::string& text);

 private:
  LogSink sink_;
  std::mutex mutex_;
  std::map<std::string, int> counts_;  // of equal texts
};

}  // namespace quantmill

#endif  // QUANTMILL_HOST_WORKER_PLUGIN_LOG_H_
