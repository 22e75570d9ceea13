#include "tests/core/checkpoint/test_model.h"

#include <cstring>
#include <functional>
#include <random>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/io/files.h"
#include "core/io/safetensors_writer.h"
#include "gtest/gtest.h"
#include "quantmill/all.h"
#include "quantmill/testing/fake_call.hpp"

extern "C" const qm_plugin* qm_plugin_entry_v1(void);

namespace quantmill::testing {
namespace {

using qm::testing::FakeCall;

constexpr char kConfig[] = R"({
  "zeta_first": "kept",
  "architectures": ["LlamaForCausalLM"],
  "model_type": "llama",
  "hidden_size": 64,
  "intermediate_size": 96,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 64,
  "rms_norm_eps": 1e-05,
  "vocab_size": 32,
  "tie_word_embeddings": false,
  "torch_dtype": "bfloat16"
})";

Tensor Random(DType dtype, const Shape& shape, std::mt19937* random) {
  std::normal_distribution<float> normal(0, 0.1f);
  Tensor tensor = *Tensor::Host(dtype, shape);
  for (int64_t i = 0; i < tensor.elements(); ++i) {
    if (dtype == DType::kBF16) tensor.as<uint16_t>()[i] = F32ToBF16(normal(*random));
    if (dtype == DType::kF16)
      tensor.as<uint16_t>()[i] = F32ToF16(0.01f + std::abs(normal(*random)));
  }
  return tensor;
}

const qm_format* Format() {
  const qm_method* method = qm_plugin_entry_v1()->methods[0];
  return static_cast<const qm_format*>(method->ext(method, QM_EXT_FORMAT));
}

absl::Status ToStatus(const FakeCall& call, qm_status code) {
  if (code == QM_OK) return absl::OkStatus();
  return absl::Status(static_cast<absl::StatusCode>(code), call.error());
}

std::vector<qm_named_tensor> Views(const std::vector<NamedTensor>& tensors) {
  std::vector<qm_named_tensor> views;
  for (const NamedTensor& named : tensors)
    views.push_back({named.name.c_str(), named.tensor.View()});
  return views;
}

std::vector<NamedTensor> Copies(const qm_named_tensor* tensors, uint64_t count) {
  std::vector<NamedTensor> copies;
  for (uint64_t i = 0; i < count; ++i) {
    const qm_tensor& t = tensors[i].tensor;
    Tensor copy = *Tensor::Host(static_cast<DType>(t.dtype),
                                Shape(absl::Span<const int64_t>(t.shape, t.rank)));
    std::memcpy(copy.data(), t.data, copy.bytes());
    copies.push_back({tensors[i].name, copy});
  }
  return copies;
}

}  // namespace

void WriteTestModel(const std::string& directory, DType dtype) {
  ASSERT_TRUE(WriteFile(directory + "/config.json", kConfig).ok());
  ASSERT_TRUE(WriteFile(directory + "/tokenizer.json", "{\"any\": 1}").ok());
  ASSERT_TRUE(WriteFile(directory + "/generation_config.json", "{}").ok());
  ASSERT_TRUE(WriteFile(directory + "/notes.txt", "not for copying").ok());
  const auto config = ReadModelConfig(directory);
  ASSERT_TRUE(config.ok()) << config.status();
  std::vector<TensorDeclaration> declarations;
  for (const TensorSpec& spec : RequiredTensors(*config)) {
    declarations.push_back({spec.name, dtype, spec.shape});
  }
  auto writer = CheckpointWriter::Create(directory, declarations);
  ASSERT_TRUE(writer.ok()) << writer.status();
  std::mt19937 random(5);
  for (const TensorDeclaration& d : declarations) {
    ASSERT_TRUE((*writer)->Write(d.name, Random(dtype, d.shape, &random)).ok());
  }
  ASSERT_TRUE((*writer)->Finish().ok());
}

absl::StatusOr<std::shared_ptr<const PackedWeight>> TestSource::Packed(const LinearSlot& slot) {
  if (++uses_[slot.name] == 2 && slot.name == fail_on_second_use) {
    return absl::DataLossError("the unit's file is gone");
  }
  if (dense.count(slot.name) > 0) return std::shared_ptr<const PackedWeight>();
  const auto found = params_of.find(slot.name);
  const AffineIntParams params = found == params_of.end() ? params_ : found->second;
  std::mt19937 random(static_cast<uint32_t>(std::hash<std::string>()(slot.name)));
  const int64_t groups = params.Groups(slot.in_features);
  Tensor codes = *Tensor::Host(DType::kU8, {slot.out_features, slot.in_features});
  for (int64_t i = 0; i < codes.elements(); ++i) {
    codes.as<uint8_t>()[i] = static_cast<uint8_t>(random() % (1u << params.bits));
  }
  Tensor zero, index;
  if (params.zero == AffineIntParams::Zero::kInt) {
    zero = *Tensor::Host(DType::kU8, {slot.out_features, groups});
    const uint32_t range = (1u << params.bits) - smallest_zero;
    for (int64_t i = 0; i < zero.elements(); ++i) {
      zero.as<uint8_t>()[i] = static_cast<uint8_t>(smallest_zero + random() % range);
    }
  }
  if (group_index) {
    std::vector<int32_t> values(slot.in_features);
    for (int64_t i = 0; i < slot.in_features; ++i) values[i] = static_cast<int32_t>(i % groups);
    index = Tensor::FromI32({slot.in_features}, values);
  }
  QM_ASSIGN_OR_RETURN(
      PackedWeight weight,
      MakeAffineInt(params, codes, Random(DType::kF16, {slot.out_features, groups}, &random), zero,
                    index));
  return std::make_shared<const PackedWeight>(std::move(weight));
}

absl::StatusOr<Tensor> TestSource::Changed(const std::string& tensor_name) {
  const auto found = changed.find(tensor_name);
  return found == changed.end() ? Tensor() : found->second;
}

absl::StatusOr<std::shared_ptr<PackedKernel>> AffineRegistry::Kernel(const PackedWeight&,
                                                                     Backend& backend) {
  return MakeReferencePackedKernel(backend);
}

absl::Status AffineRegistry::Check(const PackedWeight& weight) { return CheckAffineInt(weight); }

absl::Status AffineRegistry::CanStore(std::string_view target, std::string_view,
                                      std::string_view format_json, int64_t out_features,
                                      int64_t in_features) {
  FakeCall call;
  return ToStatus(call,
                  Format()->can_store(call.get(), std::string(target).c_str(),
                                      std::string(format_json).c_str(), out_features, in_features));
}

absl::StatusOr<FormatRegistry::Stored> AffineRegistry::ToCheckpoint(std::string_view target,
                                                                    std::string_view layer,
                                                                    const PackedWeight& weight) {
  FakeCall call;
  const std::vector<qm_named_tensor> views = Views(weight.tensors);
  const qm_packed packed = {
      weight.format_id.c_str(), weight.format_json.c_str(), views.data(), views.size(),
      weight.out_features,      weight.in_features};
  const qm_named_tensor* tensors = nullptr;
  uint64_t count = 0;
  const char* config = nullptr;
  QM_RETURN_IF_ERROR(ToStatus(call, Format()->to_checkpoint(call.get(), std::string(target).c_str(),
                                                            std::string(layer).c_str(), &packed,
                                                            &tensors, &count, &config)));
  return Stored{Copies(tensors, count), config};
}

absl::StatusOr<PackedWeight> AffineRegistry::FromCheckpoint(std::string_view target,
                                                            std::string_view layer,
                                                            const Stored& stored) {
  FakeCall call;
  const std::vector<qm_named_tensor> views = Views(stored.tensors);
  qm_packed packed = {};
  QM_RETURN_IF_ERROR(ToStatus(
      call,
      Format()->from_checkpoint(call.get(), std::string(target).c_str(), std::string(layer).c_str(),
                                views.data(), views.size(), stored.config_json.c_str(), &packed)));
  return PackedWeight{packed.format_id, packed.format_json,
                      Copies(packed.tensors, packed.tensor_count), packed.out_features,
                      packed.in_features};
}

}  // namespace quantmill::testing
