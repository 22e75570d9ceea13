// A GGUF file's header, its configuration and its tokenizer: any bytes are accepted or refused, and
// accepted tensors lie inside the file.
#include <cstdint>
#include <cstdlib>

#include "core/io/gguf_file.h"
#include "core/io/gguf_tensors.h"
#include "core/text/gguf_tokenizer.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  const auto header = quantmill::ParseGgufHeader(bytes, size, "input");
  if (!header.ok()) return 0;
  for (const quantmill::GgufTensor& tensor : header->tensors) {
    if (header->data_begin + tensor.offset + tensor.bytes > size) std::abort();
    if (!tensor.type->readable || tensor.bytes == 0) continue;
    std::vector<float> block(static_cast<size_t>(tensor.type->block));
    DequantizeGgml(*tensor.type, data + header->data_begin + tensor.offset, 1, block.data());
  }
  (void)quantmill::ReadGgufModel(*header);
  (void)quantmill::TokenizerFromGguf(*header);
  return 0;
}
