// Progress and warnings of a run on stderr.
#ifndef QUANTMILL_HOST_CLI_CONSOLE_H_
#define QUANTMILL_HOST_CLI_CONSOLE_H_

#include "host/cli/progress.h"
#include "host/supervisor/process.h"

namespace quantmill {

class Console {
 public:
  // For the events of RunJob; the console must outlive it.
  EventSink Sink() {
    return [this](const nlohmann::json& event) { Handle(event); };
  }
  // Takes the progress line away, so that other text can be written.
  void Clear() { line_.Clear(); }

 private:
  void Handle(const nlohmann::json& event);

  ProgressLine line_;
};

}  // namespace quantmill

#endif  // QUANTMILL_HOST_CLI_CONSOLE_H_
