// SHA-256 (FIPS 180-4).
#ifndef QUANTMILL_CORE_IO_SHA256_H_
#define QUANTMILL_CORE_IO_SHA256_H_

#include <array>
#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace quantmill {

class Sha256 {
 public:
  void Update(std::string_view bytes);
  // 64 lower-case hexadecimal digits. Call once, last.
  std::string HexDigest();

 private:
  void Compress(const uint8_t* block);

  std::array<uint32_t, 8> state_ = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                    0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<uint8_t, 64> pending_ = {};
  size_t pending_size_ = 0;
  uint64_t total_ = 0;
};

std::string Sha256Hex(std::string_view bytes);
// Streams the file; errors as ReadFile.
absl::StatusOr<std::string> Sha256OfFile(const std::string& path);

}  // namespace quantmill

#endif  // QUANTMILL_CORE_IO_SHA256_H_
