#include "core/io/ggml_blocks.h"

#include <array>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "core/tensor/dtype.h"

namespace quantmill {
namespace {

// gguf-py/gguf/constants.py, GGML_QUANT_SIZES.
constexpr std::array<GgmlTypeInfo, 32> kTypes = {{
    {0, "F32", 1, 4, true},          {1, "F16", 1, 2, true},
    {2, "Q4_0", 32, 18, true},       {3, "Q4_1", 32, 20, true},
    {6, "Q5_0", 32, 22, true},       {7, "Q5_1", 32, 24, true},
    {8, "Q8_0", 32, 34, true},       {9, "Q8_1", 32, 40, false},
    {10, "Q2_K", 256, 84, false},    {11, "Q3_K", 256, 110, false},
    {12, "Q4_K", 256, 144, true},    {13, "Q5_K", 256, 176, true},
    {14, "Q6_K", 256, 210, true},    {15, "Q8_K", 256, 292, false},
    {16, "IQ2_XXS", 256, 66, false}, {17, "IQ2_XS", 256, 74, false},
    {18, "IQ3_XXS", 256, 98, false}, {19, "IQ1_S", 256, 50, false},
    {20, "IQ4_NL", 32, 18, false},   {21, "IQ3_S", 256, 110, false},
    {22, "IQ2_S", 256, 82, false},   {23, "IQ4_XS", 256, 136, false},
    {24, "I8", 1, 1, false},         {25, "I16", 1, 2, false},
    {26, "I32", 1, 4, false},        {27, "I64", 1, 8, false},
    {28, "F64", 1, 8, false},        {29, "IQ1_M", 256, 56, false},
    {30, "BF16", 1, 2, true},        {34, "TQ1_0", 256, 54, false},
    {35, "TQ2_0", 256, 66, false},   {39, "MXFP4", 32, 17, false},
}};

uint16_t Bits16(const uint8_t* at) {
  uint16_t bits;
  std::memcpy(&bits, at, sizeof bits);
  return bits;
}

uint32_t Bits32(const uint8_t* at) {
  uint32_t bits;
  std::memcpy(&bits, at, sizeof bits);
  return bits;
}

float Half(const uint8_t* at) { return F16ToF32(Bits16(at)); }

// f16 d; 16 bytes: byte j holds code j below code j + 16.
void BlockQ4_0(const uint8_t* block, float* out) {
  const float d = Half(block);
  for (int j = 0; j < 16; ++j) {
    const int byte = block[2 + j];
    out[j] = static_cast<float>((byte & 15) - 8) * d;
    out[j + 16] = static_cast<float>((byte >> 4) - 8) * d;
  }
}

// f16 d, f16 m; codes as above.
void BlockQ4_1(const uint8_t* block, float* out) {
  const float d = Half(block), m = Half(block + 2);
  for (int j = 0; j < 16; ++j) {
    const int byte = block[4 + j];
    out[j] = static_cast<float>(byte & 15) * d + m;
    out[j + 16] = static_cast<float>(byte >> 4) * d + m;
  }
}

// f16 d; 32 fifth bits; low four bits as in Q4_0.
void BlockQ5_0(const uint8_t* block, float* out) {
  const float d = Half(block);
  const uint32_t high = Bits32(block + 2);
  for (int j = 0; j < 16; ++j) {
    const int byte = block[6 + j];
    const int low_code = (byte & 15) | static_cast<int>((high >> j & 1) << 4);
    const int high_code = (byte >> 4) | static_cast<int>((high >> (j + 16) & 1) << 4);
    out[j] = static_cast<float>(low_code - 16) * d;
    out[j + 16] = static_cast<float>(high_code - 16) * d;
  }
}

// f16 d, f16 m; 32 fifth bits; low four bits.
void BlockQ5_1(const uint8_t* block, float* out) {
  const float d = Half(block), m = Half(block + 2);
  const uint32_t high = Bits32(block + 4);
  for (int j = 0; j < 16; ++j) {
    const int byte = block[8 + j];
    const int low_code = (byte & 15) | static_cast<int>((high >> j & 1) << 4);
    const int high_code = (byte >> 4) | static_cast<int>((high >> (j + 16) & 1) << 4);
    out[j] = static_cast<float>(low_code) * d + m;
    out[j + 16] = static_cast<float>(high_code) * d + m;
  }
}

// f16 d; 32 signed bytes.
void BlockQ8_0(const uint8_t* block, float* out) {
  const float d = Half(block);
  for (int j = 0; j < 32; ++j) {
    out[j] = static_cast<float>(static_cast<int8_t>(block[2 + j])) * d;
  }
}

// 6-bit scale and minimum of sub-block j (get_scale_min_k4): the first four of each lie in bytes
// 0-3 and 4-7; of the last four the low bits lie in bytes 8-11, the high bits above those of the
// first.
void ScaleAndMinimum(const uint8_t* packed, int j, int* scale, int* minimum) {
  if (j < 4) {
    *scale = packed[j] & 63;
    *minimum = packed[j + 4] & 63;
  } else {
    *scale = (packed[j + 4] & 15) | (packed[j - 4] >> 6 << 4);
    *minimum = (packed[j + 4] >> 4) | (packed[j] >> 6 << 4);
  }
}

// f16 d, f16 dmin, 12 bytes of scales, and 5 bits: 32 bytes with a fifth bit per sub-block; then
// 128 bytes: each 32 hold the low bits of one sub-block below those of the next.
void BlockQ4Or5_K(const uint8_t* block, bool five, float* out) {
  const float d = Half(block), dmin = Half(block + 2);
  const uint8_t* high = five ? block + 16 : nullptr;
  const uint8_t* low = block + (five ? 48 : 16);
  for (int sub = 0; sub < 8; ++sub) {
    int scale = 0, minimum = 0;
    ScaleAndMinimum(block + 4, sub, &scale, &minimum);
    const float ds = d * static_cast<float>(scale), dm = dmin * static_cast<float>(minimum);
    const uint8_t* bytes = low + int64_t{sub / 2} * 32;
    for (int j = 0; j < 32; ++j) {
      int code = sub % 2 == 0 ? bytes[j] & 15 : bytes[j] >> 4;
      if (five) code |= (high[j] >> sub & 1) << 4;
      out[sub * 32 + j] = ds * static_cast<float>(code) - dm;
    }
  }
}

// 128 bytes with the low four bits, 64 with the high two, 16 signed scales, f16 d.
void BlockQ6_K(const uint8_t* block, float* out) {
  const float d = Half(block + 208);
  for (int64_t half = 0; half < 2; ++half) {
    const uint8_t* low = block + half * 64;
    const uint8_t* high = block + 128 + half * 32;
    const uint8_t* scales = block + 192 + half * 8;
    float* values = out + half * 128;
    for (int quarter = 0; quarter < 4; ++quarter) {
      for (int j = 0; j < 32; ++j) {
        const int byte = low[quarter % 2 * 32 + j];
        const int nibble = quarter < 2 ? byte & 15 : byte >> 4;
        const int code = (nibble | (high[j] >> (2 * quarter) & 3) << 4) - 32;
        const auto scale = static_cast<int8_t>(scales[quarter * 2 + j / 16]);
        values[quarter * 32 + j] = d * static_cast<float>(scale) * static_cast<float>(code);
      }
    }
  }
}

void DequantizeBlock(GgmlType type, const uint8_t* block, float* out) {
  switch (type) {
    case GgmlType::kF32:
      std::memcpy(out, block, sizeof(float));
      break;
    case GgmlType::kF16:
      *out = Half(block);
      break;
    case GgmlType::kBF16:
      *out = BF16ToF32(Bits16(block));
      break;
    case GgmlType::kQ4_0:
      BlockQ4_0(block, out);
      break;
    case GgmlType::kQ4_1:
      BlockQ4_1(block, out);
      break;
    case GgmlType::kQ5_0:
      BlockQ5_0(block, out);
      break;
    case GgmlType::kQ5_1:
      BlockQ5_1(block, out);
      break;
    case GgmlType::kQ8_0:
      BlockQ8_0(block, out);
      break;
    case GgmlType::kQ4_K:
      BlockQ4Or5_K(block, /*five=*/false, out);
      break;
    case GgmlType::kQ5_K:
      BlockQ4Or5_K(block, /*five=*/true, out);
      break;
    case GgmlType::kQ6_K:
      BlockQ6_K(block, out);
      break;
  }
}

}  // namespace

const GgmlTypeInfo* FindGgmlType(int32_t type) {
  for (const GgmlTypeInfo& info : kTypes) {
    if (info.type == type) return &info;
  }
  return nullptr;
}

const GgmlTypeInfo* FindGgmlType(std::string_view name) {
  for (const GgmlTypeInfo& info : kTypes) {
    if (info.name == name) return &info;
  }
  return nullptr;
}

std::string ReadableGgmlTypes() {
  std::string names;
  for (const GgmlTypeInfo& info : kTypes) {
    if (info.readable) absl::StrAppend(&names, names.empty() ? "" : ", ", std::string(info.name));
  }
  return names;
}

void DequantizeGgml(const GgmlTypeInfo& type, const void* data, int64_t count, float* out) {
  const auto* block = static_cast<const uint8_t*>(data);
  for (int64_t i = 0; i < count; ++i) {
    DequantizeBlock(static_cast<GgmlType>(type.type), block + i * type.bytes, out + i * type.block);
  }
}

}  // namespace quantmill
