// Runs conformance cases, each in a process of its own with a time limit, and says how they ended.
#ifndef QUANTMILL_SDK_CHECK_RUNNER_H_
#define QUANTMILL_SDK_CHECK_RUNNER_H_

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"
#include "sdk/check/case.h"

namespace quantmill::check {

struct CheckRequest {
  std::string plugin;                      // file to check
  std::vector<std::string> other_plugins;  // files whose formats and kernels the cases may use
  std::string only;                        // regular expression on case names; empty = all
  std::string device = "cpu";              // auto, cpu, cuda:N
  uint64_t seed = 1;
  bool slow = false;
  bool in_process = false;   // in this process, one after the other; the first crash ends it
  double limit_seconds = 0;  // of one case; 0 = the case's own
  std::string program;       // the quantmill binary that runs cases; empty: this one
};

struct CaseResult {
  std::string name;
  std::string method;  // "" for cases of the file or the whole plugin
  std::vector<std::string> rules;
  std::string asserts;
  Verdict verdict;
  double seconds = 0;
};

struct CheckReport {
  std::vector<CaseResult> results;
  std::string device;    // "cpu" or "cuda:N"; "" when no case came to ask
  std::string rejected;  // why the plugin does not load; cases of methods are missing then
  int Count(State state) const;
  // Every case passed, was skipped or warned.
  bool ok() const;
};

// Hands every result to `sink` as it comes (may be null). Errors: a file that is not there, a
// pattern that cannot be read or matches nothing (INVALID_ARGUMENT), a device that is not there
// (UNAVAILABLE), a process that cannot be started. What the plugin does is never an error.
absl::StatusOr<CheckReport> CheckPlugin(const CheckRequest& request,
                                        const std::function<void(const CaseResult&)>& sink);

// What the child process does: runs the case that `request` (JSON, written by CheckPlugin) names,
// writes its verdict to `descriptor` as one line of JSON and ends the process.
[[noreturn]] void RunCaseProcess(const nlohmann::json& request, int descriptor);

}  // namespace quantmill::check

#endif  // QUANTMILL_SDK_CHECK_RUNNER_H_
