// What bitsandbytes 0.50.2 (its CPU backend, torch 2.15.0) makes of the weights of OracleWeights().
#ifndef QUANTMILL_PLUGINS_NF4_NF4_VECTORS_H_
#define QUANTMILL_PLUGINS_NF4_NF4_VECTORS_H_

#include <cmath>
#include <cstdint>
#include <vector>

namespace nf4_vectors {

inline constexpr int64_t kRows = 3, kColumns = 150;

// Sums of four 16-bit numbers, exact in f32; every 61st is 8 times as large, and weights 64 to 127
// are 0.
inline std::vector<float> OracleWeights() {
  std::vector<float> out;
  uint32_t state = 1;
  for (int i = 0; i < kRows * kColumns; ++i) {
    int k = -131070;
    for (int j = 0; j < 4; ++j) {
      state = state * 1664525u + 1013904223u;
      k += static_cast<int>(state >> 16);
    }
    if (i % 61 == 7) k *= 8;
    out.push_back(i >= 64 && i < 128 ? 0.0f : std::ldexp(static_cast<float>(k), -19));
  }
  return out;
}

struct Vector {
  bool fp4;
  int block_size;
  const char* codes;  // bytes of quantize_4bit in hex
};

inline constexpr Vector kVectors[] = {
    {false, 32,
     "552cb05e9eb357175de95ae2a328adb06aac2623a2c7ce06b40b67d61a876af87777777777777777"
     "7777777777777777777777777777777777777777777777775f966a56877d64c752b778293cb66539"
     "de587776736a22568474a996880788e3a16c30637991d3457689494a9dbd497b757697a999b57576"
     "4865966a777f67747f8d3451eae96965289bc9165456c6af66964d6c421dd7bd078545c43a468a43"
     "787ad3883e486d1610ef2c121eebd720777977987697678779787087658887558ab276cf64b24287"
     "d67138a068eaba7276776676778866796707576887667778af"},
    {false, 64,
     "652cb05e9eb357175cd959e2a328adb06aac2623a2c7ce06b40b67d61a876af87777777777777777"
     "7777777777777777777777777777777777777777777777775f966a56877d64c752b778293cb66539"
     "bc6877777578446685759886782788c5846953757884a566777868688a9a6879757697a999b57576"
     "4865966a777f67747f8d4451d9e86965289bc9265556c6af66964d6c421dd7bd078545c43a468a43"
     "77788677696778575599686659988765777977987697678779787087658887557886778976866677"
     "877667857798877676776676778866796707576887667778af"},
    {true, 32,
     "eed54be2624ce1b9e526e62a7cd6724b9775d9dd7a5942b94cb4e159a71197310000000000000000"
     "000000000000000000000000000000000000000000000000e369e6e96195ec51fa4116a6c5499ed6"
     "52e698199c97ddee1c9f766e11b1162c7ae5dbed966a2cfe1916c6f76545f6141e196176664e9e19"
     "c69e69971993e99f1315ccfa2726969ed66456aeffee5973ee69f2e5cda25142b96ffe5cd7fe17fc"
     "81175c16c2f1e5a9bb23d5adb22459db999699661969916996161b619e1669ee674d1e53ec4dfd19"
     "2e9ac17be627461d1e999e991911ee16e9b9e9911999999173"},
    {true, 64,
     "eed54be2624ce1a9e526e62d7cd6724b9775d9dd7a5942b94cb4e159a71197310000000000000000"
     "000000000000000000000000000000000000000000000000e369e6e96195ec51fa4116a6c5499ed6"
     "45e198199e96cce91e0e616911d1115f6f96ec9e911f7ee91911e1e61766e1161e196176664e9e19"
     "c69e69971993e99f1315ccea2626969ed66456aeefee4973ee69f2e5cda25142b96ffe5cd7fe17fc"
     "81116911969196e9ee66e6eee66160ee999699661969916996161b619e1669ee111e1916991e9e19"
     "699e911e9161118e1e999e991911ee16e9b9e9911999999173"},
};

// With blocks of 64.
inline constexpr float kAbsmax64[] = {0x1.57f4000000000p-3f, 0x0.0p+0f,
                                      0x1.5c28000000000p-2f, 0x1.240a000000000p-1f,
                                      0x1.53d7000000000p-3f, 0x1.74d4000000000p-1f,
                                      0x1.a3fc000000000p-1f, 0x1.30cc000000000p-4f};

// nf4, blocks of 32, compress_statistics=True.
inline constexpr char kNestedBytes[] = "3a3b2626c23e4fdf393b38f339ff2f";
inline constexpr float kNestedAbsmax = 0x1.1f15p-1f;
inline constexpr float kAbsmaxOffset = 0x1.09cep-2f;
// FNV-1a (64 bits) of the bytes of create_dynamic_map().
inline constexpr uint64_t kByteCodebookHash = 1722390163627782934u;

}  // namespace nf4_vectors

#endif  // QUANTMILL_PLUGINS_NF4_NF4_VECTORS_H_
