// tokenizer.json, and text through what was accepted. The text is what follows the first zero byte,
// or a fixed one.
#include <cstdint>
#include <cstdlib>

#include "core/text/tokenizer.h"
#include "core/text/unicode.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  const size_t zero = bytes.find('\0');
  const auto tokenizer = quantmill::Tokenizer::FromJson(bytes.substr(0, zero), "input");
  if (!tokenizer.ok()) return 0;
  const std::string_view text = zero == std::string_view::npos
                                    ? std::string_view(" Hello  w\xC3\xB6rld 123\n\xFF<s>")
                                    : bytes.substr(zero + 1);
  const auto ids = (*tokenizer)->Encode(text, /*add_special_tokens=*/true);
  if (!ids.ok()) return 0;
  const auto decoded = (*tokenizer)->Decode(*ids, /*skip_special=*/false);
  if (decoded.ok() && !quantmill::IsUtf8(*decoded)) std::abort();
  return 0;
}
