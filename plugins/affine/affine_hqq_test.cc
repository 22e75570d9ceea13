// The hqq checkpoint layout: bytes worked out from its description, round trips, damaged layers.
#include "affine_test_util.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace affine_testing {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using Zero = AffineIntParams::Zero;
using qm::testing::FakeCall;

struct HqqLayer {
  FakeCall call;
  const qm_named_tensor* tensors = nullptr;
  uint64_t count = 0;
  const char* config = nullptr;
  qm_status status = QM_OK;

  explicit HqqLayer(const PackedWeight& weight) {
    status = Format()->to_checkpoint(call.get(), "hqq", "layer", View(weight).get(), &tensors,
                                     &count, &config);
  }
  std::vector<qm_named_tensor> Tensors() const { return {tensors, tensors + count}; }
  std::string Text(const char* name) {
    const std::vector<uint8_t> bytes = call.Read<uint8_t>(0, name);
    return {bytes.begin(), bytes.end()};
  }
};

// Codes by flat index, every scale and zero point 1.
PackedWeight FromCodes(int bits, int64_t out, int64_t in, int64_t group, int axis,
                       const std::vector<int>& values) {
  const AffineIntParams params = {bits, group, Zero::kFloat, axis};
  Tensor codes = *Tensor::Host(DType::kU8, {out, in});
  for (int64_t i = 0; i < out * in; ++i) codes.as<uint8_t>()[i] = static_cast<uint8_t>(values[i]);
  Tensor ones = *Tensor::Host(DType::kF16, params.GroupShape(out, in));
  for (int64_t i = 0; i < ones.elements(); ++i) StoreFloat(&ones, i, 1.0f);
  return *quantmill::MakeAffineInt(params, codes, ones, ones, Tensor());
}

TEST(Hqq, PacksAlongTheRowsOfTheGroupedMatrix) {
  const std::vector<int> counting = {0, 1, 2, 3, 4, 5, 6, 7};
  HqqLayer four(FromCodes(4, 2, 4, 2, 1, counting));
  ASSERT_EQ(four.status, QM_OK) << four.call.error();
  EXPECT_THAT(four.call.Read<uint8_t>(0, "W_q"), ElementsAre(0x04, 0x15, 0x26, 0x37));
  EXPECT_EQ(four.call.EmittedTensor(0, "W_q").shape[0], 2);
  EXPECT_EQ(four.call.EmittedTensor(0, "scale").shape[0], 4);
  EXPECT_EQ(four.call.EmittedTensor(0, "scale").shape[1], 1);

  HqqLayer columns(FromCodes(4, 4, 2, 2, 0, counting));
  ASSERT_EQ(columns.status, QM_OK) << columns.call.error();
  EXPECT_THAT(columns.call.Read<uint8_t>(0, "W_q"), ElementsAre(0x04, 0x15, 0x26, 0x37));
  EXPECT_EQ(columns.call.EmittedTensor(0, "W_q").shape[0], 1);
  EXPECT_EQ(columns.call.EmittedTensor(0, "zero").shape[0], 1);
  EXPECT_EQ(columns.call.EmittedTensor(0, "zero").shape[1], 4);

  HqqLayer two(FromCodes(2, 2, 4, 2, 1, {0, 1, 2, 3, 0, 1, 2, 3}));
  EXPECT_THAT(two.call.Read<uint8_t>(0, "W_q"), ElementsAre(0x22, 0x77));
  HqqLayer one(FromCodes(1, 2, 4, 1, 1, {1, 0, 0, 1, 1, 0, 1, 0}));
  EXPECT_THAT(one.call.Read<uint8_t>(0, "W_q"), ElementsAre(0x9A));
  HqqLayer eight(FromCodes(8, 2, 4, 2, 1, {0, 1, 2, 3, 255, 5, 6, 7}));
  EXPECT_THAT(eight.call.Read<uint8_t>(0, "W_q"), ElementsAre(0, 1, 2, 3, 255, 5, 6, 7));
  // Twelve rows, padded to twenty: two packed rows of ten fields.
  HqqLayer three(FromCodes(3, 2, 6, 1, 1, {0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3}));
  EXPECT_THAT(three.call.Read<int32_t>(0, "W_q"),
              ElementsAre(2 << 24 | 4 << 21 | 6 << 18 | 2 << 12,
                          1 << 27 | 3 << 24 | 5 << 21 | 7 << 18 | 1 << 15 | 3 << 12));
}

TEST(Hqq, WritesEveryFieldTheReaderInsistsOn) {
  HqqLayer layer(RandomWeight({16, 128, {3, 64, Zero::kFloat}, DType::kBF16}));
  ASSERT_EQ(layer.status, QM_OK) << layer.call.error();
  EXPECT_STREQ(layer.config, R"({"axis":1,"group_size":64,"nbits":3})");
  EXPECT_EQ(layer.count, 19u);
  EXPECT_EQ(layer.Text("packing"), "3bit_32");
  EXPECT_EQ(layer.Text("unpack_view_dtype"), "torch.int32");
  EXPECT_EQ(layer.Text("compute_dtype"), "torch.bfloat16");
  EXPECT_THAT(layer.call.Read<int64_t>(0, "shape"), ElementsAre(16, 128));
  const std::vector<std::pair<const char*, int>> numbers = {
      {"nbits", 3}, {"group_size", 64}, {"axis", 1}};
  for (const auto& [name, value] : numbers) {
    EXPECT_EQ(layer.call.EmittedTensor(0, name).rank, 0) << name;
    EXPECT_THAT(layer.call.Read<int32_t>(0, name), ElementsAre(value)) << name;
  }
  const std::vector<std::pair<const char*, int>> flags = {
      {"view_as_float", 0}, {"quant_scale", 0},        {"quant_zero", 0},
      {"offload_meta", 0},  {"channel_wise", 1},       {"optimize", 1},
      {"round_zero", 0},    {"encoded_state_dict", 1}, {"stores_quant_config", 1}};
  for (const auto& [name, value] : flags) {
    EXPECT_EQ(layer.call.EmittedTensor(0, name).rank, 0) << name;
    EXPECT_THAT(layer.call.Read<uint8_t>(0, name), ElementsAre(value)) << name;
  }
  HqqLayer four(RandomWeight({16, 128, {4, 64, Zero::kFloat}, DType::kF32}));
  EXPECT_THAT(four.call.Read<uint8_t>(0, "round_zero"), ElementsAre(1));
  EXPECT_EQ(four.Text("packing"), "4bit_u8");
  EXPECT_EQ(four.Text("unpack_view_dtype"), "torch.uint8");
  EXPECT_EQ(four.Text("compute_dtype"), "torch.float32");
}

TEST(Hqq, RoundTripGivesTheWeightBackBitForBit) {
  for (int bits : {1, 2, 3, 4, 8}) {
    for (int axis : {0, 1}) {
      for (int64_t group : {-1, 8, 32}) {
        for (DType dtype : {DType::kF16, DType::kBF16, DType::kF32}) {
          const PackedWeight weight =
              RandomWeight({64, 160, {bits, group, Zero::kFloat, axis}, dtype});
          SCOPED_TRACE(weight.format_json);
          HqqLayer layer(weight);
          ASSERT_EQ(layer.status, QM_OK) << layer.call.error();
          FakeCall call;
          qm_packed back;
          ASSERT_EQ(Format()->from_checkpoint(call.get(), "hqq", "layer", layer.tensors,
                                              layer.count, layer.config, &back),
                    QM_OK)
              << call.error();
          EXPECT_EQ(weight.format_json, back.format_json);
          EXPECT_EQ(weight.out_features, back.out_features);
          EXPECT_EQ(weight.in_features, back.in_features);
          ASSERT_EQ(weight.tensors.size(), back.tensor_count);
          for (uint64_t i = 0; i < back.tensor_count; ++i) {
            const qm_tensor& got = back.tensors[i].tensor;
            const Tensor* want = weight.Find(back.tensors[i].name);
            ASSERT_NE(want, nullptr);
            ASSERT_EQ(static_cast<qm_dtype>(want->dtype()), got.dtype);
            ASSERT_EQ(want->dim(0), got.shape[0]);
            ASSERT_EQ(want->dim(1), got.shape[1]);
            EXPECT_EQ(std::memcmp(want->data(), got.data, want->bytes()), 0);
          }
        }
      }
    }
  }
}

TEST(Hqq, SaysWhatAFileCannotHold) {
  const auto error = [](const char* json, int64_t out, int64_t in) {
    FakeCall call;
    const qm_status status = Format()->can_store(call.get(), "hqq", json, out, in);
    EXPECT_EQ(status, call.error().empty() ? QM_OK : QM_FAILED_PRECONDITION);
    return call.error();
  };
  EXPECT_EQ(error(R"({"bits":4,"group_size":64,"zero":"float"})", 3, 128), "");
  EXPECT_EQ(error(R"({"bits":3,"group_size":-1,"zero":"float"})", 3, 7), "");
  EXPECT_THAT(error(R"({"bits":4,"group_size":64,"zero":"int"})", 4, 64), HasSubstr("hqq"));
  EXPECT_THAT(error(R"({"bits":4,"group_size":64,"scale":"q8","zero":"float"})", 4, 64),
              HasSubstr("quantize_scale"));
  EXPECT_THAT(error(R"({"bits":4,"group_size":64,"zero":"float"})", 3, 64), HasSubstr("multiples"));
  EXPECT_THAT(error(R"({"axis":0,"bits":1,"group_size":4,"zero":"float"})", 8, 64),
              HasSubstr("group_size"));
  EXPECT_THAT(error(R"({"bits":4,"group_size":48,"zero":"float"})", 4, 64), HasSubstr("divide"));
  HqqLayer indexed(RandomWeight({8, 64, {4, 32, Zero::kFloat}, DType::kF16, true}));
  EXPECT_EQ(indexed.status, QM_FAILED_PRECONDITION);
  for (const char* target : {"gptq", "compressed-tensors"}) {
    FakeCall call;
    EXPECT_EQ(Format()->can_store(call.get(), target,
                                  R"({"axis":0,"bits":4,"group_size":64,"zero":"float"})", 64, 64),
              QM_FAILED_PRECONDITION);
  }
}

TEST(Hqq, RefusesDamagedLayers) {
  HqqLayer layer(RandomWeight({32, 64, {4, 32, Zero::kFloat}}));
  const auto read = [](const std::vector<qm_named_tensor>& tensors) {
    FakeCall call;
    qm_packed back;
    const qm_status status = Format()->from_checkpoint(call.get(), "hqq", "layer", tensors.data(),
                                                       tensors.size(), "{}", &back);
    EXPECT_EQ(call.error().empty(), status == QM_OK);
    return status;
  };
  const std::vector<qm_named_tensor> good = layer.Tensors();
  ASSERT_EQ(read(good), QM_OK);
  for (size_t i = 0; i < good.size(); ++i) {
    const std::string name = good[i].name;
    SCOPED_TRACE(name);
    const bool needed = name == "W_q" || name == "scale" || name == "zero" || name == "shape" ||
                        name == "nbits" || name == "group_size" || name == "axis";
    auto without = good;
    without.erase(without.begin() + static_cast<int64_t>(i));
    EXPECT_EQ(read(without), needed ? QM_INVALID_ARGUMENT : QM_OK);
    if (!needed) continue;
    auto wrong_type = good;
    wrong_type[i].tensor.dtype = QM_F64;
    EXPECT_EQ(read(wrong_type), QM_INVALID_ARGUMENT);
    if (good[i].tensor.rank == 0) continue;
    auto shorter = good;
    shorter[i].tensor.shape[0] -= 1;
    EXPECT_EQ(read(shorter), QM_INVALID_ARGUMENT);
  }
  const auto with = [&](const char* name, auto value) {
    std::vector<qm_named_tensor> changed = good;
    for (qm_named_tensor& named : changed) {
      if (std::strcmp(named.name, name) == 0) named.tensor.data = &value;
    }
    return read(changed);
  };
  EXPECT_EQ(with("nbits", int32_t{7}), QM_INVALID_ARGUMENT);
  EXPECT_EQ(with("nbits", int32_t{8}), QM_INVALID_ARGUMENT);  // not what W_q holds
  EXPECT_EQ(with("axis", int32_t{2}), QM_INVALID_ARGUMENT);
  EXPECT_EQ(with("group_size", int32_t{0}), QM_INVALID_ARGUMENT);
  EXPECT_EQ(with("group_size", int32_t{16}), QM_INVALID_ARGUMENT);
  EXPECT_EQ(with("group_size", int32_t{128}), QM_UNIMPLEMENTED);  // two rows per group
  EXPECT_EQ(with("view_as_float", uint8_t{1}), QM_UNIMPLEMENTED);
  EXPECT_EQ(with("quant_zero", uint8_t{1}), QM_UNIMPLEMENTED);
}

}  // namespace
}  // namespace affine_testing
