#include "core/text/unicode.h"

#include <utf8proc.h>

#include <array>

namespace quantmill {
namespace {

// How many bytes at the start of `text` could begin a character, and whether they are a whole one.
struct Prefix {
  size_t length;
  bool whole;
};

Prefix ReadPrefix(std::string_view text) {
  const auto byte = [text](size_t i) { return static_cast<uint8_t>(text[i]); };
  const uint8_t lead = byte(0);
  if (lead < 0x80) return {1, true};
  if (lead < 0xC2 || lead > 0xF4) return {1, false};
  const size_t length = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  // Second bytes that would make an overlong form, a surrogate or a code point above U+10FFFF.
  const uint8_t low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
  const uint8_t high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
  for (size_t i = 1; i < length; ++i) {
    if (i >= text.size()) return {i, false};
    const bool fits = i == 1 ? byte(i) >= low && byte(i) <= high : (byte(i) & 0xC0) == 0x80;
    if (!fits) return {i, false};
  }
  return {length, true};
}

struct ByteAlphabet {
  std::array<std::string, 256> characters;
  std::array<int16_t, 512> bytes;  // by code point; -1 = none
};

const ByteAlphabet& Alphabet() {
  static const ByteAlphabet* const alphabet = [] {
    auto* table = new ByteAlphabet;
    table->bytes.fill(-1);
    char32_t next = 0x100;
    for (uint32_t byte = 0; byte < 256; ++byte) {
      const bool itself = (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte != 0xAD);
      const char32_t code_point = itself ? byte : next++;
      AppendUtf8(code_point, &table->characters[byte]);
      table->bytes[code_point] = static_cast<int16_t>(byte);
    }
    return table;
  }();
  return *alphabet;
}

}  // namespace

size_t CharacterLength(std::string_view text) {
  if (text.empty()) return 0;
  const Prefix prefix = ReadPrefix(text);
  return prefix.whole ? prefix.length : 0;
}

char32_t CodePoint(std::string_view character) {
  const auto bits = [character](size_t i) { return static_cast<uint8_t>(character[i]) & 0x3Fu; };
  const auto lead = static_cast<uint8_t>(character[0]);
  if (lead < 0x80) return lead;
  if (lead < 0xE0) return (lead & 0x1Fu) << 6 | bits(1);
  if (lead < 0xF0) return (lead & 0x0Fu) << 12 | bits(1) << 6 | bits(2);
  return (lead & 0x07u) << 18 | bits(1) << 12 | bits(2) << 6 | bits(3);
}

void AppendUtf8(char32_t code_point, std::string* out) {
  const auto put = [out](char32_t byte) { out->push_back(static_cast<char>(byte)); };
  if (code_point < 0x80) {
    put(code_point);
  } else if (code_point < 0x800) {
    put(0xC0 | code_point >> 6);
    put(0x80 | (code_point & 0x3F));
  } else if (code_point < 0x10000) {
    put(0xE0 | code_point >> 12);
    put(0x80 | (code_point >> 6 & 0x3F));
    put(0x80 | (code_point & 0x3F));
  } else {
    put(0xF0 | code_point >> 18);
    put(0x80 | (code_point >> 12 & 0x3F));
    put(0x80 | (code_point >> 6 & 0x3F));
    put(0x80 | (code_point & 0x3F));
  }
}

bool IsUtf8(std::string_view text) {
  while (!text.empty()) {
    const size_t length = CharacterLength(text);
    if (length == 0) return false;
    text.remove_prefix(length);
  }
  return true;
}

std::string LossyUtf8(std::string_view bytes) {
  if (IsUtf8(bytes)) return std::string(bytes);
  std::string text;
  while (!bytes.empty()) {
    const Prefix prefix = ReadPrefix(bytes);
    text += prefix.whole ? bytes.substr(0, prefix.length) : kReplacementCharacter;
    bytes.remove_prefix(prefix.length);
  }
  return text;
}

bool IsWhitespace(char32_t c) {
  return (c >= 0x9 && c <= 0xD) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F ||
         c == 0x3000;
}

bool IsWordCharacter(char32_t code_point) {
  switch (utf8proc_category(static_cast<utf8proc_int32_t>(code_point))) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_PC:
      return true;
    default:
      return code_point == 0x200C || code_point == 0x200D;  // Join_Control
  }
}

const std::string& ByteLevelCharacter(uint8_t byte) { return Alphabet().characters[byte]; }

std::optional<std::string> ByteLevelBytes(std::string_view token) {
  std::string bytes;
  while (!token.empty()) {
    const size_t length = CharacterLength(token);
    if (length == 0) return std::nullopt;
    const char32_t code_point = CodePoint(token.substr(0, length));
    if (code_point >= Alphabet().bytes.size() || Alphabet().bytes[code_point] < 0) {
      return std::nullopt;
    }
    bytes.push_back(static_cast<char>(Alphabet().bytes[code_point]));
    token.remove_prefix(length);
  }
  return bytes;
}

}  // namespace quantmill
