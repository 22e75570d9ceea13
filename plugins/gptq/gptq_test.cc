#include <gtest/gtest.h>
TEST(Gptq, Builds) {}
