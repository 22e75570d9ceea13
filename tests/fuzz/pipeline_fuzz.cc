// A pipeline file: any text is refused with a message or accepted, and what is accepted is checked
// against a made-up catalog and model, twice with the same outcome.
#include <cstdint>
#include <cstdlib>
#include <string>

#include "host/pipeline/check.h"
#include "host/pipeline/pipeline.h"
#include "tests/host/pipeline/fixture.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string text(reinterpret_cast<const char*>(data), size);
  const auto pipeline = quantmill::ParsePipelineText(text, "/p/input.yaml");
  if (!pipeline.ok()) {
    if (pipeline.status().message().empty()) std::abort();
    return 0;
  }
  static const quantmill::Catalog* catalog =
      new quantmill::Catalog(quantmill::testing::FakeCatalog());
  static const quantmill::ModelConfig* model =
      new quantmill::ModelConfig(quantmill::testing::FakeModel());
  const absl::Status first = quantmill::CheckPipeline(*pipeline, *catalog, *model).status();
  const absl::Status second = quantmill::CheckPipeline(*pipeline, *catalog, *model).status();
  if (first != second || (!first.ok() && first.message().empty())) std::abort();
  return 0;
}
