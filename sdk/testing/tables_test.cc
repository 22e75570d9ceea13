// Tables built from classes: no exception leaves them, and what a class lacks is absent.
#include "quantmill/sdk/tables.hpp"

#include <gtest/gtest.h>

#include <new>
#include <stdexcept>
#include <string>

#include "quantmill/sdk/plugin.hpp"
#include "quantmill/testing/fake_call.hpp"

namespace {

using qm::testing::FakeCall;

// Whatever the arguments: throws a std::exception, std::bad_alloc or an int, by `kind`.
int kind = 0;
struct Throws {
  template <class... Arguments>
  static qm_status Any(Arguments&&...) {
    if (kind == 1) throw std::bad_alloc();
    if (kind == 2) throw 7;
    throw std::runtime_error("thrown");
  }
};

struct ThrowingQuantizer {
  static qm_status Plan(qm_call*, const qm_linear_info&, qm_quant_plan*) { return Throws::Any(); }
  static qm_status Run(qm_call*, const qm_linear_info&, const qm_tensor&, const qm_stats*,
                       qm_packed*) {
    return Throws::Any();
  }
  static qm_status RunGroup(qm_call*, uint64_t, const qm_linear_info* const*, const qm_tensor*,
                            const qm_stats* const*, qm_packed*) {
    return Throws::Any();
  }
};

struct ThrowingTransform {
  static qm_status Plan(qm_call*, const qm_block_info&, qm_quant_plan*) { return Throws::Any(); }
  static qm_status Run(qm_call*, const qm_block_info&, const qm_stats* const*, const qm_edit**,
                       uint64_t*) {
    return Throws::Any();
  }
};

struct ThrowingTune {
  static qm_status Plan(qm_call*, const qm_block_info&, qm_quant_plan*) { return Throws::Any(); }
  static qm_status Run(qm_call*, const qm_block_info&, const qm_packed*, const qm_edit**,
                       uint64_t*) {
    return Throws::Any();
  }
};

struct ThrowingReparam {
  static qm_status Plan(qm_call*, const qm_reparam_info&, qm_reparam_plan*) {
    return Throws::Any();
  }
  static qm_status Init(qm_call*, const qm_reparam_info&, const qm_tensor*, const qm_stats*,
                        qm_named_tensor*, uint64_t) {
    return Throws::Any();
  }
  static qm_status Forward(qm_call*, const qm_reparam_info&, const qm_tensor&,
                           const qm_named_tensor*, uint64_t, void*, qm_tensor*) {
    return Throws::Any();
  }
  static qm_status Vjp(qm_call*, const qm_reparam_info&, const qm_tensor&, const qm_named_tensor*,
                       uint64_t, const void*, const qm_tensor&, qm_tensor*, qm_named_tensor*) {
    return Throws::Any();
  }
};

struct FoldingReparam : ThrowingReparam {
  static qm_status Finalize(qm_call*, const qm_reparam_info&, const qm_tensor*,
                            const qm_named_tensor*, uint64_t, qm_packed*) {
    return Throws::Any();
  }
};

struct SmallKernel {
  static int32_t Accepts(const char*, const char*, qm_device_kind, int32_t, qm_dtype) {
    return Throws::Any();
  }
  static qm_status Dequantize(qm_call*, const qm_packed&, qm_tensor*) { return Throws::Any(); }
};

struct FullKernel : SmallKernel {
  static qm_status Prepack(qm_call*, const qm_packed&, qm_packed*) { return Throws::Any(); }
  static uint64_t WorkspaceBytes(const qm_packed&, int64_t max_rows) noexcept {
    return 8 * static_cast<uint64_t>(max_rows);
  }
  static qm_status Matmul(qm_call*, const qm_packed&, const qm_tensor&, void*, qm_tensor*) {
    return Throws::Any();
  }
  static qm_status MatmulTransposed(qm_call*, const qm_packed&, const qm_tensor&, void*,
                                    qm_tensor*) {
    return Throws::Any();
  }
};

struct ThrowingFormat {
  static constexpr char kFormatId[] = "org.example.fmt.x/1";
  static constexpr const char* kTargets[] = {"one", "two"};
  static constexpr uint64_t kFlags = QM_FORMAT_CONCAT_ROWS;
  static qm_status Check(qm_call*, const qm_packed&) { return Throws::Any(); }
  static qm_status CanStore(qm_call*, const char*, const char*, int64_t, int64_t) {
    return Throws::Any();
  }
  static qm_status ToCheckpoint(qm_call*, const char*, const char*, const qm_packed&,
                                const qm_named_tensor**, uint64_t*, const char**) {
    return Throws::Any();
  }
  static qm_status FromCheckpoint(qm_call*, const char*, const char*, const qm_named_tensor*,
                                  uint64_t, const char*, qm_packed*) {
    return Throws::Any();
  }
};

// Calls `function` with each kind of exception behind it.
template <class Function>
void ExpectContained(Function function) {
  const qm_status expected[] = {QM_INTERNAL, QM_RESOURCE_EXHAUSTED, QM_INTERNAL};
  for (kind = 0; kind < 3; ++kind) {
    FakeCall call;
    EXPECT_EQ(function(call.get()), expected[kind]) << kind;
    EXPECT_FALSE(call.error().empty());
    EXPECT_EQ(call.error() == "thrown", kind == 0);
  }
  kind = 0;
}

TEST(SdkTables, NothingIsThrownAcrossTheBoundary) {
  constexpr auto quantize = qm::QuantizeLinearTable<ThrowingQuantizer>::Make();
  constexpr auto transform = qm::BlockTransformTable<ThrowingTransform>::Make();
  constexpr auto tune = qm::BlockTuneTable<ThrowingTune>::Make();
  const qm_linear_info linear = {};
  const qm_block_info block = {};
  const qm_tensor tensor = {};
  ExpectContained([&](qm_call* c) { return quantize.plan(c, &linear, nullptr); });
  ExpectContained([&](qm_call* c) { return quantize.run(c, &linear, &tensor, nullptr, nullptr); });
  ExpectContained(
      [&](qm_call* c) { return quantize.run_group(c, 0, nullptr, nullptr, nullptr, nullptr); });
  ExpectContained([&](qm_call* c) { return transform.plan(c, &block, nullptr); });
  ExpectContained([&](qm_call* c) { return transform.run(c, &block, nullptr, nullptr, nullptr); });
  ExpectContained([&](qm_call* c) { return tune.plan(c, &block, nullptr); });
  ExpectContained([&](qm_call* c) { return tune.run(c, &block, nullptr, nullptr, nullptr); });
}

TEST(SdkTables, ReparametrizeContainsExceptionsAndFoldsOnlyIfItCan) {
  constexpr auto table = qm::ReparametrizeTable<FoldingReparam>::Make();
  const qm_reparam_info info = {};
  const qm_tensor t = {};
  ExpectContained([&](qm_call* c) { return table.plan(c, &info, nullptr); });
  ExpectContained([&](qm_call* c) { return table.init(c, &info, &t, nullptr, nullptr, 0); });
  ExpectContained(
      [&](qm_call* c) { return table.forward(c, &info, &t, nullptr, 0, nullptr, nullptr); });
  ExpectContained([&](qm_call* c) {
    return table.vjp(c, &info, &t, nullptr, 0, nullptr, &t, nullptr, nullptr);
  });
  ExpectContained([&](qm_call* c) { return table.finalize(c, &info, &t, nullptr, 0, nullptr); });
  EXPECT_EQ(qm::ReparametrizeTable<ThrowingReparam>::Make().finalize, nullptr);
}

TEST(SdkTables, KernelContainsExceptionsAndLacksWhatTheClassLacks) {
  constexpr auto table = qm::LinearKernelTable<FullKernel>::Make();
  const qm_packed packed = {};
  const qm_tensor t = {};
  EXPECT_EQ(table.accepts("", "", QM_CPU, 0, QM_F32), 0);
  EXPECT_EQ(table.workspace_bytes(&packed, 3), 24u);
  ExpectContained([&](qm_call* c) { return table.dequantize(c, &packed, nullptr); });
  ExpectContained([&](qm_call* c) { return table.prepack(c, &packed, nullptr); });
  ExpectContained([&](qm_call* c) { return table.matmul(c, &packed, &t, nullptr, nullptr); });
  ExpectContained(
      [&](qm_call* c) { return table.matmul_transposed(c, &packed, &t, nullptr, nullptr); });
  constexpr auto small = qm::LinearKernelTable<SmallKernel>::Make();
  EXPECT_EQ(small.prepack, nullptr);
  EXPECT_EQ(small.workspace_bytes, nullptr);
  EXPECT_EQ(small.matmul, nullptr);
  EXPECT_EQ(small.matmul_transposed, nullptr);
}

TEST(SdkTables, FormatContainsExceptionsAndListsItsTargets) {
  constexpr auto table = qm::FormatTable<ThrowingFormat>::Make();
  const qm_packed packed = {};
  EXPECT_STREQ(table.format_id, "org.example.fmt.x/1");
  ASSERT_EQ(table.target_count, 2u);
  EXPECT_STREQ(table.targets[1], "two");
  EXPECT_EQ(table.flags, QM_FORMAT_CONCAT_ROWS);
  ExpectContained([&](qm_call* c) { return table.check(c, &packed); });
  ExpectContained([&](qm_call* c) { return table.can_store(c, "", "", 1, 1); });
  ExpectContained([&](qm_call* c) {
    return table.to_checkpoint(c, "", "", &packed, nullptr, nullptr, nullptr);
  });
  ExpectContained(
      [&](qm_call* c) { return table.from_checkpoint(c, "", "", nullptr, 0, "", nullptr); });
}

}  // namespace
