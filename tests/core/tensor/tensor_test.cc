#include "core/tensor/tensor.h"

#include <memory>

#include "gtest/gtest.h"

namespace quantmill {
namespace {

TEST(ShapeTest, Basics) {
  EXPECT_EQ(Shape().elements(), 1);
  EXPECT_EQ(Shape().ToString(), "[]");
  EXPECT_EQ((Shape{2, 3}).elements(), 6);
  EXPECT_EQ((Shape{2, 0, 3}).elements(), 0);
  EXPECT_EQ((Shape{384, 1024}).ToString(), "[384, 1024]");
  EXPECT_FALSE((Shape{2}) == (Shape{2, 1}));
}

TEST(TensorTest, HostMemoryIsAligned) {
  for (const int64_t rows : {0, 1, 1000}) {
    const Tensor tensor = Tensor::HostZeros(DType::kI8, {rows, 3}).value();
    EXPECT_EQ(reinterpret_cast<uintptr_t>(tensor.data()) % 256, 0u);
    EXPECT_EQ(tensor.bytes(), rows * 3);
    for (int64_t i = 0; i < tensor.elements(); ++i) ASSERT_EQ(tensor.as<int8_t>()[i], 0);
  }
  EXPECT_EQ(Tensor::Host(DType::kF64, {int64_t{1} << 50}).status().code(),
            absl::StatusCode::kResourceExhausted);
}

TEST(TensorTest, EmptyMeansDefaultConstructed) {
  EXPECT_TRUE(Tensor().empty());
  EXPECT_FALSE(Tensor::FromF32({}, {1.0f}).empty());
  EXPECT_FALSE(Tensor::Host(DType::kF32, {0, 4})->empty());
}

TEST(TensorTest, RowsAndReshapedShareMemoryAndOwnership) {
  Tensor rows;
  {
    const Tensor whole = Tensor::FromI32({3, 2}, {0, 1, 2, 3, 4, 5});
    rows = whole.Rows(1, 3);
    EXPECT_EQ(whole.Reshaped({6}).as<int32_t>()[5], 5);
    EXPECT_EQ(whole.Rows(3, 3).elements(), 0);
  }
  EXPECT_EQ(rows.shape(), (Shape{2, 2}));
  EXPECT_EQ(rows.as<int32_t>()[0], 2);
  EXPECT_EQ(rows.as<int32_t>()[3], 5);
}

TEST(TensorTest, ViewForTheAbi) {
  const Tensor tensor = Tensor::FromF32({2, 3}, {0, 1, 2, 3, 4, 5});
  const qm_tensor view = tensor.View();
  EXPECT_EQ(view.data, tensor.data());
  EXPECT_EQ(view.dtype, QM_F32);
  EXPECT_EQ(view.rank, 2);
  EXPECT_EQ(view.shape[1], 3);
  EXPECT_EQ(view.stride[0], 3);
  EXPECT_EQ(view.stride[1], 1);
  EXPECT_EQ(view.shape[3], 1);
  EXPECT_EQ(view.flags, 0u);
  auto owner = std::make_shared<int>(7);
  const Tensor mapped(owner, owner.get(), DType::kI32, {1}, Device{}, /*read_only=*/true);
  EXPECT_EQ(owner.use_count(), 2);
  EXPECT_EQ(mapped.View().flags, static_cast<uint32_t>(QM_TENSOR_READONLY));
  EXPECT_EQ(Tensor::Host(DType::kF32, {0})->View().data, nullptr);
}

TEST(DeviceTest, Names) {
  EXPECT_EQ(DeviceName(Device{}), "cpu");
  EXPECT_EQ(DeviceName(Device{QM_CUDA, 3}), "cuda:3");
}

}  // namespace
}  // namespace quantmill
