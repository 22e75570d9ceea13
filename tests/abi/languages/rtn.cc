// Rounds to nearest, 8 bits per output row, through the C++ layer of the SDK. Built by every C++
// compiler at hand, each with its own QM_METHOD_ID.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <string_view>
#include <vector>

#include "quantmill/sdk/plugin.hpp"
#include "quantmill/sdk/tensor.hpp"

namespace {

constexpr char kFormat[] = "qm.fmt.affine-int/1";

struct Rtn {
  static qm_status Plan(qm_call*, const qm_linear_info&, qm_quant_plan* out) {
    out->scratch_bytes = 2 * sizeof(qm_named_tensor);
    out->format_id = kFormat;
    return QM_OK;
  }

  static qm_status Run(qm_call* call, const qm_linear_info& info, const qm_tensor& weight,
                       const qm_stats*, qm_packed* out) {
    const int64_t n = info.out_features, k = info.in_features, words = (k + 3) / 4;
    qm::TensorView<const float> w;
    QM_TRY(qm::ViewMatrix<float>(call, weight, "the weight", call->device, n, k, &w));
    const int64_t codes_shape[] = {n, words}, scale_shape[] = {n, 1};
    qm_tensor codes, scale;
    QM_TRY(call->emit(call, 0, "codes", call->device, QM_I32, 2, codes_shape, &codes));
    QM_TRY(call->emit(call, 0, "scale", call->device, QM_F32, 2, scale_shape, &scale));
    QM_TRY(qm::ParallelFor(call, n, 8, [&](int64_t begin, int64_t end, int32_t) -> qm_status {
      // A standard container, so that the C++ runtime is really used.
      std::vector<uint8_t> bytes(static_cast<size_t>(words) * 4);
      for (int64_t i = begin; i < end; ++i) {
        QM_TRY(qm::Progress(call, -1));
        const float* row = static_cast<const float*>(weight.data) + i * weight.stride[0];
        float top = 0;
        for (int64_t j = 0; j < k; ++j) top = std::max(top, std::fabs(row[j]));
        const float step = top > 0 ? top / 127.0f : 1.0f;
        static_cast<float*>(scale.data)[i] = step;
        for (int64_t j = 0; j < k; ++j) {
          bytes[static_cast<size_t>(j)] = static_cast<uint8_t>(std::lrint(row[j] / step) + 128);
        }
        std::memcpy(static_cast<uint8_t*>(codes.data) + i * words * 4, bytes.data(), bytes.size());
      }
      return QM_OK;
    }));
    qm_named_tensor* tensors;
    QM_TRY(qm::Scratch(call, {QM_CPU, 0}, 2, "the list of tensors", &tensors));
    tensors[0] = {"codes", codes};
    tensors[1] = {"scale", scale};
    *out = {kFormat, "{\"bits\":8,\"group_size\":-1,\"zero\":\"none\"}", tensors, 2, n, k};
    return QM_OK;
  }
};

constexpr qm_quantize_linear kQuantize = qm::QuantizeLinearTable<Rtn>::Make();
const void* Ext(const qm_method*, const char* id) noexcept {
  return std::string_view(id) == QM_EXT_QUANTIZE_LINEAR ? &kQuantize : nullptr;
}
constexpr qm_method kMethod = {sizeof(qm_method),       QM_METHOD_ID, "1.0.0",
                               "rounds rows",           nullptr,      0,
                               QM_METHOD_DETERMINISTIC, &Ext};
constexpr const qm_method* kMethods[] = {&kMethod};
constexpr qm_plugin kPlugin = {sizeof(qm_plugin), QM_ABI_MAJOR, QM_ABI_MINOR, 0,          1,
                               kMethods,          "example",    "Apache-2.0", __VERSION__};

}  // namespace

QM_PLUGIN_ENTRY(kPlugin)
