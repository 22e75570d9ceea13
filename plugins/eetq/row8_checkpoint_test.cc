// Checkpoint layouts: bytes derived a second way from their description, and back.
#include <algorithm>
#include <array>
#include <iterator>

#include "eetq_layout.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "row8_test_util.h"

namespace eetq_testing {
namespace {

using qm::testing::FakeCall;
using ::testing::HasSubstr;

// What the engine's preprocessing does to a transposed weight q[k][n], step by step as it is
// described, not by the closed form: permute rows in groups of 16, make columns contiguous,
// interleave two columns in tiles of 64 rows, add 128, swap the middle bytes of every four.
std::vector<uint8_t> PreprocessedByStages(const std::vector<int8_t>& q, int64_t inputs,
                                          int64_t outputs) {
  constexpr std::array<int, 16> kOrder = {0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15};
  std::vector<int8_t> permuted(q.size());
  for (int64_t k = 0; k < inputs; ++k) {
    const int64_t from = k / 16 * 16 + kOrder[static_cast<size_t>(k % 16)];
    std::copy_n(q.begin() + from * outputs, outputs, permuted.begin() + k * outputs);
  }
  std::vector<int8_t> columns(q.size());  // [n][k]
  for (int64_t k = 0; k < inputs; ++k) {
    for (int64_t n = 0; n < outputs; ++n) columns[n * inputs + k] = permuted[k * outputs + n];
  }
  std::vector<int8_t> interleaved;
  for (int64_t pair = 0; pair < outputs; pair += 2) {
    for (int64_t tile = 0; tile < inputs; tile += 64) {
      for (int64_t n = pair; n < pair + 2; ++n) {
        for (int64_t k = tile; k < tile + 64; ++k) interleaved.push_back(columns[n * inputs + k]);
      }
    }
  }
  std::vector<uint8_t> bytes;
  for (const int8_t value : interleaved) bytes.push_back(static_cast<uint8_t>(value + 128));
  for (size_t i = 0; i + 4 <= bytes.size(); i += 4) std::swap(bytes[i + 1], bytes[i + 2]);
  return bytes;
}

struct Stored {
  qm_status status = QM_INTERNAL;
  std::string config, error;
  std::vector<std::string> names;
  std::vector<std::vector<uint8_t>> bytes;
  std::vector<std::vector<int64_t>> shapes;
  std::vector<qm_dtype> dtypes;

  // As from_checkpoint takes them; views of this object.
  std::vector<qm_named_tensor> Views() {
    std::vector<qm_named_tensor> views;
    for (size_t i = 0; i < names.size(); ++i) {
      qm_named_tensor named = {names[i].c_str(), {}};
      named.tensor.data = bytes[i].data();
      named.tensor.dtype = dtypes[i];
      named.tensor.device = {QM_CPU, 0};
      named.tensor.rank = static_cast<int32_t>(shapes[i].size());
      int64_t stride = 1;
      for (int d = named.tensor.rank - 1; d >= 0; --d) {
        named.tensor.shape[d] = shapes[i][d];
        named.tensor.stride[d] = stride;
        stride *= shapes[i][d];
      }
      views.push_back(named);
    }
    return views;
  }
};

Stored Store(const PackedWeight& weight, const char* target) {
  FakeCall call;
  const qm_named_tensor* tensors = nullptr;
  uint64_t count = 0;
  const char* config = nullptr;
  Stored stored;
  stored.status = Format(weight)->to_checkpoint(call.get(), target, "model.layers.0.mlp.up_proj",
                                                View(weight).get(), &tensors, &count, &config);
  stored.error = call.error();
  if (stored.status != QM_OK) return stored;
  stored.config = config;
  for (uint64_t i = 0; i < count; ++i) {
    const qm_tensor& t = tensors[i].tensor;
    int64_t elements = 1;
    for (int d = 0; d < t.rank; ++d) elements *= t.shape[d];
    const auto* data = static_cast<const uint8_t*>(t.data);
    stored.names.push_back(tensors[i].name);
    stored.bytes.emplace_back(data, data + elements * qm::ElementSize(t.dtype));
    stored.shapes.emplace_back(t.shape, t.shape + t.rank);
    stored.dtypes.push_back(t.dtype);
  }
  return stored;
}

// "" when reading gives `weight` again, else what is wrong.
std::string ReadBack(const PackedWeight& weight, const char* target, Stored stored) {
  FakeCall call;
  const std::vector<qm_named_tensor> views = stored.Views();
  qm_packed packed = {};
  const qm_status status =
      Format(weight)->from_checkpoint(call.get(), target, "model.layers.0.mlp.up_proj",
                                      views.data(), views.size(), stored.config.c_str(), &packed);
  if (status != QM_OK) return call.error();
  if (packed.format_json != weight.format_json || packed.out_features != weight.out_features ||
      packed.in_features != weight.in_features) {
    return "other parameters";
  }
  for (uint64_t i = 0; i < packed.tensor_count; ++i) {
    const Tensor* original = weight.Find(packed.tensors[i].name);
    if (original == nullptr ||
        std::memcmp(original->data(), packed.tensors[i].tensor.data, original->bytes()) != 0) {
      return std::string("other ") + packed.tensors[i].name;
    }
  }
  return "";
}

TEST(EetqLayout, EqualsTheEnginesStages) {
  for (const auto& [outputs, inputs] : {std::pair{64, 64}, {128, 192}, {64, 320}}) {
    const PackedWeight weight = RandomWeight({DType::kI8, outputs, inputs});
    const int8_t* codes = weight.tensors[0].tensor.as<int8_t>();
    std::vector<int8_t> transposed(outputs * inputs);
    for (int64_t n = 0; n < outputs; ++n) {
      for (int64_t k = 0; k < inputs; ++k) transposed[k * outputs + n] = codes[n * inputs + k];
    }
    const Stored stored = Store(weight, "eetq");
    ASSERT_EQ(stored.status, QM_OK) << stored.error;
    EXPECT_EQ(stored.names, (std::vector<std::string>{"weight", "weight_scales"}));
    EXPECT_EQ(stored.dtypes, (std::vector<qm_dtype>{QM_I8, QM_F16}));
    EXPECT_EQ(stored.shapes[0], (std::vector<int64_t>{inputs, outputs}));
    EXPECT_EQ(stored.shapes[1], (std::vector<int64_t>{outputs}));
    EXPECT_EQ(stored.bytes[0], PreprocessedByStages(transposed, inputs, outputs));
    EXPECT_EQ(std::memcmp(stored.bytes[1].data(), weight.tensors[1].tensor.data(), outputs * 2), 0);
    EXPECT_EQ(ReadBack(weight, "eetq", stored), "");
  }
}

// The first bytes of a row of codes 0, 1, 2, ... with its neighbour 100, 101, ...: steps 1 and 5
// interleave the halves of 16, and the second row begins after 64 bytes.
TEST(EetqLayout, BeginsAsDescribed) {
  std::vector<uint8_t> codes(64 * 64), stored(64 * 64);
  for (int k = 0; k < 64; ++k) {
    codes[k] = static_cast<uint8_t>(k);
    codes[64 + k] = static_cast<uint8_t>(100 + k);
  }
  eetq::ToEetqLayout(codes.data(), 64, 64, stored.data());
  const std::vector<int> expected = {0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15, 16, 24};
  for (size_t i = 0; i < expected.size(); ++i) {
    EXPECT_EQ(stored[i], expected[i] ^ 0x80) << i;
    EXPECT_EQ(stored[64 + i], (100 + expected[i]) ^ 0x80) << i;
  }
}

TEST(Eetq, ReadsWhatTheEnginesOwnSaverCallsTheWeight) {
  const PackedWeight weight = RandomWeight({DType::kI8, 64, 128});
  Stored stored = Store(weight, "eetq");
  stored.names[0] = "qweight";
  EXPECT_EQ(ReadBack(weight, "eetq", stored), "");
}

TEST(Eetq, RefusesWhatItsFilesCannotHold) {
  const auto refused = [](const Spec& spec) {
    const PackedWeight weight = RandomWeight(spec);
    const Stored stored = Store(weight, "eetq");
    EXPECT_EQ(stored.status, QM_FAILED_PRECONDITION);
    return stored.error;
  };
  EXPECT_THAT(refused({DType::kI8, 64, 96}), HasSubstr("multiples of 64"));
  EXPECT_THAT(refused({DType::kI8, 96, 64}), HasSubstr("multiples of 64"));
  EXPECT_THAT(refused({DType::kI8, 64, 64, DType::kF32}), HasSubstr("F16"));
  EXPECT_THAT(refused({DType::kI8, 64, 64, DType::kF16, false, true}), HasSubstr("activations"));
  EXPECT_THAT(refused({DType::kF8E4M3, 64, 64}), HasSubstr("compressed-tensors"));
}

TEST(Eetq, RefusesDamagedTensors) {
  const PackedWeight weight = RandomWeight({DType::kI8, 64, 128});
  const Stored good = Store(weight, "eetq");
  Stored bad = good;
  bad.names[1] = "scales";
  EXPECT_THAT(ReadBack(weight, "eetq", bad), HasSubstr("'weight_scales'"));
  bad = good;
  bad.shapes[0] = {127, 64};
  EXPECT_THAT(ReadBack(weight, "eetq", bad), HasSubstr("multiples"));
  bad = good;
  bad.shapes[1] = {63};
  EXPECT_THAT(ReadBack(weight, "eetq", bad), HasSubstr("expected 64"));
  bad = good;
  bad.dtypes[1] = QM_BF16;
  EXPECT_THAT(ReadBack(weight, "eetq", bad), HasSubstr("wrong dtype"));
  bad = good;
  bad.bytes[1][0] = bad.bytes[1][1] = 0;
  EXPECT_THAT(ReadBack(weight, "eetq", bad), HasSubstr("positive"));
}

TEST(CompressedTensors, HoldsEachKindInItsFormat) {
  struct Case {
    Spec spec;
    const char *weight, *config;
  };
  const Case cases[] = {
      {{DType::kI8, 10, 37},
       "weight_packed",
       R"({"actorder":null,"format":"pack-quantized","group_size":null,"num_bits":8,)"
       R"("strategy":"channel","symmetric":true})"},
      {{DType::kI8, 10, 37, DType::kBF16, false, true},
       "weight",
       R"({"activations":"int8","actorder":null,"format":"int-quantized","group_size":null,)"
       R"("num_bits":8,"strategy":"channel","symmetric":true})"},
      {{DType::kF8E4M3, 10, 37, DType::kF32, false, true},
       "weight",
       R"({"activations":"fp8","actorder":null,"format":"float-quantized","group_size":null,)"
       R"("num_bits":8,"strategy":"channel","symmetric":true,"type":"float"})"},
      {{DType::kF8E4M3, 10, 37, DType::kF16, true, false},
       "weight",
       R"({"actorder":null,"format":"naive-quantized","group_size":null,"num_bits":8,)"
       R"("strategy":"tensor","symmetric":true,"type":"float"})"},
  };
  for (const Case& c : cases) {
    const PackedWeight weight = RandomWeight(c.spec);
    const Stored stored = Store(weight, "compressed-tensors");
    ASSERT_EQ(stored.status, QM_OK) << stored.error;
    EXPECT_EQ(stored.names[0], c.weight);
    EXPECT_EQ(stored.config, c.config);
    const std::vector<int64_t> scales =
        c.spec.per_tensor ? std::vector<int64_t>{1} : std::vector<int64_t>{10, 1};
    EXPECT_EQ(stored.shapes.back(), scales);
    if (stored.names[0] == "weight") {  // bytes as they are
      EXPECT_EQ(std::memcmp(stored.bytes[0].data(), weight.tensors[0].tensor.data(), 370), 0);
    } else {  // plus 128, rows padded to whole words
      EXPECT_EQ(stored.shapes[0], (std::vector<int64_t>{10, 10}));
      EXPECT_EQ(stored.bytes[0][40], weight.tensors[0].tensor.as<uint8_t>()[37] ^ 0x80);
      EXPECT_EQ(stored.bytes[0][37], 0);
    }
    EXPECT_EQ(ReadBack(weight, "compressed-tensors", stored), "");
  }
  EXPECT_EQ(Store(RandomWeight({DType::kF8E5M2}), "compressed-tensors").status,
            QM_FAILED_PRECONDITION);
}

TEST(CompressedTensors, SaysWhenTensorsAreAnotherFormats) {
  const PackedWeight weight = RandomWeight({DType::kI8, 10, 37, DType::kF16, false, true});
  const Stored stored = Store(weight, "compressed-tensors");
  for (const char* config :
       {R"({"actorder":null,"format":"pack-quantized","group_size":128,"num_bits":4,)"
        R"("strategy":"group","symmetric":true})",
        R"({"activations":"fp8","actorder":null,"format":"float-quantized","group_size":null,)"
        R"("num_bits":8,"strategy":"channel","symmetric":true,"type":"float"})"}) {
    Stored other = stored;
    other.config = config;
    FakeCall call;
    const std::vector<qm_named_tensor> views = other.Views();
    qm_packed packed = {};
    EXPECT_EQ(Format(weight)->from_checkpoint(call.get(), "compressed-tensors", "x", views.data(),
                                              views.size(), config, &packed),
              QM_UNIMPLEMENTED);
  }
  Stored bad = stored;
  bad.dtypes[0] = QM_U8;
  EXPECT_THAT(ReadBack(weight, "compressed-tensors", bad), HasSubstr("wrong dtype"));
  bad = stored;
  bad.shapes[1] = {9, 1};
  EXPECT_THAT(ReadBack(weight, "compressed-tensors", bad), HasSubstr("expected 10"));
}

}  // namespace
}  // namespace eetq_testing
