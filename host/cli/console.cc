#include "host/cli/console.h"

#include <iostream>

namespace quantmill {

void Console::Handle(const nlohmann::json& event) {
  const std::string type = event.value("type", "");
  if (type == "progress") {
    ProgressState state;
    state.stage = event.value("stage", "");
    state.unit = event.value("unit", "");
    state.done = event.value("done", int64_t{0});
    state.total = event.value("total", int64_t{0});
    line_.Update(state);
  } else if (type == "log" && event.value("severity", 0) >= 2) {
    line_.Clear();
    std::cerr << "warning: " << event.value("text", "") << std::endl;
  }
}

}  // namespace quantmill
