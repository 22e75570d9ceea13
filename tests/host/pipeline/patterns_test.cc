#include "host/pipeline/patterns.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "host/pipeline/device.h"

namespace quantmill {
namespace {

bool Matches(const std::string& pattern, const std::string& name) {
  const auto compiled = LayerPattern::Compile(pattern);
  EXPECT_TRUE(compiled.ok()) << compiled.status();
  return compiled.ok() && compiled->Matches(name);
}

TEST(LayerPatternTest, Globs) {
  const std::string name = "model.layers.3.mlp.down_proj";
  EXPECT_TRUE(Matches("*", name));
  EXPECT_TRUE(Matches(name, name));
  EXPECT_TRUE(Matches("*.mlp.*", name));
  EXPECT_TRUE(Matches("model.layers.?.mlp.down_proj", name));
  EXPECT_FALSE(Matches("model.layers.?.mlp.down_proj", "model.layers.13.mlp.down_proj"));
  EXPECT_FALSE(Matches("mlp.down_proj", name));
  EXPECT_FALSE(Matches("model?layers", "model"));
  // Everything but '*' and '?' stands for itself.
  EXPECT_FALSE(Matches("model.layers.3", "modelxlayersx3"));
  EXPECT_FALSE(Matches("[a-z]", "a"));
  EXPECT_TRUE(Matches("a(b|c)+\\", "a(b|c)+\\"));
}

TEST(LayerPatternTest, RegularExpressionsMatchInFull) {
  EXPECT_TRUE(Matches("re:.*\\.[1-3]\\.mlp\\..*", "model.layers.3.mlp.down_proj"));
  EXPECT_FALSE(Matches("re:mlp", "model.layers.3.mlp.down_proj"));
  EXPECT_TRUE(Matches("re:(a+)+", std::string(30, 'a')));
}

TEST(LayerPatternTest, BadPatternsAreErrors) {
  for (const char* text : {"", "re:", "re:(", "re:(?=x)", "re:a{1000}{1000}"}) {
    EXPECT_FALSE(LayerPattern::Compile(text).ok()) << text;
  }
  EXPECT_FALSE(LayerPattern::Compile(std::string(2000, '*')).ok());
}

TEST(DeviceTest, Spellings) {
  EXPECT_EQ(ParseDevice("auto")->kind, DeviceChoice::Kind::kAuto);
  EXPECT_EQ(ParseDevice("cpu")->kind, DeviceChoice::Kind::kCpu);
  EXPECT_EQ(ParseDevice("cuda")->index, 0);
  EXPECT_EQ(ParseDevice("cuda:3")->index, 3);
  for (const char* text :
       {"", "gpu", "cuda:", "cuda:-1", "cuda: 1", "cuda:1x", "cuda:99999", "CPU"}) {
    EXPECT_FALSE(ParseDevice(text).ok()) << text;
  }
  EXPECT_THAT(ParseDevice("cude:0").status().message(),
              ::testing::HasSubstr("did you mean 'cuda:0'?"));
}

}  // namespace
}  // namespace quantmill
