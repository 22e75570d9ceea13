// Size, offsets and constants of everything in the plugin ABI, as text.
#ifndef QUANTMILL_TESTS_ABI_LAYOUT_H_
#define QUANTMILL_TESTS_ABI_LAYOUT_H_

#include <string>

namespace quantmill::testing {

// One fact per line, in the order of the headers:
//   FROZEN qm_tensor size 112 align 8
//     qm_tensor.data offset 0 size 8 type void*       (two blanks before it)
//   type qm_status int32_t
//   constant QM_OK 0
//   id QM_EXT_FORMAT qm.format/1
// When a header gains something, layout.cc gains its line; MissingFrom (header_scan.h) notices what
// is missing, and so does a struct that its fields do not fill.
std::string CurrentLayout();

}  // namespace quantmill::testing

#endif  // QUANTMILL_TESTS_ABI_LAYOUT_H_
