// Checkpoint layout of hqq: hqq/core/bitpack.py (packing), hqq/core/utils.py (encoding of fields),
// HQQLinear.state_dict in hqq/core/quantize.py (names).
//
// Wq is the matrix of codes read as [out in / g, g] (axis 1) or [g, out in / g] (axis 0): the same
// flat order. It is packed along its rows R: row r is field r / (R / P) of packed row r mod (R /
// P), first field in the highest bits. 3 bits: 10 fields per I32 from bit 27 down, rows padded to a
// multiple of 10.
#include <cmath>
#include <cstring>
#include <string_view>
#include <vector>

#include "affine.h"

namespace affine {
namespace {

struct Packing {
  const char* name;
  int bits;
  int fields;  // per element of W_q
  int top;     // shift of the first field
  qm_dtype dtype;
};
constexpr Packing kPackings[] = {{"8bit_u8", 8, 1, 0, QM_U8},
                                 {"4bit_u8", 4, 2, 4, QM_U8},
                                 {"3bit_32", 3, 10, 27, QM_I32},
                                 {"2bit_u8", 2, 4, 6, QM_U8},
                                 {"1bit_u8", 1, 8, 7, QM_U8}};

const Packing& PackingOf(int bits) {
  for (const Packing& packing : kPackings) {
    if (packing.bits == bits) return packing;
  }
  return kPackings[0];
}

// Shape of Wq and of what it is packed into.
struct Layout {
  int64_t rows, columns, packed_rows;
};

Layout LayoutOf(const Packing& packing, int axis, int64_t group, int64_t weights) {
  const int64_t rows = axis == 1 ? weights / group : group;
  return {rows, weights / rows, (rows + packing.fields - 1) / packing.fields};
}

template <class Word>
void Pack(const std::vector<uint8_t>& codes, const Packing& packing, const Layout& layout,
          Word* out) {
  std::memset(out, 0, static_cast<size_t>(layout.packed_rows * layout.columns) * sizeof(Word));
  for (int64_t r = 0; r < layout.rows; ++r) {
    const int field = static_cast<int>(r / layout.packed_rows);
    const int shift = packing.top - packing.bits * field;
    Word* row = out + r % layout.packed_rows * layout.columns;
    const uint8_t* from = codes.data() + r * layout.columns;
    for (int64_t c = 0; c < layout.columns; ++c) {
      row[c] = static_cast<Word>(row[c] | static_cast<Word>(from[c]) << shift);
    }
  }
}

template <class Word>
void Unpack(const Word* packed, const Packing& packing, const Layout& layout,
            std::vector<uint8_t>* codes) {
  const uint32_t mask = (1u << packing.bits) - 1;
  for (int64_t r = 0; r < layout.rows; ++r) {
    const int field = static_cast<int>(r / layout.packed_rows);
    const int shift = packing.top - packing.bits * field;
    const Word* row = packed + r % layout.packed_rows * layout.columns;
    for (int64_t c = 0; c < layout.columns; ++c) {
      (*codes)[r * layout.columns + c] =
          static_cast<uint8_t>((static_cast<uint32_t>(row[c]) >> shift) & mask);
    }
  }
}

const char* TorchName(qm_dtype dtype) {
  return dtype == QM_F16 ? "torch.float16" : dtype == QM_BF16 ? "torch.bfloat16" : "torch.float32";
}

// ---- fields ------------------------------------------------------------------------------------
qm_status EmitFlag(Emitter* emitter, const char* name, bool value) {
  qm_tensor t;
  QM_TRY(emitter->Emit(name, kHost, QM_U8, {}, &t));
  *static_cast<uint8_t*>(t.data) = value ? 1 : 0;
  return QM_OK;
}

qm_status EmitInt(Emitter* emitter, const char* name, int64_t value) {
  qm_tensor t;
  QM_TRY(emitter->Emit(name, kHost, QM_I32, {}, &t));
  *static_cast<int32_t*>(t.data) = static_cast<int32_t>(value);
  return QM_OK;
}

qm_status EmitText(Emitter* emitter, const char* name, std::string_view text) {
  qm_tensor t;
  QM_TRY(emitter->Emit(name, kHost, QM_U8, {static_cast<int64_t>(text.size())}, &t));
  std::memcpy(t.data, text.data(), text.size());
  return QM_OK;
}

// A scalar of any of the types hqq encodes; false if there is none.
bool ReadScalar(const qm_named_tensor* tensors, uint64_t count, const char* name, double* out) {
  const qm_tensor* t = FindTensor(tensors, count, name);
  if (t == nullptr || Bytes(*t) != qm::ElementSize(t->dtype)) return false;
  switch (t->dtype) {
    case QM_U8:
      *out = *static_cast<const uint8_t*>(t->data);
      return true;
    case QM_I32:
      *out = *static_cast<const int32_t*>(t->data);
      return true;
    case QM_I64:
      *out = static_cast<double>(*static_cast<const int64_t*>(t->data));
      return true;
    case QM_F32:
      *out = *static_cast<const float*>(t->data);
      return true;
    default:
      return false;
  }
}

qm_status NeedScalar(qm_call* call, const char* layer, const qm_named_tensor* tensors,
                     uint64_t count, const char* name, double* out) {
  if (ReadScalar(tensors, count, name, out)) return QM_OK;
  return qm::Fail(call, QM_INVALID_ARGUMENT, "layer ", layer, " has no number '", name, "'");
}

// What the fields of a layer say.
struct Fields {
  int bits = 0;  // of the packing: 5 and 6 are stored as 8, 1.58 as 2
  int axis = 1;
  int64_t group = 0, out = 0, in = 0;
};

qm_status ReadFields(qm_call* call, const char* layer, const qm_named_tensor* tensors,
                     uint64_t count, Fields* f) {
  for (const char* name : {"view_as_float", "quant_scale", "quant_zero"}) {
    double value = 0;
    if (ReadScalar(tensors, count, name, &value) && value != 0) {
      return qm::Fail(call, QM_UNIMPLEMENTED, "layer ", layer, " has '", name,
                      "' set, which is not supported; write the file again without it");
    }
  }
  double bits = 0, axis = 0, group = 0;
  QM_TRY(NeedScalar(call, layer, tensors, count, "nbits", &bits));
  QM_TRY(NeedScalar(call, layer, tensors, count, "axis", &axis));
  QM_TRY(NeedScalar(call, layer, tensors, count, "group_size", &group));
  f->bits = bits == 5 || bits == 6 ? 8 : std::fabs(bits - 1.58) < 1e-3 ? 2 : static_cast<int>(bits);
  if (f->bits != 8 && !(f->bits >= 1 && f->bits <= 4)) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "layer ", layer, " has nbits ", bits,
                    "; 8, 6, 5, 4, 3, 2, 1.58 and 1 are known");
  }
  if (axis != 0 && axis != 1) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "layer ", layer, " has axis ", axis);
  }
  const qm_tensor* shape = FindTensor(tensors, count, "shape");
  if (shape == nullptr || shape->dtype != QM_I64 || shape->rank != 1 || shape->shape[0] != 2) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "layer ", layer, " has no 'shape' of two I64");
  }
  f->axis = static_cast<int>(axis);
  f->group = static_cast<int64_t>(group);
  f->out = static_cast<const int64_t*>(shape->data)[0];
  f->in = static_cast<const int64_t*>(shape->data)[1];
  constexpr int64_t kMost = int64_t{1} << 31;
  if (f->out < 1 || f->in < 1 || f->out >= kMost || f->in >= kMost || f->group < 1) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "layer ", layer, " has shape [", f->out, ", ", f->in,
                    "] and group_size ", f->group, "; they must be positive");
  }
  const int64_t grouped = f->axis == 1 ? f->in : f->out;
  if (grouped % f->group != 0) {
    return qm::Fail(call, QM_UNIMPLEMENTED, "layer ", layer, " has groups of ", f->group,
                    " that cross rows of ", grouped);
  }
  return QM_OK;
}

// Scales or zero points: contiguous floats, one per group.
qm_status NeedGroups(qm_call* call, const char* layer, const qm_named_tensor* tensors,
                     uint64_t count, const char* name, const Fields& f, const qm_tensor** out) {
  const qm_tensor* t = FindTensor(tensors, count, name);
  if (t == nullptr) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "layer ", layer, " has no tensor '", name, "'");
  }
  const int64_t groups = f.out * f.in / f.group;
  const bool floats = t->dtype == QM_F16 || t->dtype == QM_BF16 || t->dtype == QM_F32;
  if (!floats || !IsContiguous(*t) || t->rank != 2 || t->shape[f.axis] != 1 ||
      t->shape[1 - f.axis] != groups) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "tensor '", name, "' of layer ", layer,
                    " must hold a float for each of ", groups, " groups along axis ", 1 - f.axis);
  }
  *out = t;
  return QM_OK;
}

qm_status NeedCodes(qm_call* call, const char* layer, const qm_named_tensor* tensors,
                    uint64_t count, const Packing& packing, const Layout& layout,
                    const qm_tensor** out) {
  const qm_tensor* t = FindTensor(tensors, count, "W_q");
  if (t == nullptr || t->dtype != packing.dtype || t->rank != 2 || !IsContiguous(*t) ||
      t->shape[0] != layout.packed_rows || t->shape[1] != layout.columns ||
      (packing.bits != 3 && layout.rows % packing.fields != 0)) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "tensor 'W_q' of layer ", layer, " must be ",
                    packing.dtype == QM_U8 ? "U8 [" : "I32 [", layout.packed_rows, ", ",
                    layout.columns, "] for its nbits, shape and group_size");
  }
  *out = t;
  return QM_OK;
}

}  // namespace

qm_status HqqStorable(qm_call* call, const Params& p, int64_t out, int64_t in) {
  if (p.zero != Zero::kFloat || p.q8_scale) {
    return qm::Fail(call, QM_FAILED_PRECONDITION, "hqq files hold scales and zero points as ",
                    "floats; quantize with hqq (without quantize_scale and quantize_zero), or ",
                    "export as quantmill");
  }
  const int64_t grouped = p.axis == 1 ? in : out;
  const int64_t group = p.group_size == -1 ? grouped : p.group_size;
  if (group < 1 || grouped % group != 0) {
    return qm::Fail(call, QM_FAILED_PRECONDITION, "group_size ", group, " does not divide ",
                    grouped);
  }
  const Packing& packing = PackingOf(p.bits);
  const Layout layout = LayoutOf(packing, p.axis, group, out * in);
  if (p.bits != 3 && layout.rows % packing.fields != 0) {
    return qm::Fail(call, QM_FAILED_PRECONDITION, "hqq files with ", p.bits, " bits need ",
                    p.axis == 1 ? "a number of groups" : "a group_size", " in multiples of ",
                    packing.fields, "; this linear [", out, ", ", in, "] has ", layout.rows,
                    "; change group_size or export as quantmill");
  }
  return QM_OK;
}

qm_status ToHqq(qm_call* call, const char* layer, const Weight& w, Emitter* emitter,
                std::string* config) {
  if (w.group_index != nullptr) {
    return qm::Fail(call, QM_FAILED_PRECONDITION, "layer ", layer, " has a group_index, which hqq ",
                    "files cannot hold; export as quantmill");
  }
  if (w.zero_dtype != w.scale_dtype) {
    return qm::Fail(call, QM_FAILED_PRECONDITION, "layer ", layer,
                    " has scales and zero points of ",
                    "different dtypes; hqq files hold both in one; export as quantmill");
  }
  const Packing& packing = PackingOf(w.params.bits);
  const int axis = w.params.axis;
  const Layout layout = LayoutOf(packing, axis, w.group_size, w.out * w.in);
  const int64_t groups = w.scale_rows() * w.scale_columns();
  std::vector<uint8_t> codes(w.out * w.in);
  for (int64_t o = 0; o < w.out; ++o) {
    UnpackCodes(w.codes + o * w.words, w.in, w.params.bits, codes.data() + o * w.in);
  }
  qm_tensor packed, scale, zero, shape;
  QM_TRY(emitter->Emit("W_q", kHost, packing.dtype, {layout.packed_rows, layout.columns}, &packed));
  if (packing.dtype == QM_U8) {
    Pack(codes, packing, layout, static_cast<uint8_t*>(packed.data));
  } else {
    Pack(codes, packing, layout, static_cast<uint32_t*>(packed.data));
  }
  const int64_t rows = axis == 1 ? groups : 1, columns = axis == 1 ? 1 : groups;
  QM_TRY(emitter->Emit("scale", kHost, w.scale_dtype, {rows, columns}, &scale));
  QM_TRY(emitter->Emit("zero", kHost, w.zero_dtype, {rows, columns}, &zero));
  std::memcpy(scale.data, w.scale, static_cast<size_t>(Bytes(scale)));
  std::memcpy(zero.data, w.zero, static_cast<size_t>(Bytes(zero)));
  QM_TRY(emitter->Emit("shape", kHost, QM_I64, {2}, &shape));
  static_cast<int64_t*>(shape.data)[0] = w.out;
  static_cast<int64_t*>(shape.data)[1] = w.in;
  QM_TRY(EmitInt(emitter, "nbits", w.params.bits));
  QM_TRY(EmitInt(emitter, "group_size", w.group_size));
  QM_TRY(EmitInt(emitter, "axis", axis));
  QM_TRY(EmitText(emitter, "packing", packing.name));
  QM_TRY(EmitText(emitter, "unpack_view_dtype",
                  packing.dtype == QM_U8 ? "torch.uint8" : "torch.int32"));
  QM_TRY(EmitText(emitter, "compute_dtype", TorchName(w.scale_dtype)));
  for (const char* name : {"view_as_float", "quant_scale", "quant_zero", "offload_meta"}) {
    QM_TRY(EmitFlag(emitter, name, false));
  }
  for (const char* name :
       {"channel_wise", "optimize", "encoded_state_dict", "stores_quant_config"}) {
    QM_TRY(EmitFlag(emitter, name, true));
  }
  QM_TRY(EmitFlag(emitter, "round_zero", w.params.bits == 4));
  *config = qm::StrCat("{\"axis\":", axis, ",\"group_size\":", w.group_size,
                       ",\"nbits\":", w.params.bits, "}");
  return QM_OK;
}

qm_status FromHqq(qm_call* call, const char* layer, const qm_named_tensor* tensors, uint64_t count,
                  qm_packed* out) {
  Fields f;
  QM_TRY(ReadFields(call, layer, tensors, count, &f));
  const Packing& packing = PackingOf(f.bits);
  const Layout layout = LayoutOf(packing, f.axis, f.group, f.out * f.in);
  const qm_tensor *packed = nullptr, *scale = nullptr, *zero = nullptr;
  QM_TRY(NeedCodes(call, layer, tensors, count, packing, layout, &packed));
  QM_TRY(NeedGroups(call, layer, tensors, count, "scale", f, &scale));
  QM_TRY(NeedGroups(call, layer, tensors, count, "zero", f, &zero));

  std::vector<uint8_t> unpacked(f.out * f.in);
  if (packing.dtype == QM_U8) {
    Unpack(static_cast<const uint8_t*>(packed->data), packing, layout, &unpacked);
  } else {
    Unpack(static_cast<const uint32_t*>(packed->data), packing, layout, &unpacked);
  }
  const int64_t whole = f.axis == 1 ? f.in : f.out;
  const Params params = {f.bits, f.group == whole ? -1 : f.group, Zero::kFloat, f.axis, false};
  const int64_t rows = f.axis == 1 ? f.out : f.out / f.group;
  const int64_t columns = f.axis == 1 ? f.in / f.group : f.in;
  const int64_t words = qm::AffineWordsPerRow(f.in, f.bits);
  Emitter emitter(call);
  qm_tensor codes, own_scale, own_zero;
  QM_TRY(emitter.Emit("codes", kHost, QM_I32, {f.out, words}, &codes));
  for (int64_t o = 0; o < f.out; ++o) {
    for (int64_t k = 0; k < words; ++k) {
      static_cast<uint32_t*>(codes.data)[o * words + k] =
          qm::PackWord(unpacked.data() + o * f.in, f.in, f.bits, k);
    }
  }
  QM_TRY(emitter.Emit("scale", kHost, scale->dtype, {rows, columns}, &own_scale));
  QM_TRY(emitter.Emit("zero", kHost, zero->dtype, {rows, columns}, &own_zero));
  std::memcpy(own_scale.data, scale->data, static_cast<size_t>(Bytes(*scale)));
  std::memcpy(own_zero.data, zero->data, static_cast<size_t>(Bytes(*zero)));
  return emitter.FinishPacked(ParamsJson(params), f.out, f.in, out);
}

}  // namespace affine
