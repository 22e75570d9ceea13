// The format on the CPU: parameters, checks, and unpacking of one row.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "affine_tiles.h"

namespace affine {
namespace {

constexpr const char* kZeroNames[] = {"none", "int", "float", "q8"};

const qm_tensor* Find(const qm_packed& packed, const char* name) {
  for (uint64_t i = 0; i < packed.tensor_count; ++i) {
    if (std::strcmp(packed.tensors[i].name, name) == 0) return &packed.tensors[i].tensor;
  }
  return nullptr;
}

std::string ShapeText(std::initializer_list<int64_t> shape) {
  std::string text = "[";
  for (int64_t extent : shape) {
    if (text.size() > 1) text += ", ";
    text += std::to_string(extent);
  }
  return text + "]";
}

qm_status CheckTensor(qm_call* call, const qm_tensor& tensor, const char* name,
                      std::initializer_list<int64_t> shape,
                      std::initializer_list<qm_dtype> dtypes) {
  bool known = false;
  for (qm_dtype dtype : dtypes) known = known || tensor.dtype == dtype;
  if (!known) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "tensor '", name, "' of an affine-int weight has ",
                    "dtype code ", tensor.dtype, ", which the format does not allow there");
  }
  bool same = tensor.rank == static_cast<int32_t>(shape.size());
  int axis = 0;
  for (int64_t extent : shape) {
    if (same && tensor.shape[axis++] != extent) same = false;
  }
  if (!same) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "tensor '", name, "' of an affine-int weight must ",
                    "have shape ", ShapeText(shape));
  }
  if (!IsContiguous(tensor)) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "tensor '", name, "' must be contiguous");
  }
  return QM_OK;
}

qm_status Required(qm_call* call, const qm_packed& packed, const char* name,
                   const qm_tensor** out) {
  *out = Find(packed, name);
  if (*out != nullptr) return QM_OK;
  return qm::Fail(call, QM_INVALID_ARGUMENT, "affine-int weight has no tensor '", name, "'");
}

// A tensor of scales or zero points with the range it needs when it is of bytes.
qm_status ReadGroupTensor(qm_call* call, const qm_packed& packed, const Weight& w, const char* name,
                          bool bytes, std::initializer_list<qm_dtype> dtypes, const qm_tensor** out,
                          const float** range) {
  const bool tiles = w.tiles != nullptr;
  const int64_t rows = tiles ? (w.out + kStripRows - 1) / kStripRows : w.scale_rows();
  const int64_t columns = tiles ? w.groups * kStripRows : w.scale_columns();
  QM_TRY(Required(call, packed, name, out));
  if (!bytes) return CheckTensor(call, **out, name, {rows, columns}, dtypes);
  if (tiles) return CheckTensor(call, **out, name, {rows, columns}, {QM_F32});
  QM_TRY(CheckTensor(call, **out, name, {rows, columns}, {QM_U8}));
  const bool of_scale = std::strcmp(name, "scale") == 0;
  const char* range_name = of_scale ? "scale_range" : "zero_range";
  const qm_tensor* tensor;
  QM_TRY(Required(call, packed, range_name, &tensor));
  const int64_t ranges = of_scale ? (rows * columns + kQ8Block - 1) / kQ8Block : 1;
  QM_TRY(CheckTensor(call, *tensor, range_name, {ranges, 2}, {QM_F32}));
  *range = static_cast<const float*>(tensor->data);
  return QM_OK;
}

// Scale and zero point in the format's own layout or for tiles.
qm_status ReadScaleZero(qm_call* call, const qm_packed& packed, Weight* w) {
  const std::initializer_list<qm_dtype> floats = {QM_F16, QM_BF16, QM_F32};
  const qm_tensor* tensor;
  QM_TRY(ReadGroupTensor(call, packed, *w, "scale", w->params.q8_scale, floats, &tensor,
                         &w->scale_range));
  w->scale = tensor->data;
  w->scale_dtype = tensor->dtype;
  if (w->params.zero == Zero::kNone) return QM_OK;
  if (w->params.zero == Zero::kInt) {
    QM_TRY(ReadGroupTensor(call, packed, *w, "zero", false, {QM_U8}, &tensor, nullptr));
  } else {
    QM_TRY(ReadGroupTensor(call, packed, *w, "zero", w->params.zero == Zero::kQ8, floats, &tensor,
                           &w->zero_range));
  }
  w->zero = tensor->data;
  w->zero_dtype = tensor->dtype;
  return QM_OK;
}

bool KnownTensor(const std::string& name, const Params& params, bool prepacked) {
  if (name == "codes" || name == "scale") return true;
  if (name == "zero") return params.zero != Zero::kNone;
  if (name == "scale_range") return params.q8_scale;
  if (name == "zero_range") return params.zero == Zero::kQ8;
  if (name == "group_index") return params.axis == 1;
  return prepacked && (name == "tiles" || name == "permutation");
}

qm_status CheckNames(qm_call* call, const qm_packed& packed, const Weight& w, bool prepacked) {
  for (uint64_t i = 0; i < packed.tensor_count; ++i) {
    const std::string name = packed.tensors[i].name;
    if (!KnownTensor(name, w.params, prepacked)) {
      return qm::Fail(call, QM_INVALID_ARGUMENT, "affine-int weight with parameters ",
                      packed.format_json, " has a tensor '", name, "'");
    }
    for (uint64_t j = 0; j < i; ++j) {
      if (name == packed.tensors[j].name) {
        return qm::Fail(call, QM_INVALID_ARGUMENT, "affine-int weight has two tensors '", name,
                        "'");
      }
    }
  }
  return QM_OK;
}

// Eight codes fill Bits whole bytes, whatever Bits is; words are little-endian, like the machine.
template <int Bits>
void UnpackStream(const int32_t* row, int64_t count, uint8_t* codes) {
  constexpr uint32_t kMask = (1u << Bits) - 1;
  const unsigned char* bytes = reinterpret_cast<const unsigned char*>(row);
  int64_t i = 0;
  for (; i + 8 <= count; i += 8, bytes += Bits) {
    uint64_t window = 0;
    std::memcpy(&window, bytes, Bits);
    for (int j = 0; j < 8; ++j) codes[i + j] = static_cast<uint8_t>((window >> (Bits * j)) & kMask);
  }
  // The rest lies within the words of the row: (count - i) * Bits bits, less than Bits bytes.
  uint64_t window = 0;
  std::memcpy(&window, bytes, static_cast<size_t>(((count - i) * Bits + 7) / 8));
  for (int j = 0; i + j < count; ++j) {
    codes[i + j] = static_cast<uint8_t>((window >> (Bits * j)) & kMask);
  }
}

}  // namespace

bool ParseParams(const char* json, Params* out, std::string* why) {
  const auto fail = [&](const char* reason) {
    *why = qm::StrCat("affine-int parameters '", json, "': ", reason,
                      "; expected e.g. {\"bits\":4,\"group_size\":128,\"zero\":\"int\"}");
    return false;
  };
  const char* rest = json;
  const auto take = [&](const char* text) {  // skips `text` if it comes next
    const size_t length = std::strlen(text);
    if (std::strncmp(rest, text, length) != 0) return false;
    rest += length;
    return true;
  };
  const bool axis0 = take("{\"axis\":0,");
  if (!axis0 && !take("{")) return fail("not in canonical form");
  long long group = 0;
  int bits = 0, read = 0;
  if (std::sscanf(rest, "\"bits\":%d,\"group_size\":%lld,%n", &bits, &group, &read) != 2 ||
      read == 0) {
    return fail("not in canonical form");
  }
  rest += read;
  const bool q8_scale = take("\"scale\":\"q8\",");
  char zero[8] = {};
  if (std::sscanf(rest, "\"zero\":\"%7[a-z0-9]\"}", zero) != 1)
    return fail("not in canonical form");
  if (bits != 1 && bits != 2 && bits != 3 && bits != 4 && bits != 8) {
    return fail("bits must be 1, 2, 3, 4 or 8");
  }
  if (group != -1 && group < 1) return fail("group_size must be -1 or positive");
  *out = {bits, group, Zero::kNone, axis0 ? 0 : 1, q8_scale};
  int kind = 0;
  while (kind < 4 && std::strcmp(zero, kZeroNames[kind]) != 0) ++kind;
  if (kind == 4) return fail("zero must be none, int, float or q8");
  out->zero = static_cast<Zero>(kind);
  if (bits == 1 && (out->zero == Zero::kNone || out->zero == Zero::kInt)) {
    return fail("1 bit needs zero float or q8");
  }
  if (ParamsJson(*out) != json) return fail("not in canonical form");
  return true;
}

std::string ParamsJson(const Params& params) {
  return qm::StrCat("{", params.axis == 0 ? "\"axis\":0," : "", "\"bits\":", params.bits,
                    ",\"group_size\":", params.group_size, ",",
                    params.q8_scale ? "\"scale\":\"q8\"," : "", "\"zero\":\"",
                    kZeroNames[static_cast<int>(params.zero)], "\"}");
}

qm_status ReadWeight(qm_call* call, const qm_packed& packed, bool prepacked, Weight* out) {
  if (std::strcmp(packed.format_id, qm::kAffineIntFormat) != 0) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "weight has format '", packed.format_id,
                    "'; this plugin knows ", qm::kAffineIntFormat);
  }
  Weight w;
  std::string why;
  if (!ParseParams(packed.format_json, &w.params, &why)) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, why);
  }
  w.out = packed.out_features;
  w.in = packed.in_features;
  if (w.out < 1 || w.in < 1) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "features [", w.out, ", ", w.in,
                    "] must be positive");
  }
  const int64_t grouped = w.params.axis == 1 ? w.in : w.out;
  if (w.params.group_size != -1 && grouped % w.params.group_size != 0) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "group_size ", w.params.group_size,
                    " does not divide ", w.params.axis == 1 ? "in_features " : "out_features ",
                    grouped, "; use a divisor or -1");
  }
  w.group_size = w.params.group_size == -1 ? grouped : w.params.group_size;
  w.groups = grouped / w.group_size;
  w.words = qm::AffineWordsPerRow(w.in, w.params.bits);
  QM_TRY(CheckNames(call, packed, w, prepacked));
  const qm_tensor* tensor = prepacked ? Find(packed, "tiles") : nullptr;
  if (tensor != nullptr) {
    w.tiles = static_cast<const uint32_t*>(tensor->data);
  } else {
    QM_TRY(Required(call, packed, "codes", &tensor));
    QM_TRY(CheckTensor(call, *tensor, "codes", {w.out, w.words}, {QM_I32}));
    w.codes = static_cast<const int32_t*>(tensor->data);
  }
  QM_TRY(ReadScaleZero(call, packed, &w));
  if ((tensor = Find(packed, "group_index")) != nullptr) {
    QM_TRY(CheckTensor(call, *tensor, "group_index", {w.in}, {QM_I32}));
    w.group_index = static_cast<const int32_t*>(tensor->data);
  }
  if (prepacked && (tensor = Find(packed, "permutation")) != nullptr) {
    QM_TRY(CheckTensor(call, *tensor, "permutation", {w.in}, {QM_I32}));
    w.permutation = static_cast<const int32_t*>(tensor->data);
  }
  *out = w;
  return QM_OK;
}

qm_status CheckValues(qm_call* call, const Weight& w) {
  const int64_t columns = w.scale_columns();
  for (int64_t i = 0; i < w.scale_rows() * columns; ++i) {
    const ScaleZero sz = LoadScaleZeroAt(w, i);
    if (!std::isfinite(sz.scale) || sz.scale <= 0) {
      return qm::Fail(call, QM_INVALID_ARGUMENT, "scale of row ", i / columns, ", group ",
                      i % columns, " is ", sz.scale, "; scales must be positive and finite");
    }
    const bool in_range = w.params.zero != Zero::kInt || sz.zero < (1 << w.params.bits);
    if (!std::isfinite(sz.zero) || !in_range) {
      return qm::Fail(call, QM_INVALID_ARGUMENT, "zero point of row ", i / columns, ", group ",
                      i % columns, " is ", sz.zero,
                      "; it must be finite and, if an integer, below ", 1 << w.params.bits);
    }
  }
  for (int64_t i = 0; w.group_index != nullptr && i < w.in; ++i) {
    if (w.group_index[i] < 0 || w.group_index[i] >= w.groups) {
      return qm::Fail(call, QM_INVALID_ARGUMENT, "group_index of channel ", i, " is ",
                      w.group_index[i], "; it must be 0..", w.groups - 1);
    }
  }
  const int used = static_cast<int>(w.in * w.params.bits - (w.words - 1) * 32);
  for (int64_t o = 0; used < 32 && o < w.out; ++o) {
    if (static_cast<uint32_t>(w.codes[(o + 1) * w.words - 1]) >> used != 0) {
      return qm::Fail(call, QM_INVALID_ARGUMENT, "codes of row ", o,
                      " have unused bits set; they must be 0");
    }
  }
  return QM_OK;
}

float LoadScalar(const void* data, qm_dtype dtype, int64_t index) {
  if (dtype == QM_U8) return static_cast<const uint8_t*>(data)[index];
  return qm::LoadScale(data, dtype, index);
}

ScaleZero LoadScaleZeroAt(const Weight& w, int64_t index) {
  ScaleZero sz = {LoadScalar(w.scale, w.scale_dtype, index), static_cast<float>(w.middle())};
  if (w.scale_range != nullptr) {
    const float* range = w.scale_range + index / kQ8Block * 2;
    sz.scale = range[1] + range[0] * sz.scale;
  }
  if (w.zero != nullptr) sz.zero = LoadScalar(w.zero, w.zero_dtype, index);
  if (w.zero_range != nullptr) sz.zero = w.zero_range[1] + w.zero_range[0] * sz.zero;
  return sz;
}

void UnpackCodes(const int32_t* row, int64_t count, int bits, uint8_t* codes) {
  switch (bits) {
    case 1:
      return UnpackStream<1>(row, count, codes);
    case 2:
      return UnpackStream<2>(row, count, codes);
    case 3:
      return UnpackStream<3>(row, count, codes);
    case 4:
      return UnpackStream<4>(row, count, codes);
    default:
      return UnpackStream<8>(row, count, codes);
  }
}

void DequantizeRow(const Weight& w, int64_t row, uint8_t* codes, float* out) {
  UnpackCodes(w.codes + row * w.words, w.in, w.params.bits, codes);
  if (w.params.axis == 0) {
    const int64_t first = row % w.groups * w.in;
    for (int64_t i = 0; i < w.in; ++i) {
      const ScaleZero sz = LoadScaleZeroAt(w, first + i);
      out[i] = sz.scale * (static_cast<float>(codes[i]) - sz.zero);
    }
    return;
  }
  if (w.group_index != nullptr) {
    for (int64_t i = 0; i < w.in; ++i) {
      const ScaleZero sz = LoadScaleZero(w, row, w.group_index[i]);
      out[i] = sz.scale * (static_cast<float>(codes[i]) - sz.zero);
    }
    return;
  }
  for (int64_t g = 0; g < w.groups; ++g) {
    const ScaleZero sz = LoadScaleZero(w, row, g);
    const int64_t end = (g + 1) * w.group_size;
    for (int64_t i = g * w.group_size; i < end; ++i) {
      out[i] = sz.scale * (static_cast<float>(codes[i]) - sz.zero);
    }
  }
}

bool SortByGroup(const int32_t* group_index, int64_t in, int64_t groups, int32_t* permutation) {
  const int64_t size = in / groups;
  std::vector<int64_t> filled(static_cast<size_t>(groups));
  for (int64_t i = 0; i < in; ++i) {
    const int64_t g = group_index[i];
    if (g < 0 || g >= groups || filled[g] == size) return false;
    permutation[g * size + filled[g]++] = static_cast<int32_t>(i);
  }
  return true;
}

qm_status Emitter::Emit(const char* name, qm_device device, qm_dtype dtype,
                        std::initializer_list<int64_t> shape, qm_tensor* out) {
  if (count_ == kMaxTensors) return qm::Fail(call_, QM_INTERNAL, "too many tensors in one weight");
  QM_TRY(call_->emit(call_, 0, name, device, dtype, static_cast<int32_t>(shape.size()),
                     shape.begin(), out));
  tensors_[count_].name = name;
  tensors_[count_].tensor = *out;
  ++count_;
  return QM_OK;
}

qm_status Emitter::EmitCopy(const char* name, const qm_tensor& source) {
  if (count_ == kMaxTensors) return qm::Fail(call_, QM_INTERNAL, "too many tensors in one weight");
  qm_tensor out;
  QM_TRY(call_->emit(call_, 0, name, kHost, source.dtype, source.rank, source.shape, &out));
  if (out.data != nullptr) std::memcpy(out.data, source.data, static_cast<size_t>(Bytes(source)));
  tensors_[count_].name = name;
  tensors_[count_].tensor = out;
  ++count_;
  return QM_OK;
}

qm_status Emitter::Finish(const qm_named_tensor** tensors, uint64_t* count) {
  qm_named_tensor* copy;
  QM_TRY(qm::Scratch(call_, kHost, count_, "the list of tensors", &copy));
  std::memcpy(copy, tensors_, static_cast<size_t>(count_) * sizeof *copy);
  *tensors = copy;
  *count = static_cast<uint64_t>(count_);
  return QM_OK;
}

qm_status Emitter::FinishPacked(const std::string& format_json, int64_t out_features,
                                int64_t in_features, qm_packed* packed) {
  const char* json;
  QM_TRY(qm::ScratchString(call_, format_json, "the parameters", &json));
  qm_packed result = {};
  result.format_id = qm::kAffineIntFormat;
  result.format_json = json;
  result.out_features = out_features;
  result.in_features = in_features;
  QM_TRY(Finish(&result.tensors, &result.tensor_count));
  *packed = result;
  return QM_OK;
}

int64_t Bytes(const qm_tensor& tensor) {
  int64_t elements = 1;
  for (int d = 0; d < tensor.rank; ++d) elements *= tensor.shape[d];
  return elements * qm::ElementSize(tensor.dtype);
}

bool IsContiguous(const qm_tensor& tensor) {
  int64_t expected = 1;
  for (int d = tensor.rank - 1; d >= 0; --d) {
    if (tensor.shape[d] > 1 && tensor.stride[d] != expected) return false;
    expected *= tensor.shape[d];
  }
  return true;
}

}  // namespace affine
