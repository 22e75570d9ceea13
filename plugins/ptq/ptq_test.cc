#include <gtest/gtest.h>

#include "quantmill/testing/fake_call.hpp"
TEST(Ptq, Builds) {}
