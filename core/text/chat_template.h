// How chat models want a conversation written. Checkpoints carry a template in a language of its
// own (Jinja); the ways of writing that most of them amount to are recognized by their markers.
#ifndef QUANTMILL_CORE_TEXT_CHAT_TEMPLATE_H_
#define QUANTMILL_CORE_TEXT_CHAT_TEMPLATE_H_

#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace quantmill {

// A turn is `before_user` user `before_reply` reply `after_reply`. Special tokens stand in these
// texts as they are spelled in the tokenizer.
struct ChatTemplate {
  std::string name = "plain";  // "chatml", "llama3", "inst", "zephyr"; "plain": no markers
  std::string before_user;
  std::string before_reply;
  std::string after_reply;
  std::string end_of_reply;  // the token that ends a reply; "" = the model's own end of text
};

// `jinja`: the template's text; eos: spelling of the end-of-text token. Plain for what is not
// known.
ChatTemplate RecognizeChatTemplate(std::string_view jinja, std::string_view eos);

// From chat_template.jinja or tokenizer_config.json of a checkpoint; plain when there is no
// template or an unknown one. An error only for a file that cannot be read.
absl::StatusOr<ChatTemplate> ReadChatTemplate(const std::string& directory);

}  // namespace quantmill

#endif  // QUANTMILL_CORE_TEXT_CHAT_TEMPLATE_H_
