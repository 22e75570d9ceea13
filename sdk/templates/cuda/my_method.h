// What the CPU and the GPU do alike, one group and one word of codes at a time.
#pragma once

#include "quantmill/sdk/affine_int.hpp"

namespace my_method_plugin {

// One linear: weight [out, in] with contiguous rows, and where its result goes.
struct Job {
  qm::AffineShape shape;
  qm::TensorView<const float> weight;
  qm::AffineTensors out;
  QM_HD int64_t words() const { return qm::AffineWordsPerRow(shape.in_features, shape.rule.bits); }
};

// Scale and zero point for the n weights of a group: code q stands for scale * (q - zero).
QM_HD inline qm::AffineGroup ChooseGroup(const float* w, int64_t n, const qm::AffineRule& rule) {
  float low = w[0], high = w[0];
  for (int64_t i = 1; i < n; ++i) low = fminf(low, w[i]), high = fmaxf(high, w[i]);
  qm::WidenRange(rule.symmetric, &low, &high);
  return qm::GroupForRange(low, high, rule);
}

// Writes scale and zero point of group g of a row.
QM_HD inline void QuantizeGroup(const Job& job, int64_t row, int64_t g) {
  const int64_t width = job.shape.group_width(), at = row * job.shape.groups() + g;
  const qm::AffineGroup group = ChooseGroup(job.weight.row(row) + g * width, width, job.shape.rule);
  qm::StoreScale(job.out.scale.data, job.shape.rule.scale_dtype, at, group.scale);
  static_cast<uint8_t*>(job.out.zero.data)[at] = static_cast<uint8_t>(group.zero);
}

// Writes 32 bits of a row's codes, once its groups are known. Code i has bits * i bits before it.
QM_HD inline void QuantizeWord(const Job& job, int64_t row, int64_t word) {
  const qm::AffineShape& shape = job.shape;
  const int64_t bits = shape.rule.bits, begin = word * 32;
  uint32_t value = 0;
  for (int64_t i = begin / bits; i < shape.in_features && i * bits < begin + 32; ++i) {
    const int64_t at = row * shape.groups() + i / shape.group_width();
    const qm::AffineGroup group = {
        qm::LoadScale(job.out.scale.data, shape.rule.scale_dtype, at),
        static_cast<float>(static_cast<const uint8_t*>(job.out.zero.data)[at])};
    const uint32_t code =
        static_cast<uint32_t>(qm::EncodeAffine(job.weight(row, i), group, shape.rule.max_code()));
    const int64_t shift = i * bits - begin;  // negative for a code begun in the word before
    value |= shift >= 0 ? code << shift : code >> -shift;
  }
  static_cast<uint32_t*>(job.out.codes.data)[row * job.words() + word] = value;
}

qm_status QuantizeCuda(qm_call* call, const Job& job);

}  // namespace my_method_plugin
