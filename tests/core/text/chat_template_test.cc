#include "core/text/chat_template.h"

#include "core/io/files.h"
#include "gtest/gtest.h"
#include "tests/support/shared_data.h"

namespace quantmill {
namespace {

constexpr char kChatMl[] =
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>' + '\\n'}}{% endfor %}";

// One turn as the model is to see it.
std::string Turn(const ChatTemplate& chat) {
  return chat.before_user + "Hi" + chat.before_reply + "Yes" + chat.after_reply;
}

TEST(ChatTemplate, RecognizesTheUsualOnes) {
  const ChatTemplate chatml = RecognizeChatTemplate(kChatMl, "<|endoftext|>");
  EXPECT_EQ(chatml.name, "chatml");
  EXPECT_EQ(Turn(chatml), "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n");
  const ChatTemplate llama = RecognizeChatTemplate(
      "{{ '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' + content + '<|eot_id|>' }}",
      "");
  EXPECT_EQ(llama.end_of_reply, "<|eot_id|>");
  EXPECT_EQ(Turn(llama),
            "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nYes<|eot_id|>");
  EXPECT_EQ(Turn(RecognizeChatTemplate("[INST] {{content}} [/INST]", "</s>")),
            "[INST] Hi [/INST]Yes</s>");
  EXPECT_EQ(Turn(RecognizeChatTemplate("<|user|> <|assistant|>", "</s>")),
            "<|user|>\nHi</s>\n<|assistant|>\nYes</s>\n");
  EXPECT_EQ(RecognizeChatTemplate("### Human: {{content}}", "</s>").name, "plain");
  EXPECT_EQ(Turn(RecognizeChatTemplate("", "")), "HiYes");
}

TEST(ChatTemplate, ReadsTheFilesOfACheckpoint) {
  const std::string directory = testing::MakeTempDir();
  EXPECT_EQ(ReadChatTemplate(directory)->name, "plain");
  const std::string config = directory + "/tokenizer_config.json";
  ASSERT_TRUE(WriteFile(config, R"({"eos_token":{"content":"</s>"},"chat_template":[
      {"name":"tool_use","template":"<|im_start|><|im_end|>"},
      {"name":"default","template":"[INST] [/INST]"}]})")
                  .ok());
  EXPECT_EQ(ReadChatTemplate(directory)->after_reply, "</s>");
  ASSERT_TRUE(WriteFile(directory + "/chat_template.jinja", kChatMl).ok());
  EXPECT_EQ(ReadChatTemplate(directory)->name, "chatml");
  ASSERT_TRUE(WriteFile(config, "{").ok());
  EXPECT_FALSE(ReadChatTemplate(directory).ok());
}

}  // namespace
}  // namespace quantmill
