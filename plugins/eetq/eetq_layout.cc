#include "eetq_layout.h"

namespace eetq {
namespace {

// visit(place in [out, in], place in the file) for every code.
template <class Visit>
void ForEachCode(int64_t out, int64_t in, Visit&& visit) {
  for (int64_t n = 0; n < out; ++n) {
    const int64_t base = n / 2 * 2 * in + n % 2 * 64;
    for (int64_t k = 0; k < in; ++k) {
      visit(n * in + k, base + k / 64 * 128 + k % 64 / 16 * 16 + k % 8 * 2 + k / 8 % 2);
    }
  }
}

}  // namespace

void ToEetqLayout(const uint8_t* codes, int64_t out, int64_t in, uint8_t* stored) {
  ForEachCode(out, in, [&](int64_t code, int64_t place) { stored[place] = codes[code] ^ 0x80; });
}

void FromEetqLayout(const uint8_t* stored, int64_t out, int64_t in, uint8_t* codes) {
  ForEachCode(out, in, [&](int64_t code, int64_t place) { codes[code] = stored[place] ^ 0x80; });
}

}  // namespace eetq
