// NF4 and FP4 on the CPU: the reference of nf4.cu.
//
//   1. per block of the flat weight: absmax, codes; two codes a byte, the first in the high half
//   2. with double quantization: offset = mean of the factors; per 256 factors their range and
//   bytes
//
// A thread takes whole blocks: no two threads write one byte, since blocks are of even size.
#include <algorithm>
#include <vector>

#include "nf4.h"
#include "nf4_math.h"
#include "quantmill/sdk/affine_int.hpp"

#if defined(__x86_64__)
#define QM_FLATTEN_AVX2 __attribute__((target("avx2"), flatten))
#endif

namespace quantmill::nf4 {
namespace {

// Weights a thread takes at once: a cache's worth, a multiple of every block size.
constexpr int64_t kGrainWeights = 64 * kLargestBlock;

// The flat weight; rows may lie apart.
struct FlatWeight {
  qm::TensorView<const float> view;
  int64_t columns;
  bool contiguous;

  // Weights [begin, begin + count), in `room` where they do not lie together.
  const float* Piece(int64_t begin, int64_t count, float* room) const {
    if (contiguous) return view.data() + begin;
    for (int64_t done = 0; done < count;) {
      const int64_t row = (begin + done) / columns, column = (begin + done) % columns;
      const int64_t part = std::min(columns - column, count - done);
      std::copy_n(view.row(row) + column, part, room + done);
      done += part;
    }
    return room;
  }
};

// Largest magnitude; `bad` becomes true if a weight is NaN or infinite.
inline float BlockAbsmax(const float* w, int64_t count, bool* bad) {
  constexpr int kLanes = 16;
  float largest[kLanes] = {}, finite[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) {
      const float m = Magnitude(w[i + l]);
      largest[l] = m > largest[l] ? m : largest[l];
      finite[l] += w[i + l] - w[i + l];  // 0, or NaN for what is not finite
    }
  }
  for (int l = 0; i + l < count; ++l) {
    const float m = Magnitude(w[i + l]);
    largest[l] = m > largest[l] ? m : largest[l];
    finite[l] += w[i + l] - w[i + l];
  }
  float result = 0.0f, sum = 0.0f;
  for (int l = 0; l < kLanes; ++l) {
    result = largest[l] > result ? largest[l] : result;
    sum += finite[l];
  }
  *bad = *bad || !(sum == 0.0f);
  return result;
}

// An odd last weight is followed by a weight 0.
template <bool kFp4>
inline void EncodeBlock(const float* w, int64_t count, float inverse, uint8_t* codes) {
  int64_t i = 0;
  for (; i + 2 <= count; i += 2) {
    const uint32_t high = Encode(w[i] * inverse, kFp4);
    const uint32_t low = Encode(w[i + 1] * inverse, kFp4);
    codes[i / 2] = static_cast<uint8_t>(high << 4 | low);
  }
  if (i < count) {
    const uint32_t low = kFp4 ? kFp4Zero : kNf4Zero;
    codes[i / 2] = static_cast<uint8_t>(Encode(w[i] * inverse, kFp4) << 4 | low);
  }
}

// Blocks of weights [0, count); false if a weight is not finite.
template <bool kFp4>
inline bool EncodePiece(const float* w, int64_t count, int64_t block_size, float* absmax,
                        uint8_t* codes) {
  bool bad = false;
  for (int64_t begin = 0; begin < count; begin += block_size) {
    const int64_t size = std::min(block_size, count - begin);
    const float largest = BlockAbsmax(w + begin, size, &bad);
    absmax[begin / block_size] = largest;
    EncodeBlock<kFp4>(w + begin, size, InverseAbsmax(largest), codes + begin / 2);
  }
  return !bad;
}

using PieceEncoder = bool (*)(const float*, int64_t, int64_t, float*, uint8_t*);

#if defined(QM_FLATTEN_AVX2)
template <bool kFp4>
QM_FLATTEN_AVX2 bool EncodePieceAvx2(const float* w, int64_t count, int64_t block_size,
                                     float* absmax, uint8_t* codes) {
  return EncodePiece<kFp4>(w, count, block_size, absmax, codes);
}
#endif

PieceEncoder EncoderFor(bool fp4) {
#if defined(QM_FLATTEN_AVX2)
  if (__builtin_cpu_supports("avx2")) return fp4 ? &EncodePieceAvx2<true> : &EncodePieceAvx2<false>;
#endif
  return fp4 ? &EncodePiece<true> : &EncodePiece<false>;
}

qm_status EncodeWeights(qm_call* call, const Params& p, const FlatWeight& weight, int64_t n,
                        float* absmax, uint8_t* codes) {
  const PieceEncoder encode = EncoderFor(p.fp4);
  const int64_t pieces = (n + kGrainWeights - 1) / kGrainWeights;
  return qm::ParallelFor(call, pieces, 1, [&](int64_t first, int64_t last, int32_t) -> qm_status {
    std::vector<float> room(weight.contiguous ? 0 : kGrainWeights);
    for (int64_t piece = first; piece < last; ++piece) {
      const int64_t begin = piece * kGrainWeights, count = std::min(kGrainWeights, n - begin);
      QM_TRY(qm::Progress(call, static_cast<double>(begin) / static_cast<double>(n)));
      const float* w = weight.Piece(begin, count, room.data());
      if (encode(w, count, p.block_size, absmax + begin / p.block_size, codes + begin / 2)) {
        continue;
      }
      const int64_t bad = begin + qm::FirstNotFinite(w, count);
      return qm::NotFinite(call, bad / weight.columns, bad % weight.columns);
    }
    return QM_OK;
  });
}

float Mean(const float* x, int64_t n) {
  double lane[kMeanLanes] = {};
  for (int64_t i = 0; i < n; ++i) lane[i % kMeanLanes] += static_cast<double>(x[i]);
  for (int half = kMeanLanes / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
  }
  return static_cast<float>(lane[0] / static_cast<double>(n));
}

qm_status EncodeFactors(qm_call* call, const Params& p, const float* absmax, int64_t blocks,
                        const Result& out) {
  const float offset = Mean(absmax, blocks);
  static_cast<float*>(out.absmax_offset.data)[0] = offset;
  const float* codebook = ByteCodebook();
  const int64_t nested = (blocks + p.nested_block_size - 1) / p.nested_block_size;
  return qm::ParallelFor(call, nested, 64, [&](int64_t first, int64_t last, int32_t) {
    for (int64_t j = first; j < last; ++j) {
      const int64_t begin = j * p.nested_block_size;
      const int64_t end = std::min(blocks, begin + p.nested_block_size);
      float range = 0.0f;
      for (int64_t i = begin; i < end; ++i) {
        range = std::max(range, Magnitude(absmax[i] - offset));
      }
      static_cast<float*>(out.nested_absmax.data)[j] = range;
      for (int64_t i = begin; i < end; ++i) {
        static_cast<uint8_t*>(out.absmax.data)[i] =
            EncodeAbsmax(codebook, absmax[i], offset, range);
      }
    }
    return QM_OK;
  });
}

}  // namespace

uint64_t CpuScratchBytes(const Params& p, int64_t weights) {
  return p.nested_block_size == 0 ? 0
                                  : static_cast<uint64_t>(p.Blocks(weights)) * sizeof(float) + 256;
}

qm_status QuantizeCpu(qm_call* call, const Params& p, qm::TensorView<const float> weight,
                      const Result& out) {
  FlatWeight flat = {weight, weight.shape(1), false};
  flat.contiguous = weight.shape(0) == 1 || weight.stride(0) == flat.columns;
  const int64_t n = weight.shape(0) * weight.shape(1), blocks = p.Blocks(n);
  float* absmax = static_cast<float*>(out.absmax.data);
  if (p.nested_block_size > 0) QM_TRY(qm::Scratch(call, kHost, blocks, "factors", &absmax));
  QM_TRY(EncodeWeights(call, p, flat, n, absmax, static_cast<uint8_t*>(out.codes.data)));
  if (p.nested_block_size == 0) return QM_OK;
  return EncodeFactors(call, p, absmax, blocks, out);
}

}  // namespace quantmill::nf4
