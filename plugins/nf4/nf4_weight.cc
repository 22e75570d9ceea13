// Parameters and tensors of the format; what a call emits.
#include <cmath>
#include <cstdio>
#include <cstring>

#include "nf4.h"
#include "nf4_math.h"
#include "nf4_tiles.h"

namespace quantmill::nf4 {
namespace {

// In the order they are emitted; the last three are there only with double quantization.
constexpr const char* kNames[] = {"codes",         "absmax",          "codebook",
                                  "nested_absmax", "nested_codebook", "absmax_offset"};

struct Part {
  qm_dtype dtype;
  int64_t elements;
  const void* data;
};

// Null where there is none.
const qm_tensor* FindTensor(const qm_packed& packed, const char* name) {
  for (uint64_t i = 0; i < packed.tensor_count; ++i) {
    if (std::strcmp(packed.tensors[i].name, name) == 0) return &packed.tensors[i].tensor;
  }
  return nullptr;
}

qm_status ReadPart(qm_call* call, const qm_packed& packed, const char* name, Part* part) {
  const qm_tensor* found = FindTensor(packed, name);
  if (found == nullptr) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "codebook-absmax weight has no tensor '", name, "'");
  }
  if (found->dtype != part->dtype || found->rank != 1 || found->shape[0] != part->elements ||
      !IsContiguous(*found)) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "tensor '", name,
                    "' of a codebook-absmax weight must be ", part->dtype == QM_U8 ? "U8" : "F32",
                    " [", part->elements, "], contiguous");
  }
  part->data = found->data;
  return QM_OK;
}

qm_status CheckNames(qm_call* call, const qm_packed& packed, uint64_t expected) {
  for (uint64_t i = 0; i < packed.tensor_count; ++i) {
    bool known = false;
    for (uint64_t k = 0; k < expected; ++k) {
      known = known || std::strcmp(packed.tensors[i].name, kNames[k]) == 0;
    }
    if (known) continue;
    return qm::Fail(call, QM_INVALID_ARGUMENT, "codebook-absmax weight with parameters ",
                    packed.format_json, " has a tensor '", packed.tensors[i].name, "'");
  }
  if (packed.tensor_count == expected) return QM_OK;
  return qm::Fail(call, QM_INVALID_ARGUMENT, "codebook-absmax weight with parameters ",
                  packed.format_json, " has ", packed.tensor_count, " tensors; expected ",
                  expected);
}

qm_status CheckFinite(qm_call* call, const char* name, const float* data, int64_t count) {
  for (int64_t i = 0; data != nullptr && i < count; ++i) {
    if (std::isfinite(data[i])) continue;
    return qm::Fail(call, QM_INVALID_ARGUMENT, "element ", i, " of '", name,
                    "' is NaN or infinite; the file is damaged");
  }
  return QM_OK;
}

}  // namespace

bool ValidBlockSize(int64_t size) {
  return size >= kSmallestBlock && size <= kLargestBlock && (size & (size - 1)) == 0;
}

const char* DTypeText(qm_dtype dtype) {
  return dtype == QM_BF16 ? "bf16" : dtype == QM_F16 ? "f16" : "f32";
}

bool ParseParams(const char* json, Params* out, std::string* why) {
  const auto fail = [&](const char* reason) {
    *why = qm::StrCat("codebook-absmax parameters '", json, "': ", reason,
                      "; expected e.g. {\"block_size\":64,\"dtype\":\"bf16\",\"type\":\"nf4\"}");
    return false;
  };
  Params p;
  long long block = 0, nested = 0;
  char dtype[8] = {}, type[8] = {};
  int read = 0;
  if (std::sscanf(json, "{\"block_size\":%lld,\"dtype\":\"%7[a-z0-9]\",%n", &block, dtype, &read) !=
          2 ||
      read == 0) {
    return fail("not in canonical form");
  }
  const char* rest = json + read;
  read = 0;
  if (std::sscanf(rest, "\"nested_block_size\":%lld,%n", &nested, &read) == 1) rest += read;
  if (std::sscanf(rest, "\"type\":\"%7[a-z0-9]\"}", type) != 1) {
    return fail("not in canonical form");
  }
  p.block_size = block;
  p.nested_block_size = nested;
  if (!ValidBlockSize(block)) return fail("block_size must be a power of two from 32 to 4096");
  if (nested < 0 || nested > 1 << 20) return fail("nested_block_size must be positive");
  p.dtype = std::strcmp(dtype, "f32") == 0   ? QM_F32
            : std::strcmp(dtype, "f16") == 0 ? QM_F16
                                             : QM_BF16;
  p.fp4 = std::strcmp(type, "fp4") == 0;
  if (!p.fp4 && std::strcmp(type, "nf4") != 0) return fail("type must be nf4 or fp4");
  if (ParamsJson(p) != json) return fail("not in canonical form");
  *out = p;
  return true;
}

std::string ParamsJson(const Params& p) {
  return qm::StrCat(
      "{\"block_size\":", p.block_size, ",\"dtype\":\"", DTypeText(p.dtype), "\",",
      p.nested_block_size > 0 ? qm::StrCat("\"nested_block_size\":", p.nested_block_size, ",") : "",
      "\"type\":\"", p.fp4 ? "fp4" : "nf4", "\"}");
}

double BitsPerWeight(const Params& p, int64_t weights) {
  int64_t bits = 8 * ((weights + 1) / 2) + int64_t{32} * kCodebookSize;
  if (p.nested_block_size == 0) {
    bits += 32 * p.Blocks(weights);
  } else {
    bits += 8 * p.Blocks(weights) + 32 * (p.NestedBlocks(weights) + kByteCodebookSize + 1);
  }
  return static_cast<double>(bits) / static_cast<double>(weights);
}

namespace {

// Ranges, values and offset of double quantization.
qm_status ReadNested(qm_call* call, const qm_packed& packed, Weight* w) {
  Part range = {QM_F32, w->params.NestedBlocks(w->weights()), nullptr};
  Part values = {QM_F32, kByteCodebookSize, nullptr}, offset = {QM_F32, 1, nullptr};
  QM_TRY(ReadPart(call, packed, "nested_absmax", &range));
  QM_TRY(ReadPart(call, packed, "nested_codebook", &values));
  QM_TRY(ReadPart(call, packed, "absmax_offset", &offset));
  w->nested_absmax = static_cast<const float*>(range.data);
  w->nested_codebook = static_cast<const float*>(values.data);
  w->absmax_offset = static_cast<const float*>(offset.data);
  return QM_OK;
}

// Of a prepacked weight.
qm_status ReadTiles(qm_call* call, const qm_packed& packed, Weight* w) {
  const bool bytes = KeepsBytes(w->params);
  if (!TilesFit(w->params, w->in) || packed.tensor_count != (bytes ? 6u : 3u)) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "not a prepacked codebook-absmax weight");
  }
  const int64_t rows = TilesOf(w->out) * kTileOutputs;
  Part tiles = {QM_U8, rows * w->in / 2, nullptr};
  Part factors = {bytes ? QM_U8 : QM_F32, rows * (w->in / kChunkWeights), nullptr};
  Part codebook = {QM_F32, kCodebookSize, nullptr};
  QM_TRY(ReadPart(call, packed, "tiles", &tiles));
  QM_TRY(ReadPart(call, packed, "tile_absmax", &factors));
  QM_TRY(ReadPart(call, packed, "codebook", &codebook));
  w->tiles = static_cast<const uint8_t*>(tiles.data);
  w->codebook = static_cast<const float*>(codebook.data);
  if (bytes) {
    w->tile_absmax_byte = static_cast<const uint8_t*>(factors.data);
    return ReadNested(call, packed, w);
  }
  w->tile_absmax = static_cast<const float*>(factors.data);
  return QM_OK;
}

}  // namespace

qm_status ReadWeight(qm_call* call, const qm_packed& packed, bool prepacked, Weight* out) {
  if (std::strcmp(packed.format_id, kFormatId) != 0) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "weight has format '", packed.format_id,
                    "'; this plugin knows ", kFormatId);
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
  if (prepacked && FindTensor(packed, "tiles") != nullptr) {
    QM_TRY(ReadTiles(call, packed, &w));
    *out = w;
    return QM_OK;
  }
  const bool nested = w.params.nested_block_size > 0;
  QM_TRY(CheckNames(call, packed, nested ? 6 : 3));
  const int64_t n = w.weights();
  Part codes = {QM_U8, (n + 1) / 2, nullptr}, codebook = {QM_F32, kCodebookSize, nullptr};
  Part absmax = {nested ? QM_U8 : QM_F32, w.params.Blocks(n), nullptr};
  QM_TRY(ReadPart(call, packed, "codes", &codes));
  QM_TRY(ReadPart(call, packed, "absmax", &absmax));
  QM_TRY(ReadPart(call, packed, "codebook", &codebook));
  w.codes = static_cast<const uint8_t*>(codes.data);
  w.codebook = static_cast<const float*>(codebook.data);
  if (nested) {
    QM_TRY(ReadNested(call, packed, &w));
    w.absmax_byte = static_cast<const uint8_t*>(absmax.data);
  } else {
    w.absmax = static_cast<const float*>(absmax.data);
  }
  *out = w;
  return QM_OK;
}

qm_status CheckValues(qm_call* call, const Weight& w) {
  const int64_t n = w.weights();
  QM_TRY(CheckFinite(call, "codebook", w.codebook, kCodebookSize));
  QM_TRY(CheckFinite(call, "absmax", w.absmax, w.params.Blocks(n)));
  if (w.absmax != nullptr) return QM_OK;
  QM_TRY(CheckFinite(call, "nested_absmax", w.nested_absmax, w.params.NestedBlocks(n)));
  QM_TRY(CheckFinite(call, "nested_codebook", w.nested_codebook, kByteCodebookSize));
  return CheckFinite(call, "absmax_offset", w.absmax_offset, 1);
}

qm_status Emitter::Emit(const char* name, qm_device device, qm_dtype dtype, int64_t rows,
                        int64_t columns, qm_tensor* out) {
  if (count_ == kMaxTensors) return qm::Fail(call_, QM_INTERNAL, "too many tensors in one weight");
  const int64_t shape[2] = {rows, columns};
  QM_TRY(call_->emit(call_, 0, name, device, dtype, columns < 0 ? 1 : 2, shape, out));
  tensors_[count_].name = name;
  tensors_[count_].tensor = *out;
  ++count_;
  return QM_OK;
}

qm_status Emitter::EmitCopy(const char* name, qm_dtype dtype, int64_t elements, const void* data) {
  qm_tensor tensor = {};
  QM_TRY(Emit(name, kHost, dtype, elements, &tensor));
  std::memcpy(tensor.data, data, static_cast<size_t>(elements * qm::ElementSize(dtype)));
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

qm_status Emitter::FinishPacked(const Params& params, int64_t out_features, int64_t in_features,
                                qm_packed* packed) {
  qm_packed result = {};
  result.format_id = kFormatId;
  result.out_features = out_features;
  result.in_features = in_features;
  QM_TRY(qm::ScratchString(call_, ParamsJson(params), "the parameters", &result.format_json));
  QM_TRY(Finish(&result.tensors, &result.tensor_count));
  *packed = result;
  return QM_OK;
}

int64_t Elements(const qm_tensor& tensor) {
  int64_t elements = 1;
  for (int d = 0; d < tensor.rank; ++d) elements *= tensor.shape[d];
  return elements;
}

bool IsContiguous(const qm_tensor& tensor) {
  int64_t expected = 1;
  for (int d = tensor.rank - 1; d >= 0; --d) {
    if (tensor.shape[d] > 1 && tensor.stride[d] != expected) return false;
    expected *= tensor.shape[d];
  }
  return true;
}

}  // namespace quantmill::nf4
