#include "sdk/check/elf_file.h"

#include <elf.h>
#include <string.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"

namespace quantmill::check {
namespace {

// The bytes of the file, every access checked.
class Bytes {
 public:
  explicit Bytes(std::string data) : data_(std::move(data)) {}

  // The nth T of a table at `offset`; false when it is not inside the file.
  template <typename T>
  bool Get(uint64_t offset, uint64_t nth, T* out) const {
    uint64_t begin = 0, end = 0;
    if (__builtin_mul_overflow(nth, sizeof(T), &begin) ||
        __builtin_add_overflow(begin, offset, &begin) ||
        __builtin_add_overflow(begin, sizeof(T), &end) || end > data_.size()) {
      return false;
    }
    memcpy(out, data_.data() + begin, sizeof(T));
    return true;
  }
  // The text at `offset`, up to its NUL.
  std::string Text(uint64_t offset) const {
    if (offset >= data_.size()) return "";
    return data_.substr(offset, data_.find('\0', offset) - offset);
  }

 private:
  std::string data_;
};

bool IsElf64(const Elf64_Ehdr& header) {
  return memcmp(header.e_ident, ELFMAG, SELFMAG) == 0 && header.e_ident[EI_CLASS] == ELFCLASS64 &&
         header.e_ident[EI_DATA] == ELFDATA2LSB && header.e_type == ET_DYN &&
         header.e_shentsize == sizeof(Elf64_Shdr);
}

bool IsVisible(const Elf64_Sym& symbol) {
  const int binding = ELF64_ST_BIND(symbol.st_info);
  const int visibility = ELF64_ST_VISIBILITY(symbol.st_other);
  return symbol.st_shndx != SHN_UNDEF && symbol.st_shndx != SHN_ABS && binding != STB_LOCAL &&
         (visibility == STV_DEFAULT || visibility == STV_PROTECTED);
}

// False when the table is cut short.
bool ReadSymbols(const Bytes& bytes, const Elf64_Shdr& table, const Elf64_Shdr& strings,
                 ElfFacts* facts) {
  for (uint64_t i = 0; i < table.sh_size / sizeof(Elf64_Sym); ++i) {
    Elf64_Sym symbol;
    if (!bytes.Get(table.sh_offset, i, &symbol)) return false;
    if (IsVisible(symbol)) {
      facts->exported.push_back(bytes.Text(strings.sh_offset + symbol.st_name));
    }
  }
  return true;
}

bool ReadDynamic(const Bytes& bytes, const Elf64_Shdr& table, const Elf64_Shdr& strings,
                 ElfFacts* facts) {
  for (uint64_t i = 0; i < table.sh_size / sizeof(Elf64_Dyn); ++i) {
    Elf64_Dyn entry;
    if (!bytes.Get(table.sh_offset, i, &entry)) return false;
    if (entry.d_tag == DT_FLAGS_1) facts->no_delete = (entry.d_un.d_val & DF_1_NODELETE) != 0;
    if (entry.d_tag == DT_NEEDED) {
      facts->needed.push_back(bytes.Text(strings.sh_offset + entry.d_un.d_val));
    }
  }
  return true;
}

}  // namespace

absl::StatusOr<ElfFacts> ReadElf(const std::string& path) {
  std::error_code error;
  if (!std::filesystem::is_regular_file(path, error)) {
    return absl::InvalidArgumentError(absl::StrCat(path, " is no file"));
  }
  std::ifstream file(path, std::ios::binary);
  const Bytes bytes(std::string(std::istreambuf_iterator<char>(file), {}));
  Elf64_Ehdr header;
  if (!bytes.Get(0, 0, &header) || !IsElf64(header)) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, " is no 64-bit little-endian ELF shared object"));
  }
  ElfFacts facts;
  for (uint64_t i = 0; i < header.e_shnum; ++i) {
    Elf64_Shdr section, strings;
    if (!bytes.Get(header.e_shoff, i, &section)) {
      return absl::InvalidArgumentError(absl::StrCat(path, " is cut short"));
    }
    if (section.sh_type != SHT_DYNSYM && section.sh_type != SHT_DYNAMIC) continue;
    const auto read = section.sh_type == SHT_DYNSYM ? ReadSymbols : ReadDynamic;
    if (!bytes.Get(header.e_shoff, section.sh_link, &strings) ||
        !read(bytes, section, strings, &facts)) {
      return absl::InvalidArgumentError(absl::StrCat(path, " is cut short"));
    }
  }
  std::sort(facts.exported.begin(), facts.exported.end());
  return facts;
}

}  // namespace quantmill::check
