#include "host/plugins/catalog.h"

#include <stdlib.h>

#include <chrono>
#include <filesystem>
#include <fstream>

#include "absl/strings/match.h"
#include "core/io/files.h"
#include "core/io/json.h"
#include "core/io/sha256.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "host/plugins/inspect_child.h"
#include "host/plugins/manifest.h"
#include "host/plugins/registry.h"
#include "tests/support/shared_data.h"

namespace quantmill {
namespace {

namespace fs = std::filesystem;
using ::testing::HasSubstr;

std::string Fake(const std::string& name) {
  return std::string(QM_FAKE_PLUGIN_DIR) + "/libqm_" + name + ".so";
}

// A search path and a cache of its own for each test.
class CatalogTest : public ::testing::Test {
 protected:
  void SetUp() override {
    folder_ = testing::MakeTempDir();
    setenv("XDG_CACHE_HOME", (folder_ + "/cache").c_str(), 1);
    unsetenv("QUANTMILL_PLUGIN_PATH");
  }
  std::string CopyFake(const std::string& name, const std::string& to) {
    fs::create_directories(folder_ + "/" + to);
    const std::string target = folder_ + "/" + to + "/libqm_" + name + ".so";
    fs::copy_file(Fake(name), target);
    return target;
  }
  // Entry of `path` in a catalog of these files.
  static PluginInfo Find(const std::string& path) {
    const auto catalog = DiscoverPlugins({path});
    EXPECT_TRUE(catalog.ok()) << catalog.status();
    for (const PluginInfo& plugin : catalog->plugins) {
      if (plugin.path == path) return plugin;
    }
    ADD_FAILURE() << path << " is not in the catalog";
    return {};
  }

  std::string folder_;
};

struct HostileCase {
  const char* name;
  const char* reason;
};

class HostileTest : public CatalogTest, public ::testing::WithParamInterface<HostileCase> {};

TEST_P(HostileTest, IsRejectedWithItsReason) {
  const PluginInfo info = Find(Fake(GetParam().name));
  EXPECT_THAT(info.rejected, HasSubstr(GetParam().reason));
  EXPECT_TRUE(info.methods.empty());
}

INSTANTIATE_TEST_SUITE_P(
    All, HostileTest,
    ::testing::Values(HostileCase{"no_symbol", "it has no qm_plugin_entry_v1"},
                      HostileCase{"null_descriptor", "returned NULL"},
                      HostileCase{"wrong_major", "built for ABI major 2; this host has 1"},
                      HostileCase{"newer_minor", "use a newer quantmill"},
                      HostileCase{"short_struct", "struct_size is 24, less than"},
                      HostileCase{"null_vendor", "vendor is NULL"},
                      HostileCase{"many_methods", "method_count is 2147483647"},
                      HostileCase{"null_methods", "methods is NULL"},
                      HostileCase{"null_id", "methods[0]: id is NULL"},
                      HostileCase{"bad_id", "method id 'Bad Id'"},
                      HostileCase{"bad_text", "summary is not UTF-8"},
                      HostileCase{"overlong_text", "summary is not UTF-8"},
                      HostileCase{"many_options", "option_count is 281474976710655"},
                      HostileCase{"bad_default",
                                  "default of option bits does not fit: bits must be one of"},
                      HostileCase{"null_ext", "ext is NULL"},
                      HostileCase{"short_table", "the table of qm.quantize-linear/1 is too short"},
                      HostileCase{"crash_in_constructor", "signal 11"}),
    [](const auto& info) { return std::string(info.param.name); });

// Whatever the cache holds of a usual run, and without a trace in it for the next.
TEST_F(CatalogTest, AuthorModeNamesTheRule) {
  const std::pair<const char*, const char*> rules[] = {
      {"no_symbol", "qm-a-001"}, {"bad_default", "qm-p-016"}, {"null_vendor", "qm-p-002"}};
  for (const auto& [name, anchor] : rules) {
    const std::string note = std::string("RULES.md#") + anchor;
    EXPECT_THAT(Find(Fake(name)).rejected, ::testing::Not(HasSubstr("this breaks"))) << name;
    setenv("QM_STRICT", "1", 1);
    EXPECT_THAT(Find(Fake(name)).rejected, HasSubstr(note));
    unsetenv("QM_STRICT");
    EXPECT_THAT(Find(Fake(name)).rejected, ::testing::Not(HasSubstr("this breaks"))) << name;
  }
  // Made for another host: no rule is broken.
  setenv("QM_STRICT", "1", 1);
  EXPECT_THAT(Find(Fake("wrong_major")).rejected, ::testing::Not(HasSubstr("this breaks")));
  unsetenv("QM_STRICT");
}

TEST_F(CatalogTest, HangIsCutOff) {
  const auto start = std::chrono::steady_clock::now();
  const auto result = InspectInChild(QM_PROGRAM, Fake("hang_at_load"), 0.5);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_THAT(result->info.rejected, HasSubstr("did not load within 0.5 s"));
  EXPECT_FALSE(result->lasting);
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(5));
}

TEST_F(CatalogTest, MissingProgramIsAnErrorOfTheHost) {
  EXPECT_THAT(InspectInChild("/nonexistent/quantmill", Fake("good"), 5).status().message(),
              HasSubstr("cannot run /nonexistent/quantmill"));
}

TEST_F(CatalogTest, DescribesAGoodPlugin) {
  const PluginInfo info = Find(Fake("good"));
  EXPECT_EQ(info.rejected, "");
  EXPECT_EQ(info.sha256, Sha256OfFile(Fake("good")).value());
  EXPECT_EQ(info.vendor, "example");
  ASSERT_EQ(info.methods.size(), 1u);
  const MethodInfo& method = info.methods[0];
  EXPECT_EQ(method.id, "org.example.good");
  EXPECT_TRUE(method.Has("qm.quantize-linear/1"));
  EXPECT_FALSE(method.Has("qm.quantize-linear/10"));
  EXPECT_FALSE(method.Has("qm.block-transform/1"));
  ASSERT_EQ(method.formats.size(), 1u);
  EXPECT_THAT(method.formats[0].targets, ::testing::ElementsAre("good-target"));
  ASSERT_EQ(method.options.size(), 4u);
  EXPECT_EQ(method.options[1].choices, "0..1");
  EXPECT_TRUE(method.options[3].required);
}

TEST_F(CatalogTest, JsonKeepsEverything) {
  const auto info = DescribePlugin(Fake("good"));
  ASSERT_TRUE(info.ok()) << info.status();
  const auto again = PluginInfoFromJson(ToJson(*info));
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(ToJson(*again), ToJson(*info));
  EXPECT_EQ(again->sha256, info->sha256);
  EXPECT_TRUE(again->methods[0].options[3].required);
}

TEST_F(CatalogTest, DamagedJsonIsRefused) {
  const nlohmann::json good = ToJson(*DescribePlugin(Fake("good")));
  for (const auto& item : good.items()) {
    nlohmann::json missing = good, wrong = good;
    missing.erase(item.key());
    wrong[item.key()] = nlohmann::json::array({nlohmann::json::object()});
    EXPECT_FALSE(PluginInfoFromJson(missing).ok()) << item.key();
    EXPECT_FALSE(PluginInfoFromJson(wrong).ok()) << item.key();
  }
  EXPECT_FALSE(PluginInfoFromJson(nlohmann::json::array()).ok());
  EXPECT_FALSE(PluginInfoFromJson(nlohmann::json(nlohmann::json::value_t::discarded)).ok());
}

TEST_F(CatalogTest, ManifestIsReadInsteadOfThePlugin) {
  const std::string plugin = CopyFake("good", "a");
  ASSERT_TRUE(WriteManifest(plugin).ok());
  // The manifest says what the file does not: proof that it is the manifest that is read.
  auto json = ReadJson(ManifestPath(plugin));
  (*json)["vendor"] = "from the manifest";
  ASSERT_TRUE(WriteFile(ManifestPath(plugin), json->dump()).ok());
  EXPECT_EQ(Find(plugin).vendor, "from the manifest");
}

TEST_F(CatalogTest, StaleManifestIsRejected) {
  const std::string plugin = CopyFake("good", "a");
  ASSERT_TRUE(WriteManifest(plugin).ok());
  std::ofstream(plugin, std::ios::app) << "x";
  EXPECT_THAT(Find(plugin).rejected, HasSubstr("manifest is stale"));
  EXPECT_THAT(Find(plugin).rejected, HasSubstr("rerun quantmill inspect --manifest " + plugin));
}

TEST_F(CatalogTest, BrokenManifestIsRejected) {
  const std::string plugin = CopyFake("good", "a");
  ASSERT_TRUE(WriteFile(ManifestPath(plugin), "{").ok());
  EXPECT_THAT(Find(plugin).rejected, HasSubstr("libqm_good.qm.json"));
}

TEST_F(CatalogTest, AnswerOfTheChildIsRemembered) {
  const std::string plugin = CopyFake("good", "a");
  EXPECT_EQ(Find(plugin).vendor, "example");
  fs::path entry;
  for (const auto& file : fs::directory_iterator(folder_ + "/cache/quantmill/plugins")) {
    const auto json = ReadJson(file.path().string());
    if (absl::StrContains((*json)["key"].get<std::string>(), plugin)) entry = file.path();
  }
  ASSERT_FALSE(entry.empty());
  auto json = ReadJson(entry.string());
  (*json)["info"]["vendor"] = "from the cache";
  ASSERT_TRUE(WriteFile(entry.string(), json->dump()).ok());
  EXPECT_EQ(Find(plugin).vendor, "from the cache");
  // A changed file is asked again.
  std::ofstream(plugin, std::ios::app) << "x";
  EXPECT_EQ(Find(plugin).vendor, "example");
  ASSERT_TRUE(WriteFile(entry.string(), "not json").ok());
  EXPECT_EQ(Find(plugin).vendor, "example");
}

TEST_F(CatalogTest, DuplicateMethodNamesBothFiles) {
  const std::string a = CopyFake("good", "a"), b = CopyFake("good", "b");
  const auto catalog = DiscoverPlugins({a, b});
  ASSERT_FALSE(catalog.ok());
  EXPECT_THAT(catalog.status().message(),
              ::testing::AllOf(HasSubstr("org.example.good"), HasSubstr(a), HasSubstr(b)));
}

TEST_F(CatalogTest, OneFileReachedTwiceIsFine) {
  const std::string a = CopyFake("good", "a");
  fs::create_directory_symlink(folder_ + "/a", folder_ + "/link");
  setenv("QUANTMILL_PLUGIN_PATH", (folder_ + "/link::" + folder_ + "/a").c_str(), 1);
  const auto catalog = DiscoverPlugins({a});
  ASSERT_TRUE(catalog.ok()) << catalog.status();
  EXPECT_NE(catalog->FindMethod("org.example.good"), nullptr);
}

TEST_F(CatalogTest, PathHoldsFoldersAndFilesInOrder) {
  const std::string good = CopyFake("good", "a");
  CopyFake("null_vendor", "b");
  CopyFake("bad_id", "b");
  ASSERT_TRUE(WriteFile(folder_ + "/b/notes.so", "text").ok());
  setenv("QUANTMILL_PLUGIN_PATH", (folder_ + "/b:" + good + ":/nonexistent").c_str(), 1);
  const auto catalog = DiscoverPlugins({});
  ASSERT_TRUE(catalog.ok()) << catalog.status();
  std::vector<std::string> names;
  for (const PluginInfo& plugin : catalog->plugins) {
    if (absl::StartsWith(plugin.path, folder_)) names.push_back(plugin.path);
  }
  EXPECT_THAT(names, ::testing::ElementsAre(folder_ + "/b/libqm_bad_id.so",
                                            folder_ + "/b/libqm_null_vendor.so", good));
  EXPECT_THAT(catalog->searched, ::testing::Contains("/nonexistent"));
  EXPECT_THAT(catalog->MethodIds(), ::testing::Contains("org.example.good"));
  EXPECT_THAT(catalog->Targets("org.example.fmt.good/1"), ::testing::ElementsAre("good-target"));
  EXPECT_TRUE(catalog->Targets("org.example.fmt.other/1").empty());
}

TEST_F(CatalogTest, MissingFileIsAnError) {
  EXPECT_THAT(DiscoverPlugins({"/nonexistent/libqm_x.so"}).status().message(),
              HasSubstr("cannot open plugin /nonexistent/libqm_x.so"));
}

TEST_F(CatalogTest, LoadsMethodsOnce) {
  const auto catalog = DiscoverPlugins({Fake("good")});
  ASSERT_TRUE(catalog.ok()) << catalog.status();
  const auto methods = LoadMethods(*catalog, {"org.example.good"});
  ASSERT_TRUE(methods.ok()) << methods.status();
  ASSERT_EQ(methods->size(), 1u);
  EXPECT_NE((*methods)[0].Ext<qm_quantize_linear>(QM_EXT_QUANTIZE_LINEAR), nullptr);
  EXPECT_EQ((*methods)[0].Ext<qm_linear_kernel>(QM_EXT_LINEAR_KERNEL), nullptr);
  EXPECT_EQ(LoadPlugin(Fake("good"))->at(0).method, (*methods)[0].method);
  EXPECT_EQ(LoadMethods(*catalog, {"nobody"}).status().code(), absl::StatusCode::kNotFound);
}

TEST_F(CatalogTest, LoadReportsWhatTheLoaderSays) {
  const std::string text = folder_ + "/libqm_text.so";
  ASSERT_TRUE(WriteFile(text, "this is no shared object").ok());
  EXPECT_THAT(LoadPlugin(text).status().message(), HasSubstr(text));
  EXPECT_EQ(LoadPlugin("/nonexistent.so").status().code(), absl::StatusCode::kNotFound);
}

}  // namespace
}  // namespace quantmill
