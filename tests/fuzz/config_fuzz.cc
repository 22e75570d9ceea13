// config.json: any text is accepted or refused, and an accepted configuration is consistent.
#include <cstdint>
#include <cstdlib>

#include "core/io/json.h"
#include "core/model/config.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const auto json = quantmill::ParseOrderedJson(text, "input");
  if (!json.ok()) return 0;
  const auto config = quantmill::ParseModelConfig(*json);
  if (!config.ok()) return 0;
  const auto layers = static_cast<size_t>(config->layers);
  if (config->heads % config->kv_heads != 0 || config->head_dim % 2 != 0 ||
      config->sliding_window.size() != layers || config->moe_layer.size() != layers) {
    std::abort();
  }
  return 0;
}
