// Calls of formats and kernels, told to whoever must name the one that a process does not survive.
#ifndef QUANTMILL_HOST_WORKER_CALL_WATCH_H_
#define QUANTMILL_HOST_WORKER_CALL_WATCH_H_

#include <string_view>

#include "host/plugins/registry.h"

namespace quantmill {

class CallWatch {
 public:
  virtual ~CallWatch() = default;
  // `function`: of which table, "format.check". One call at a time.
  virtual void Begin(const LoadedMethod& method, std::string_view function) = 0;
  virtual void End() = 0;
};

// Tells of a call for as long as it lives, or for good.
class WatchedCall {
 public:
  // watch: may be null.
  WatchedCall(CallWatch* watch, const LoadedMethod& method, std::string_view function)
      : watch_(watch) {
    if (watch_ != nullptr) watch_->Begin(method, function);
  }
  ~WatchedCall() {
    if (watch_ != nullptr) watch_->End();
  }
  WatchedCall(const WatchedCall&) = delete;
  WatchedCall& operator=(const WatchedCall&) = delete;
  // This process ends, and the call is why.
  void Keep() { watch_ = nullptr; }

 private:
  CallWatch* watch_;
};

}  // namespace quantmill

#endif  // QUANTMILL_HOST_WORKER_CALL_WATCH_H_
