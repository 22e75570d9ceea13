// Checkpoint layouts: byte vectors of the other programs' documents, and round trips.
#include "affine_test_util.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace affine_testing {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using Zero = AffineIntParams::Zero;
using qm::testing::FakeCall;

// What to_checkpoint made, readable after the call.
struct Stored {
  FakeCall call;
  const qm_named_tensor* tensors = nullptr;
  uint64_t count = 0;
  const char* config = nullptr;
  qm_status status = QM_OK;

  Stored(const char* target, const PackedWeight& weight) {
    status = Format()->to_checkpoint(call.get(), target, "layer", View(weight).get(), &tensors,
                                     &count, &config);
  }
  std::vector<uint32_t> Words(const char* name) {
    const std::vector<int32_t> words = call.Read<int32_t>(0, name);
    return {words.begin(), words.end()};
  }
};

// out x in codes from a function of (output, input), all scales 1.
template <class F>
PackedWeight FromCodes(int bits, int64_t out, int64_t in, Zero zero, F code, uint8_t z = 0) {
  Tensor codes = *Tensor::Host(DType::kU8, {out, in});
  for (int64_t i = 0; i < out * in; ++i) codes.as<uint8_t>()[i] = code(i / in, i % in);
  Tensor scale = *Tensor::Host(DType::kF16, {out, 1});
  Tensor zeros;
  if (zero == Zero::kInt) zeros = *Tensor::Host(DType::kU8, {out, 1});
  for (int64_t o = 0; o < out; ++o) {
    scale.as<uint16_t>()[o] = quantmill::F32ToF16(1.0f);
    if (zero == Zero::kInt) zeros.as<uint8_t>()[o] = z;
  }
  return *quantmill::MakeAffineInt({bits, -1, zero}, codes, scale, zeros, Tensor());
}

TEST(Gptq, WritesTheWordsOfTheReferenceVectors) {
  struct Case {
    int bits;
    std::vector<uint32_t> qweight, v1, v2;
  };
  // Codes count up along the input channels; zero points are the symmetric middle.
  const std::vector<Case> cases = {{2, {0xE4E4E4E4u, 0xE4E4E4E4u}, {0x55555555u}, {0xAAAAAAAAu}},
                                   {3,
                                    {0x88FAC688u, 0xC688FAC6u, 0xFAC688FAu},
                                    {0xDB6DB6DBu, 0xB6DB6DB6u, 0x6DB6DB6Du},
                                    {0x24924924u, 0x49249249u, 0x92492492u}},
                                   {4, {0x76543210u, 0xFEDCBA98u}, {0x77777777u}, {0x88888888u}},
                                   {8, {0x03020100u, 0x07060504u}, {0x7F7F7F7Fu}, {0x80808080u}}};
  for (const Case& c : cases) {
    SCOPED_TRACE(c.bits);
    const PackedWeight weight = FromCodes(c.bits, 32, 32, Zero::kNone, [&](int64_t, int64_t i) {
      return static_cast<uint8_t>(i % (1 << c.bits));
    });
    for (const char* target : {"gptq", "gptq_v2"}) {
      Stored stored(target, weight);
      ASSERT_EQ(stored.status, QM_OK) << stored.call.error();
      const std::vector<uint32_t> qweight = stored.Words("qweight"),
                                  qzeros = stored.Words("qzeros");
      const int64_t words = c.bits;  // 32 codes
      ASSERT_EQ(qweight.size(), static_cast<size_t>(words * 32));
      for (size_t row = 0; row < c.qweight.size(); ++row) {
        for (int n = 0; n < 32; ++n) EXPECT_EQ(qweight[row * 32 + n], c.qweight[row]);
      }
      const auto& zeros = std::string(target) == "gptq" ? c.v1 : c.v2;
      ASSERT_EQ(qzeros.size(), static_cast<size_t>(c.bits));
      for (size_t i = 0; i < qzeros.size(); ++i) EXPECT_EQ(qzeros[i], zeros[i % zeros.size()]);
      EXPECT_EQ(std::string(stored.config),
                "{\"bits\":" + std::to_string(c.bits) +
                    ",\"desc_act\":false,\"group_size\":-1,\"sym\":true}");
    }
  }
}

TEST(Gptq, PacksWeightsAlongInputsAndZerosAlongOutputs) {
  PackedWeight weight = FromCodes(4, 8, 8, Zero::kInt, [](int64_t o, int64_t i) {
    return static_cast<uint8_t>(o == 0 ? i : 15);
  });
  for (auto& named : weight.tensors) {
    if (named.name == "zero") {
      for (int o = 0; o < 8; ++o) named.tensor.as<uint8_t>()[o] = static_cast<uint8_t>(o + 1);
    }
  }
  Stored v1("gptq", weight), v2("gptq_v2", weight);
  ASSERT_EQ(v1.status, QM_OK);
  ASSERT_EQ(v2.status, QM_OK);
  EXPECT_EQ(v1.Words("qweight")[0], 0x76543210u);
  EXPECT_EQ(v1.Words("qweight")[1], 0xFFFFFFFFu);
  EXPECT_THAT(v1.Words("qzeros"), ElementsAre(0x76543210u));
  EXPECT_THAT(v2.Words("qzeros"), ElementsAre(0x87654321u));
  EXPECT_THAT(v1.call.Read<int32_t>(0, "g_idx"), ElementsAre(0, 0, 0, 0, 0, 0, 0, 0));
  EXPECT_EQ(v1.call.EmittedTensor(0, "scales").dtype, QM_F16);
}

TEST(Gptq, RefusesAZeroPointOfZeroInVersionOneOnly) {
  const auto code = [](int64_t, int64_t) { return uint8_t{1}; };
  const PackedWeight weight = FromCodes(4, 8, 8, Zero::kInt, code, 0);
  Stored v1("gptq", weight);
  EXPECT_EQ(v1.status, QM_FAILED_PRECONDITION);
  EXPECT_THAT(v1.call.error(), HasSubstr("export as gptq_v2"));
  EXPECT_EQ(Stored("gptq_v2", weight).status, QM_OK);
}

TEST(CompressedTensors, WritesTheWordsOfTheReferenceVector) {
  // int4 values -4..3.
  const PackedWeight weight = FromCodes(
      4, 8, 8, Zero::kInt, [](int64_t, int64_t i) { return static_cast<uint8_t>(i + 4); }, 9);
  Stored stored("compressed-tensors", weight);
  ASSERT_EQ(stored.status, QM_OK) << stored.call.error();
  EXPECT_EQ(stored.Words("weight_packed")[0], 0xBA987654u);
  EXPECT_THAT(stored.call.Read<int64_t>(0, "weight_shape"), ElementsAre(8, 8));
  EXPECT_THAT(stored.Words("weight_zero_point"), ElementsAre(0x99999999u));
  EXPECT_FALSE(stored.call.Emitted(0, "weight_g_idx"));
  EXPECT_STREQ(stored.config,
               R"({"actorder":null,"format":"pack-quantized","group_size":null,"num_bits":4,)"
               R"("strategy":"channel","symmetric":false})");
}

TEST(CompressedTensors, HasNoZeroPointsWhenSymmetric) {
  Stored stored("compressed-tensors", RandomWeight({8, 128, {4, 32, Zero::kNone}}));
  ASSERT_EQ(stored.status, QM_OK);
  EXPECT_FALSE(stored.call.Emitted(0, "weight_zero_point"));
  EXPECT_STREQ(stored.config,
               R"({"actorder":null,"format":"pack-quantized","group_size":32,"num_bits":4,)"
               R"("strategy":"group","symmetric":true})");
}

void ExpectSameWeight(const PackedWeight& expected, const qm_packed& actual) {
  EXPECT_EQ(expected.format_json, actual.format_json);
  EXPECT_EQ(expected.out_features, actual.out_features);
  EXPECT_EQ(expected.in_features, actual.in_features);
  ASSERT_EQ(expected.tensors.size(), actual.tensor_count);
  for (uint64_t i = 0; i < actual.tensor_count; ++i) {
    const Tensor* tensor = expected.Find(actual.tensors[i].name);
    ASSERT_NE(tensor, nullptr) << actual.tensors[i].name;
    const qm_tensor& got = actual.tensors[i].tensor;
    ASSERT_EQ(static_cast<qm_dtype>(tensor->dtype()), got.dtype);
    ASSERT_EQ(tensor->rank(), got.rank);
    for (int d = 0; d < got.rank; ++d) ASSERT_EQ(tensor->dim(d), got.shape[d]);
    EXPECT_EQ(std::memcmp(tensor->data(), got.data, tensor->bytes()), 0) << actual.tensors[i].name;
  }
}

TEST(RoundTrip, GivesTheWeightBackBitForBit) {
  for (const char* target : {"gptq", "gptq_v2", "compressed-tensors"}) {
    for (int bits : {2, 3, 4, 8}) {
      for (int64_t group : {-1, 32, 64}) {
        for (Zero zero : {Zero::kNone, Zero::kInt}) {
          for (bool index : {false, true}) {
            const bool gptq = std::string(target) != "compressed-tensors";
            if (!gptq && index && group == -1) continue;
            for (DType scale : {DType::kF16, DType::kBF16, DType::kF32}) {
              if (gptq && scale == DType::kF32) continue;
              const PackedWeight weight =
                  RandomWeight({64, 192, {bits, group, zero}, scale, index, 1});
              SCOPED_TRACE(std::string(target) + " " + weight.format_json);
              Stored stored(target, weight);
              ASSERT_EQ(stored.status, QM_OK) << stored.call.error();
              FakeCall call;
              qm_packed back;
              ASSERT_EQ(Format()->from_checkpoint(call.get(), target, "layer", stored.tensors,
                                                  stored.count, stored.config, &back),
                        QM_OK)
                  << call.error();
              ExpectSameWeight(weight, back);
            }
          }
        }
      }
    }
  }
}

TEST(RoundTrip, CompressedTensorsHoldsOddShapes) {
  for (int bits : {2, 3, 4, 8}) {
    const PackedWeight weight = RandomWeight({7, 45, {bits, 15, Zero::kInt}});
    Stored stored("compressed-tensors", weight);
    ASSERT_EQ(stored.status, QM_OK) << stored.call.error();
    FakeCall call;
    qm_packed back;
    ASSERT_EQ(Format()->from_checkpoint(call.get(), "compressed-tensors", "layer", stored.tensors,
                                        stored.count, stored.config, &back),
              QM_OK)
        << call.error();
    ExpectSameWeight(weight, back);
  }
}

TEST(CompressedTensors, ReadsIntQuantized) {
  FakeCall source;
  const std::vector<int8_t> values = {-128, -1, 0, 127, 5, 6, 7, 8};
  const std::vector<int8_t> zeros = {3, -128};
  const std::vector<float> scales = {0.5f, 0.25f};
  const std::vector<qm_named_tensor> tensors = {
      {"weight", source.Tensor(values, {2, 4})},
      {"weight_scale", source.Tensor(scales, {2, 1})},
      {"weight_zero_point", source.Tensor(zeros, {2, 1})}};
  FakeCall call;
  qm_packed packed;
  ASSERT_EQ(Format()->from_checkpoint(
                call.get(), "compressed-tensors", "layer", tensors.data(), tensors.size(),
                R"({"actorder":null,"format":"int-quantized","group_size":null,"num_bits":8,)"
                R"("strategy":"channel","symmetric":false})",
                &packed),
            QM_OK)
      << call.error();
  std::vector<float> dense(8);
  qm_tensor out = qm::MakeMatrix(dense.data(), 2, 4, 4, {QM_CPU, 0});
  FakeCall kernel;
  ASSERT_EQ(Kernel()->dequantize(kernel.get(), &packed, &out), QM_OK) << kernel.error();
  EXPECT_THAT(dense, ElementsAre(-65.5f, -2, -1.5f, 62, 33.25f, 33.5f, 33.75f, 34));
}

TEST(Gptq, ReadsAFileThatIsSymmetricOnlyByName) {
  const PackedWeight weight = RandomWeight({32, 64, {4, 32, Zero::kInt}, DType::kF16, false, 1});
  Stored stored("gptq", weight);
  FakeCall call;
  qm_packed back;
  ASSERT_EQ(
      Format()->from_checkpoint(call.get(), "gptq", "layer", stored.tensors, stored.count,
                                R"({"bits":4,"desc_act":false,"group_size":32,"sym":true})", &back),
      QM_OK)
      << call.error();
  ExpectSameWeight(weight, back);
}

TEST(CanStore, SaysWhatATargetCannotHold) {
  const auto store = [](const char* target, const char* json, int64_t out, int64_t in) {
    FakeCall call;
    const qm_status status = Format()->can_store(call.get(), target, json, out, in);
    EXPECT_EQ(call.error().empty(), status == QM_OK);
    return std::make_pair(status, call.error());
  };
  const char* plain = R"({"bits":4,"group_size":128,"zero":"int"})";
  const char* floats = R"({"bits":4,"group_size":128,"zero":"float"})";
  const char* three = R"({"bits":3,"group_size":-1,"zero":"int"})";
  for (const char* target : {"gptq", "gptq_v2", "compressed-tensors"}) {
    EXPECT_EQ(store(target, plain, 64, 256).first, QM_OK);
    EXPECT_EQ(store(target, floats, 64, 256).first, QM_FAILED_PRECONDITION);
  }
  EXPECT_EQ(store("gptq", plain, 4, 256).first, QM_FAILED_PRECONDITION);
  EXPECT_EQ(store("gptq", three, 40, 32).first, QM_FAILED_PRECONDITION);
  EXPECT_EQ(store("compressed-tensors", three, 5, 7).first, QM_OK);
  EXPECT_THAT(store("elsewhere", plain, 64, 256).second, HasSubstr("'elsewhere'"));
  EXPECT_EQ(store("gptq", "{}", 64, 256).first, QM_INVALID_ARGUMENT);
}

TEST(ToCheckpoint, RefusesF32ScalesForGptq) {
  Stored stored("gptq", RandomWeight({32, 64, {4, 32, Zero::kNone}, DType::kF32}));
  EXPECT_EQ(stored.status, QM_FAILED_PRECONDITION);
  EXPECT_THAT(stored.call.error(), HasSubstr("f32 scales"));
}

TEST(ToCheckpoint, RefusesAGroupIndexWithoutGroupsForCompressedTensors) {
  Stored stored("compressed-tensors",
                RandomWeight({8, 64, {4, -1, Zero::kNone}, DType::kF16, true}));
  EXPECT_EQ(stored.status, QM_FAILED_PRECONDITION);
}

TEST(FromCheckpoint, RefusesDamagedLayers) {
  const PackedWeight weight = RandomWeight({32, 64, {4, 32, Zero::kInt}, DType::kF16, true, 1});
  for (const char* target : {"gptq", "compressed-tensors"}) {
    Stored stored(target, weight);
    ASSERT_EQ(stored.status, QM_OK);
    const auto read = [&](std::vector<qm_named_tensor> tensors, const std::string& config) {
      FakeCall call;
      qm_packed back;
      const qm_status status = Format()->from_checkpoint(
          call.get(), target, "layer", tensors.data(), tensors.size(), config.c_str(), &back);
      EXPECT_EQ(call.error().empty(), status == QM_OK);
      return status;
    };
    const std::vector<qm_named_tensor> good(stored.tensors, stored.tensors + stored.count);
    ASSERT_EQ(read(good, stored.config), QM_OK);
    EXPECT_EQ(read(good, "{}"), QM_INVALID_ARGUMENT);
    EXPECT_EQ(
        read(good,
             std::string(stored.config).replace(std::string(stored.config).find("32"), 2, "48")),
        QM_INVALID_ARGUMENT);
    const bool gptq = std::string(target) == "gptq";
    for (size_t i = 0; i < good.size(); ++i) {
      SCOPED_TRACE(good[i].name);
      auto without = good;
      without.erase(without.begin() + i);
      // Without its index a compressed-tensors layer is a valid layer in plain order.
      const bool optional = !gptq && std::string(good[i].name) == "weight_g_idx";
      EXPECT_EQ(read(without, stored.config), optional ? QM_OK : QM_INVALID_ARGUMENT);
      auto wrong_type = good;
      wrong_type[i].tensor.dtype = QM_F64;
      EXPECT_EQ(read(wrong_type, stored.config), QM_INVALID_ARGUMENT);
      auto short_rows = good;
      short_rows[i].tensor.shape[0] -= 1;
      EXPECT_EQ(read(short_rows, stored.config), QM_INVALID_ARGUMENT);
    }
  }
}

}  // namespace
}  // namespace affine_testing
