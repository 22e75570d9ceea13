// Random numbers, the same from a seed on every machine.
#ifndef QUANTMILL_CORE_BASE_SPLIT_MIX_H_
#define QUANTMILL_CORE_BASE_SPLIT_MIX_H_

#include <cstdint>

namespace quantmill {

// SplitMix64 (Steele, Lea, Flood, OOPSLA 2014; constants of the reference implementation): output n
// is a bijective mix of seed + n * 0x9e3779b97f4a7c15.
class SplitMix64 {
 public:
  explicit SplitMix64(uint64_t seed) : state_(seed) {}
  uint64_t Next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  // Uniform in [0, 1): the upper 53 bits of Next().
  double NextUniform() { return static_cast<double>(Next() >> 11) * 0x1p-53; }

 private:
  uint64_t state_;
};

}  // namespace quantmill

#endif  // QUANTMILL_CORE_BASE_SPLIT_MIX_H_
