// Size, offsets and constants of everything in the plugin ABI, as text.
#ifndef QUANTMILL_TESTS_ABI_LAYOUT_H_
#define QUANTMILL_TESTS_ABI_LAYOUT_H_

#include <string>

namespace quantmill::testing {

// One fact per line: "FROZEN qm_tensor size 112 align 8", "  qm_tensor.data offset 0 size 8",
// "constant QM_OK 0", "id QM_EXT_FORMAT qm.format/1". When a header gains something, layout.cc
// gains its line; a missing field is noticed because the fields no longer fill the struct.
std::string CurrentLayout();

}  // namespace quantmill::testing

#endif  // QUANTMILL_TESTS_ABI_LAYOUT_H_
