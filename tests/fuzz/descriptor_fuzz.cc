// A plugin's descriptor with one method: any texts and types are accepted or refused, and what is
// accepted survives the way through JSON. The input is a list of texts, each ended by a zero byte:
// vendor, license, id, version, summary, then name, default, choices, doc and type of each option.
#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include "host/plugins/catalog.h"
#include "host/plugins/descriptor.h"

namespace {

const void* NoTables(const qm_method*, const char*) noexcept { return nullptr; }

// An empty text stands for NULL.
const char* TextOrNull(const std::string& text) { return text.empty() ? nullptr : text.c_str(); }

std::vector<std::string> SplitAtZeros(const uint8_t* data, size_t size) {
  std::vector<std::string> texts(1);
  for (size_t i = 0; i < size; ++i) {
    if (data[i] == 0) {
      texts.emplace_back();
    } else {
      texts.back() += static_cast<char>(data[i]);
    }
  }
  return texts;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  constexpr size_t kHead = 5, kPerOption = 5;
  std::vector<std::string> texts = SplitAtZeros(data, size);
  if (texts.size() < kHead) texts.resize(kHead);
  std::vector<qm_option> options;
  for (size_t i = kHead; i + kPerOption <= texts.size(); i += kPerOption) {
    options.push_back(
        {TextOrNull(texts[i]), TextOrNull(texts[i + 1]), TextOrNull(texts[i + 2]),
         TextOrNull(texts[i + 3]),
         static_cast<qm_option_type>(texts[i + 4].empty() ? 0 : texts[i + 4][0] - '0'), 0});
  }
  qm_method method = {};
  method.struct_size = sizeof(method);
  method.id = TextOrNull(texts[2]);
  method.version = TextOrNull(texts[3]);
  method.summary = TextOrNull(texts[4]);
  method.options = options.data();
  method.option_count = options.size();
  method.ext = NoTables;
  const qm_method* methods[] = {&method};
  qm_plugin plugin = {};
  plugin.struct_size = sizeof(plugin);
  plugin.abi_major = QM_ABI_MAJOR;
  plugin.abi_minor = QM_ABI_MINOR;
  plugin.method_count = 1;
  plugin.methods = methods;
  plugin.vendor = TextOrNull(texts[0]);
  plugin.license = TextOrNull(texts[1]);

  if (!quantmill::CheckDescriptor(&plugin).ok()) return 0;
  const nlohmann::json json = quantmill::ToJson(quantmill::DescriptorInfo(plugin));
  const auto parsed = nlohmann::json::parse(json.dump());  // throws if a text was not UTF-8
  const auto info = quantmill::PluginInfoFromJson(parsed);
  if (!info.ok() || quantmill::ToJson(*info) != json) std::abort();
  return 0;
}
