// UTF-8 and the alphabet of byte-level tokenizers.
#ifndef QUANTMILL_CORE_TEXT_UNICODE_H_
#define QUANTMILL_CORE_TEXT_UNICODE_H_

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace quantmill {

inline constexpr std::string_view kReplacementCharacter = "\xEF\xBF\xBD";  // U+FFFD

// Bytes of the well-formed character that `text` begins with; 0 if there is none.
size_t CharacterLength(std::string_view text);
// The code point of a well-formed character.
char32_t CodePoint(std::string_view character);
void AppendUtf8(char32_t code_point, std::string* out);
bool IsUtf8(std::string_view text);
// Every maximal ill-formed part becomes one U+FFFD (Unicode 15, section 3.9, table 3-8).
std::string LossyUtf8(std::string_view bytes);

bool IsWhitespace(char32_t code_point);  // property White_Space
bool IsWordCharacter(char32_t code_point);

// The character that stands for a byte in byte-level vocabularies: bytes 0x21-0x7E, 0xA1-0xAC and
// 0xAE-0xFF stand for themselves, the other 68 are U+0100, U+0101, ... in order
// (huggingface/tokenizers: tokenizers/src/pre_tokenizers/byte_level.rs).
const std::string& ByteLevelCharacter(uint8_t byte);
// The bytes a byte-level token stands for; nullopt if a character of it stands for none.
std::optional<std::string> ByteLevelBytes(std::string_view token);

}  // namespace quantmill

#endif  // QUANTMILL_CORE_TEXT_UNICODE_H_
