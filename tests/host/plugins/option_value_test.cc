#include "host/plugins/option_value.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace quantmill {
namespace {

using ::testing::HasSubstr;

OptionInfo Option(qm_option_type type, const std::string& choices) {
  return {"x", type, true, "", choices, ""};
}

std::string Value(qm_option_type type, const std::string& choices, const std::string& text) {
  const auto value = CheckOptionValue(Option(type, choices), text);
  return value.ok() ? *value : "error: " + std::string(value.status().message());
}

TEST(OptionValueTest, Integers) {
  EXPECT_EQ(Value(QM_OPT_I64, "", "-1"), "-1");
  EXPECT_EQ(Value(QM_OPT_I64, "", "+7"), "7");
  EXPECT_EQ(Value(QM_OPT_I64, "2|3|4|8", "4"), "4");
  EXPECT_EQ(Value(QM_OPT_I64, "2|3|4|8", "5"), "error: x must be one of 2, 3, 4, 8, not 5");
  EXPECT_EQ(Value(QM_OPT_I64, "1..64", "64"), "64");
  EXPECT_EQ(Value(QM_OPT_I64, "1..64", "65"), "error: x must be in 1..64, not 65");
  EXPECT_EQ(Value(QM_OPT_I64, "1..", "1000000"), "1000000");
  EXPECT_EQ(Value(QM_OPT_I64, "1..", "0"), "error: x must be in 1.., not 0");
  for (const char* text : {"", "4.5", "four", "99999999999999999999", "4 bits"}) {
    EXPECT_THAT(Value(QM_OPT_I64, "", text), HasSubstr("wants a whole number")) << text;
  }
}

TEST(OptionValueTest, Reals) {
  EXPECT_EQ(Value(QM_OPT_F64, "", "0.01"), "0.01");
  EXPECT_EQ(Value(QM_OPT_F64, "", "1e-2"), "0.01");
  EXPECT_EQ(Value(QM_OPT_F64, "0..1", "1"), "1");
  EXPECT_THAT(Value(QM_OPT_F64, "0..1", "1.01"), HasSubstr("must be in 0..1"));
  for (const char* text : {"", "nan", "inf", "-inf", "x"}) {
    EXPECT_THAT(Value(QM_OPT_F64, "", text), HasSubstr("wants a number")) << text;
  }
}

TEST(OptionValueTest, Booleans) {
  for (const char* text : {"true", "True", "yes", "on", "1"}) {
    EXPECT_EQ(Value(QM_OPT_BOOL, "", text), "true");
  }
  for (const char* text : {"false", "FALSE", "no", "off", "0"}) {
    EXPECT_EQ(Value(QM_OPT_BOOL, "", text), "false");
  }
  EXPECT_EQ(Value(QM_OPT_BOOL, "", "maybe"), "error: x wants true or false, not 'maybe'");
}

TEST(OptionValueTest, ChoicesNameTheNearest) {
  EXPECT_EQ(Value(QM_OPT_ENUM, "rtn|mse|percentile", "mse"), "mse");
  EXPECT_EQ(Value(QM_OPT_ENUM, "rtn|mse|percentile", "percentil"),
            "error: x must be one of rtn, mse, percentile, not 'percentil'; did you mean "
            "'percentile'?");
}

TEST(OptionValueTest, TextIsBounded) {
  EXPECT_EQ(Value(QM_OPT_STR, "", ""), "");
  EXPECT_THAT(Value(QM_OPT_STR, "", std::string(5000, 'x')), HasSubstr("the limit is 4096"));
}

TEST(OptionInfoTest, RefusesTablesThatCannotBeRead) {
  EXPECT_FALSE(CheckOptionInfo({"", QM_OPT_STR, true, "", "", ""}).ok());
  EXPECT_FALSE(CheckOptionInfo({"x", 9, true, "", "", ""}).ok());
  EXPECT_FALSE(CheckOptionInfo({"x", QM_OPT_ENUM, true, "", "", ""}).ok());
  EXPECT_FALSE(CheckOptionInfo({"x", QM_OPT_I64, true, "", "low..high", ""}).ok());
  EXPECT_FALSE(CheckOptionInfo({"x", QM_OPT_I64, true, "", "9..1", ""}).ok());
  EXPECT_FALSE(CheckOptionInfo({"x", QM_OPT_I64, false, "5", "1|2", ""}).ok());
  EXPECT_TRUE(CheckOptionInfo({"x", QM_OPT_I64, false, "2", "1|2", ""}).ok());
}

}  // namespace
}  // namespace quantmill
