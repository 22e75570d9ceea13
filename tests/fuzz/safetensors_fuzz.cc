// The header of a safetensors file: any bytes are accepted or refused, and accepted entries lie
// inside the file.
#include <cstdint>
#include <cstdlib>

#include "core/io/safetensors_reader.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  const auto header = quantmill::ParseSafetensorsHeader(bytes, size, "input");
  if (!header.ok()) return 0;
  for (const quantmill::SafetensorsEntry& entry : header->entries) {
    if (entry.end < entry.begin || header->data_begin + entry.end > size) std::abort();
  }
  return 0;
}
