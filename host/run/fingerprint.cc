#include "host/run/fingerprint.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"

namespace quantmill {
namespace {

constexpr int64_t kTileBytes = int64_t{1} << 20;
constexpr size_t kLanes = 4;
using TileHash = std::array<uint64_t, kLanes>;

// Odd constants with about as many ones as zeros (digits of the golden ratio and of sqrt 2, 3, 5).
constexpr TileHash kKeys = {0x9e3779b97f4a7c15, 0x6a09e667f3bcc909, 0xbb67ae8584caa73b,
                            0x3c6ef372fe94f82b};

// Both halves of the 128-bit product folded into one word.
uint64_t Fold(uint64_t a, uint64_t b) {
  const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

uint64_t Word(const char* bytes) {
  uint64_t word;
  std::memcpy(&word, bytes, sizeof(word));
  return word;
}

// Each lane takes every fourth pair of words. The rest is padded with zeros; the length goes in
// too.
TileHash HashTile(const char* data, int64_t bytes) {
  TileHash state = kKeys;
  constexpr int64_t kStride = int64_t{kLanes} * 16;
  auto absorb = [&state](const char* block) {
    for (size_t lane = 0; lane < kLanes; ++lane) {
      const uint64_t a = Word(block + lane * 16), b = Word(block + lane * 16 + 8);
      state[lane] = Fold(a ^ kKeys[lane], b ^ state[lane]) + a;
    }
  };
  int64_t at = 0;
  for (; at + kStride <= bytes; at += kStride) absorb(data + at);
  std::array<char, kStride> rest = {};
  if (at < bytes) std::memcpy(rest.data(), data + at, static_cast<size_t>(bytes - at));
  absorb(rest.data());
  for (uint64_t& lane : state) lane = Fold(lane ^ static_cast<uint64_t>(bytes), kKeys[0]) ^ lane;
  return state;
}

}  // namespace

void Fingerprint::Add(std::string_view text) {
  const uint64_t size = text.size();
  sha_.Update({reinterpret_cast<const char*>(&size), sizeof(size)});
  sha_.Update(text);
}

void Fingerprint::Add(const Tensor& tensor, ThreadPool& threads) {
  Add(absl::StrCat(AbslView(DTypeName(tensor.dtype())), tensor.shape().ToString()));
  const int64_t bytes = tensor.bytes();
  const int64_t tiles = (bytes + kTileBytes - 1) / kTileBytes;
  std::vector<TileHash> hashes(static_cast<size_t>(tiles));
  threads.ParallelFor(tiles, 4, [&](int64_t begin, int64_t end, int) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t offset = tile * kTileBytes;
      hashes[static_cast<size_t>(tile)] =
          HashTile(tensor.as<const char>() + offset, std::min(kTileBytes, bytes - offset));
    }
  });
  sha_.Update({reinterpret_cast<const char*>(hashes.data()), hashes.size() * sizeof(TileHash)});
}

std::string Fingerprint::Hex() { return sha_.HexDigest(); }

uint64_t SlotSeed(uint64_t run_seed, std::string_view stage, std::string_view slot) {
  Fingerprint fingerprint;
  fingerprint.Add(absl::StrCat(run_seed));
  fingerprint.Add(stage);
  fingerprint.Add(slot);
  return std::stoull(fingerprint.Hex().substr(0, 16), nullptr, 16);
}

}  // namespace quantmill
