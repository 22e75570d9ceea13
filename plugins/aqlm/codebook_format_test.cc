// Products, dequantizing, and the aqlm checkpoint layout, byte by byte.
#include <gtest/gtest.h>

#include <algorithm>

#include "aqlm_testing.h"

namespace quantmill::aqlm::testing {
namespace {

struct Spec {
  int64_t out = 24, in = 64;
  Params params = {2, 8, 8};
  qm_dtype dtype = QM_F16;
};

// A random packed weight in the memory of a call.
class Random {
 public:
  Random(FakeCall& call, const Spec& spec, uint32_t seed) : json_(ParamsJson(spec.params)) {
    const Params& p = spec.params;
    std::mt19937 engine(seed);
    std::normal_distribution<float> normal;
    const int64_t codes = spec.out * spec.in / p.group_size * p.codebooks;
    const std::vector<int64_t> shape = {spec.out, spec.in / p.group_size, p.codebooks};
    std::vector<int8_t> narrow;
    std::vector<int16_t> wide;
    for (int64_t i = 0; i < codes; ++i) {
      const int code = static_cast<int>(engine() % p.length()) - p.length() / 2;
      narrow.push_back(static_cast<int8_t>(code));
      wide.push_back(static_cast<int16_t>(code));
    }
    tensors_[0] = {"codes",
                   p.index_bits <= 8 ? call.Tensor(narrow, shape) : call.Tensor(wide, shape)};
    std::vector<float> books(p.values()), scales(spec.out);
    for (float& v : books) v = normal(engine);
    for (float& v : scales) v = 0.1f + 0.01f * static_cast<float>(engine() % 100);
    tensors_[1] = {"codebooks",
                   Stored(call, books, {p.codebooks, p.length(), p.group_size}, spec.dtype)};
    tensors_[2] = {"scales", Stored(call, scales, {spec.out}, spec.dtype)};
    packed_ = {kFormatName, json_.c_str(), tensors_, 3, spec.out, spec.in};
  }
  const qm_packed& get() const { return packed_; }
  qm_packed& mutable_packed() { return packed_; }
  qm_named_tensor* tensors() { return tensors_; }

  static qm_tensor Stored(FakeCall& call, const std::vector<float>& values,
                          const std::vector<int64_t>& shape, qm_dtype dtype) {
    if (dtype == QM_F32) return call.Tensor(values, shape);
    std::vector<qm::F16> half;
    std::vector<qm::BF16> brain;
    for (const float v : values) {
      half.push_back(qm::ToF16(v));
      brain.push_back(qm::ToBF16(v));
    }
    return dtype == QM_F16 ? call.Tensor(half, shape) : call.Tensor(brain, shape);
  }

 private:
  std::string json_;
  qm_named_tensor tensors_[3];
  qm_packed packed_;
};

const Spec kSpecs[] = {
    {24, 64, {2, 8, 8}, QM_F16},  {300, 64, {2, 8, 8}, QM_F16},   // few outputs; a table
    {200, 40, {1, 8, 8}, QM_F32}, {150, 48, {3, 8, 6}, QM_BF16},  // a table of 64 entries
    {40, 64, {1, 8, 16}, QM_F16}, {9, 15, {2, 5, 3}, QM_F32},
};

const qm_linear_kernel& Kernel() { return Ext<qm_linear_kernel>(QM_EXT_LINEAR_KERNEL); }

TEST(AqlmKernel, DequantizeIsTheDefinition) {
  for (const Spec& spec : kSpecs) {
    FakeCall call;
    call.Threads(3);
    Random weight(call, spec, 1);
    std::vector<float> values(spec.out * spec.in, NAN);
    qm_tensor out = qm::MakeMatrix(values.data(), spec.out, spec.in, spec.in, kHost);
    ASSERT_EQ(Kernel().dequantize(call.get(), &weight.get(), &out), QM_OK) << call.error();
    EXPECT_EQ(values, Dequantized(call, weight.get()));
  }
}

TEST(AqlmKernel, ProductWithFewRows) {
  std::mt19937 engine(2);
  std::normal_distribution<float> normal;
  for (const Spec& spec : kSpecs) {
    for (const int64_t rows : {1, 3, 8}) {
      FakeCall call;
      call.Threads(2);
      Random weight(call, spec, 2);
      std::vector<float> x(rows * spec.in), y(rows * spec.out, NAN);
      for (float& v : x) v = normal(engine);
      const qm_tensor in = qm::MakeMatrix(x.data(), rows, spec.in, spec.in, kHost);
      qm_tensor out = qm::MakeMatrix(y.data(), rows, spec.out, spec.out, kHost);
      ASSERT_EQ(Kernel().matmul(call.get(), &weight.get(), &in, nullptr, &out), QM_OK)
          << call.error();
      const std::vector<float> w = Dequantized(call, weight.get());
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t o = 0; o < spec.out; ++o) {
          double sum = 0, size = 0;
          for (int64_t i = 0; i < spec.in; ++i) {
            sum += double{x[r * spec.in + i]} * w[o * spec.in + i];
            size += std::abs(double{x[r * spec.in + i]} * w[o * spec.in + i]);
          }
          // Each of the sums of M in products is rounded; vectors of opposite sign cancel in w.
          const double terms = static_cast<double>(spec.in * spec.params.codebooks) + 2;
          EXPECT_NEAR(y[r * spec.out + o], sum, terms * 0x1p-24 * (size + 20)) << rows;
        }
      }
    }
  }
}

TEST(AqlmKernel, ManyRowsAreLeftToTheHost) {
  FakeCall call;
  const Spec spec;
  Random weight(call, spec, 3);
  std::vector<float> x(9 * spec.in), y(9 * spec.out);
  const qm_tensor in = qm::MakeMatrix(x.data(), 9, spec.in, spec.in, kHost);
  qm_tensor out = qm::MakeMatrix(y.data(), 9, spec.out, spec.out, kHost);
  EXPECT_EQ(Kernel().matmul(call.get(), &weight.get(), &in, nullptr, &out), QM_UNIMPLEMENTED);
}

TEST(AqlmFormat, DamageIsNamed) {
  const auto& format = Ext<qm_format>(QM_EXT_FORMAT);
  const auto refused = [&](const Spec& spec, auto damage, const std::string& word) {
    FakeCall call;
    Random weight(call, spec, 4);
    ASSERT_EQ(format.check(call.get(), &weight.get()), QM_OK) << call.error();
    damage(weight);
    EXPECT_EQ(format.check(call.get(), &weight.get()), QM_INVALID_ARGUMENT) << word;
    EXPECT_NE(call.error().find(word), std::string::npos) << call.error();
  };
  const Spec f32 = {4, 16, {2, 4, 3}, QM_F32};
  const auto put = [](Random& w, int which, int64_t at, float value) {
    static_cast<float*>(w.tensors()[which].tensor.data)[at] = value;
  };
  refused(
      f32, [&](Random& w) { put(w, 1, 5, NAN); }, "codebooks");
  refused(
      f32, [&](Random& w) { put(w, 2, 1, INFINITY); }, "scales");
  refused(
      f32, [](Random& w) { static_cast<int8_t*>(w.tensors()[0].tensor.data)[3] = 4; }, "code 3");
  refused(
      f32, [](Random& w) { w.mutable_packed().in_features = 18; }, "features");
  refused(
      f32, [](Random& w) { w.mutable_packed().out_features = 5; }, "codes");
  refused(
      f32, [](Random& w) { w.mutable_packed().tensor_count = 2; }, "no tensor 'scales'");
  refused(
      f32, [](Random& w) { w.tensors()[2].name = "zeros"; }, "zeros");
  refused(
      f32, [](Random& w) { w.tensors()[1].name = "codes"; }, "two tensors");
  refused(
      f32, [](Random& w) { w.tensors()[0].tensor.dtype = QM_U8; }, "codes");
  for (const char* json : {"{}", R"({"codebooks":0,"group_size":4,"index_bits":3})",
                           R"({"codebooks":2, "group_size":4,"index_bits":3})",
                           R"({"codebooks":2,"group_size":4,"index_bits":17})",
                           R"({"codebooks":2,"group_size":4,"index_bits":3}x)"}) {
    refused(
        f32, [&](Random& w) { w.mutable_packed().format_json = json; }, "expected e.g.");
  }
}

// Vahe1994/AQLM inference.py: codes [out, in / d, M] as signed integers, codebooks
// [M, 2^B, 1, d], scales [out, 1, 1, 1].
TEST(AqlmCheckpoint, LayoutAndWayBack) {
  const auto& format = Ext<qm_format>(QM_EXT_FORMAT);
  for (const Spec& spec : kSpecs) {
    FakeCall call, back;
    Random weight(call, spec, 5);
    const qm_named_tensor* tensors = nullptr;
    uint64_t count = 0;
    const char* config = nullptr;
    ASSERT_EQ(
        format.to_checkpoint(call.get(), "aqlm", "l", &weight.get(), &tensors, &count, &config),
        QM_OK)
        << call.error();
    ASSERT_EQ(count, 3u);
    EXPECT_EQ(config, ParamsJson(spec.params));
    const Params& p = spec.params;
    const std::vector<std::vector<int64_t>> shapes = {
        {spec.out, spec.in / p.group_size, p.codebooks},
        {p.codebooks, p.length(), 1, p.group_size},
        {spec.out, 1, 1, 1}};
    for (int i = 0; i < 3; ++i) {
      const qm_tensor &stored = tensors[i].tensor, &own = weight.tensors()[i].tensor;
      EXPECT_STREQ(tensors[i].name, weight.tensors()[i].name);
      EXPECT_EQ(stored.dtype, own.dtype);
      ASSERT_EQ(stored.rank, static_cast<int>(shapes[i].size()));
      int64_t bytes = qm::ElementSize(own.dtype);
      for (size_t a = 0; a < shapes[i].size(); ++a) {
        EXPECT_EQ(stored.shape[a], shapes[i][a]);
        bytes *= shapes[i][a];
      }
      EXPECT_EQ(std::memcmp(stored.data, own.data, bytes), 0);
    }
    qm_packed read = {};
    ASSERT_EQ(format.from_checkpoint(back.get(), "aqlm", "l", tensors, count, config, &read), QM_OK)
        << back.error();
    EXPECT_EQ(Dequantized(back, read), Dequantized(call, weight.get()));
    EXPECT_EQ(read.out_features, spec.out);
    EXPECT_EQ(read.in_features, spec.in);
  }
}

// Indices 0, 127, 128, 255 of a codebook of 256 are stored as 0, 127, -128, -1.
TEST(AqlmCheckpoint, CodesWrapAround) {
  for (const auto& [index, code] : {std::pair{0, 0}, {127, 127}, {128, -128}, {255, -1}}) {
    EXPECT_EQ(CodeOfIndex(index, 8), code);
    const int8_t stored = static_cast<int8_t>(code);
    EXPECT_EQ(LoadIndex(&stored, 8, 0), index);
  }
  const int16_t last = -1;
  EXPECT_EQ(LoadIndex(&last, 16, 0), 65535);
  EXPECT_EQ(CodeOfIndex(40000, 16), 40000 - 65536);
}

TEST(AqlmCheckpoint, WrongFilesAreRefused) {
  const auto& format = Ext<qm_format>(QM_EXT_FORMAT);
  FakeCall call;
  Random weight(call, {}, 6);
  const qm_named_tensor* tensors = nullptr;
  uint64_t count = 0;
  const char* config = nullptr;
  ASSERT_EQ(format.to_checkpoint(call.get(), "aqlm", "l", &weight.get(), &tensors, &count, &config),
            QM_OK);
  qm_packed read = {};
  const auto from = [&](const qm_named_tensor* t, uint64_t n, const char* json) {
    return format.from_checkpoint(call.get(), "aqlm", "l", t, n, json, &read);
  };
  EXPECT_EQ(from(tensors, 2, config), QM_INVALID_ARGUMENT);
  EXPECT_EQ(from(tensors, 3, R"({"codebooks":1,"group_size":8,"index_bits":8})"),
            QM_INVALID_ARGUMENT);
  EXPECT_EQ(from(tensors, 3, R"({"codebooks":2,"group_size":8,"index_bits":16})"),
            QM_INVALID_ARGUMENT);
  std::vector<qm_named_tensor> other(tensors, tensors + 3);
  other[1].tensor.shape[2] = 2;  // out_group_size 2
  EXPECT_EQ(from(other.data(), 3, config), QM_INVALID_ARGUMENT);
  other[1] = tensors[1];
  other[2].tensor.shape[0] = 23;
  EXPECT_EQ(from(other.data(), 3, config), QM_INVALID_ARGUMENT);
  EXPECT_EQ(format.can_store(call.get(), "gptq", config, 24, 64), QM_FAILED_PRECONDITION);
  EXPECT_EQ(format.can_store(call.get(), "aqlm", config, 24, 60), QM_FAILED_PRECONDITION);
  EXPECT_EQ(format.can_store(call.get(), "aqlm", config, 24, 64), QM_OK);
}

}  // namespace
}  // namespace quantmill::aqlm::testing
