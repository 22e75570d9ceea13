// Plugins that break one rule each, the case of `quantmill check` that must see it, and what it
// says.
#ifndef QUANTMILL_TESTS_SDK_CHECK_OFFENCES_H_
#define QUANTMILL_TESTS_SDK_CHECK_OFFENCES_H_

#include <ostream>

#include "sdk/check/case.h"

namespace quantmill::check {

struct Offence {
  const char* plugin;
  const char* name;  // of the case
  State state;
  const char* rule;
  const char* text;  // part of what is said
};
inline void PrintTo(const Offence& offence, std::ostream* out) { *out << offence.plugin; }

// Offences that end, stop or change a process, or are about loading: found in a process of its own,
// as users run it (offenders_test.cc).
inline constexpr Offence kProcessOffences[] = {
    {"exports_too_much", "load.symbols", State::kFailed, "QM-A-001", "rounding_version"},
    {"no_symbol", "load.opens", State::kFailed, "QM-A-001", "qm_plugin_entry_v1"},
    {"null_descriptor", "load.opens", State::kFailed, "QM-P-002", "NULL"},
    {"crash_in_constructor", "load.opens", State::kCrashed, "QM-P-001", "SIG"},
    {"hang_at_load", "load.opens", State::kTimedOut, "QM-P-001", "2 s"},
    {"wrong_major", "load.version", State::kFailed, "QM-H-001", "major"},
    {"newer_minor", "load.version", State::kFailed, "QM-H-001", "newer"},
    {"bad_text", "load.descriptor", State::kFailed, "QM-P-002", "UTF-8"},
    {"bad_default", "load.descriptor", State::kFailed, "QM-P-016", "option"},
    {"short_table", "load.descriptor", State::kFailed, "QM-P-002", "too short"},
    {"tune_half_table", "load.descriptor", State::kFailed, "QM-P-002", "block-tune"},
    {"opens_file", "load.pure", State::kFailed, "QM-P-001", "opens /etc/passwd"},
    {"prints_in_entry", "load.pure", State::kFailed, "QM-P-001", "prints"},
    {"starts_thread", "load.pure", State::kFailed, "QM-P-001", "thread"},
    {"starts_cuda", "load.pure", State::kFailed, "QM-P-001", "starts CUDA"},
    {"slow_to_load", "load.scan_time", State::kWarning, "QM-P-001", "more than 100 ms"},
    {"deletable", "load.nodelete", State::kFailed, "QM-H-003", "nodelete"},
    {"tune_overwrite", "tune.results_fit", State::kFailed, "QM-P-004", "'scale'"},
    {"reparam_needs_gradient", "reparam.unwanted_gradients", State::kCrashed, "QM-P-014",
     "SIGSEGV"},
    {"changes_descriptor", "abi.constant", State::kFailed, "QM-P-002", "second time"},
    {"wrong_table_size", "abi.table_sizes", State::kFailed, "QM-A-003", "sizeof"},
    {"matches_prefix", "abi.unknown_ids", State::kFailed, "QM-A-007", "whole ids"},
    {"reads_newer_field", "abi.oldest_host", State::kFailed, "QM-A-005",
     "behind the end of the qm_linear_info"},
    {"compares_sizes", "abi.newer_host", State::kFailed, "QM-A-005", "another struct"},
    {"needs_threads", "abi.no_services", State::kFailed, "QM-P-018", "INTERNAL"},
    {"refuses_late", "options.defaults", State::kFailed, "QM-P-012", "not today"},
    {"bare_code", "memory.refuses_with_text", State::kFailed, "QM-P-005", "without a message"},
    {"unknown_code", "memory.refuses_with_text", State::kFailed, "QM-P-005", "99"},
    {"writes_past_end", "memory.fences", State::kFailed, "QM-P-014",
     "behind the end of the emitted tensor 'zero'"},
    {"changes_input", "memory.fences", State::kFailed, "QM-P-004", "the weight"},
    {"lists_scratch", "memory.fences", State::kFailed, "QM-P-009", "not emitted"},
    {"throws", "memory.fences", State::kFailed, "QM-P-007", "exception"},
    {"exits", "memory.fences", State::kCrashed, "QM-P-007", "exit()"},
    {"segfaults", "memory.fences", State::kCrashed, "QM-P-014", "SIGSEGV"},
    {"hangs", "memory.fences", State::kTimedOut, "QM-P-008", "2 s"},
    {"keeps_pointers", "memory.nothing_kept", State::kFailed, "QM-P-003", "the weight"},
    {"too_little_scratch", "memory.scratch_bound", State::kFailed, "QM-P-015", "at most 8"},
    {"forgets_why", "memory.scratch_fails", State::kFailed, "QM-P-017", "INTERNAL"},
    {"forgets_why", "memory.emit_fails", State::kFailed, "QM-P-017", "INTERNAL"},
    {"ignores_cancel", "memory.cancel", State::kFailed, "QM-P-008", "returned OK"},
    {"wrong_names", "quantize.result_is_in_its_format", State::kFailed, "QM-P-010", ""},
    {"accepts_nan", "quantize.not_finite_weights", State::kFailed, "QM-C-001", ""},
    {"not_the_same_twice", "quantize.same_bytes_twice", State::kFailed, "QM-P-011", ""},
    {"clips", "quantize.not_worse_than_plain_rounding", State::kFailed, "QM-C-002", ""},
};

// Offences in what a call computes or refuses: found in the process of the test (cases_test.cc).
inline constexpr Offence kCallOffences[] = {
    {"transform_unknown_target", "transform.edits_are_valid", State::kFailed, "QM-C-007",
     "no such site"},
    {"transform_zero_scale", "transform.edits_are_valid", State::kFailed, "QM-C-007",
     "channel 3 is 0"},
    {"transform_shears", "transform.edits_are_valid", State::kFailed, "QM-C-007", "not orthogonal"},
    {"transform_tiny_scale", "transform.preserving_edits_preserve", State::kFailed, "QM-C-007",
     "output changed"},
    {"transform_clips_hard", "transform.loss_does_not_increase", State::kFailed, "QM-C-007",
     "off by"},
    {"tune_alone", "tune.results_fit", State::kFailed, "QM-C-012", "beside qm.quantize-linear/1"},
    {"tune_short", "tune.results_fit", State::kFailed, "QM-C-012", "dtype and shape must stay"},
    {"tune_unknown_name", "tune.results_fit", State::kFailed, "QM-C-012", "'scales'"},
    {"tune_nan", "tune.results_fit", State::kFailed, "QM-P-010", "not in its format"},
    {"tune_edit_weight", "tune.results_fit", State::kFailed, "QM-C-012", "no norm or bias"},
    {"tune_beyond", "tune.results_fit", State::kFailed, "QM-C-012", "the block has 7 linears"},
    {"tune_worse", "tune.not_worse", State::kFailed, "QM-C-012", "the tuned one by"},
    {"tune_all_packed", "tune.some_slots_dense", State::kFailed, "QM-C-012", "left dense"},
    {"tune_restless", "tune.same_bytes_twice", State::kFailed, "QM-P-011", "'scale' of item 0"},
    {"tune_stay", "tune.cancel", State::kFailed, "QM-P-008", "QM_CANCELLED is expected"},
    {"tune_greedy", "tune.scratch_bound", State::kFailed, "QM-P-015", "plan() said 1024"},
    {"tune_excuse", "tune.no_services", State::kFailed, "QM-P-018", "the block's vjp"},
    {"reparam_not_identity", "reparam.identity_at_init", State::kFailed, "QM-C-008", "NMSE 0.25"},
    {"reparam_impure", "reparam.pure", State::kFailed, "QM-C-009", "other bytes"},
    {"reparam_needs_saved", "reparam.saved_within_bound", State::kFailed, "QM-P-012", "no room"},
    {"reparam_saves_too_much", "reparam.saved_within_bound", State::kFailed, "QM-P-014",
     "the saved bytes"},
    {"reparam_overwrites", "reparam.vjp_accumulates", State::kFailed, "QM-C-009",
     "'gain' is overwritten"},
    {"reparam_wrong_vjp", "reparam.vjp_matches_differences", State::kFailed, "QM-C-009",
     "'gain': vjp gives"},
    {"reparam_bad_name", "reparam.same_params_in_both_phases", State::kFailed, "QM-C-013",
     "'gain.of.inputs'"},
    {"reparam_other_phase", "reparam.same_params_in_both_phases", State::kFailed, "QM-C-013",
     "'factor'"},
    {"reparam_restless_init", "reparam.same_init_twice", State::kFailed, "QM-P-011", "'gain'"},
    {"reparam_needs_weight", "reparam.over_packed_base", State::kFailed, "QM-P-012", "no weight"},
    {"reparam_all_or_nothing", "reparam.unwanted_gradients", State::kFailed, "QM-C-009",
     "not wanted"},
    {"adapter_forgets_alpha", "adapter.round_trip", State::kFailed, "QM-C-014",
     "forward gives other bytes"},
    {"adapter_drops_alpha", "adapter.round_trip", State::kFailed, "QM-C-014", "written again"},
    {"adapter_not_json", "adapter.round_trip", State::kFailed, "QM-C-014",
     "no JSON object: alpha = 2"},
    {"adapter_no_type", "adapter.round_trip", State::kFailed, "QM-C-014", "'peft_type'"},
    {"adapter_unknown_option", "adapter.round_trip", State::kFailed, "QM-C-014", "'alfa'"},
    {"adapter_takes_broken", "adapter.refuses_foreign", State::kFailed, "QM-C-014",
     "an error is expected"},
    {"adapter_takes_all", "adapter.refuses_foreign", State::kFailed, "QM-C-014", "of another kind"},
    {"reparam_wrong_finalize", "reparam.finalize_agrees", State::kFailed, "QM-C-010", "NMSE"},
    {"transform_restless", "transform.same_edits_twice", State::kFailed, "QM-P-011",
     "with other bytes"},
    {"tune_forgets_why", "tune.scratch_fails", State::kFailed, "QM-P-017", "INTERNAL"},
    {"tune_forgets_why", "tune.emit_fails", State::kFailed, "QM-P-017", "INTERNAL"},
    {"adapter_takes_types", "adapter.wrong_types", State::kFailed, "QM-C-014",
     "its own table refuses"},
    {"rows_no_doc", "options.documented", State::kWarning, "QM-P-016", "no doc"},
    {"rows_refuses_choice", "options.values", State::kFailed, "QM-P-012", "rounding: down"},
    {"rows_any_parameters", "abi.newer_host_format", State::kFailed, "QM-P-010",
     "accepts the parameters"},
    {"rows_refuses_widths", "quantize.one_by_one", State::kFailed, "QM-P-012", "1 x 1"},
    {"rows_refuses_widths", "quantize.odd_shapes", State::kFailed, "QM-P-012", "7 x 131"},
    {"rows_refuses_widths", "quantize.group_does_not_divide", State::kFailed, "QM-P-012",
     "16 x 200"},
    {"rows_needs_range", "quantize.constant_rows", State::kFailed, "QM-C-001", "no range"},
    {"rows_divides_by_range", "quantize.zero_weights", State::kFailed, "QM-C-001", "nan"},
    {"rows_overflows", "quantize.huge_weights", State::kFailed, "QM-C-001", "nan"},
    {"rows_passes_nan_on", "quantize.not_finite_inputs", State::kFailed, "QM-C-001", "nan"},
    {"rows_needs_full_rank", "quantize.rank_deficient_statistics", State::kFailed, "QM-C-001",
     "nan"},
    {"rows_divides_by_channels", "quantize.dead_channels", State::kFailed, "QM-C-001", "nan"},
    {"rows_divides_by_channels", "quantize.zero_statistics", State::kFailed, "QM-C-001", "nan"},
    {"rows_needs_rows", "quantize.no_rows", State::kFailed, "QM-C-001", "FAILED_PRECONDITION"},
    {"rows_ignores_strides", "quantize.strided_weight", State::kFailed, "QM-C-001", "lie apart"},
    {"rows_stops_late", "quantize.cancel", State::kFailed, "QM-P-008", "went on for 2."},
    {"rows_counts_threads", "quantize.same_bytes_for_any_threads", State::kFailed, "QM-P-011",
     "threads against 1"},
    {"rows_group_differs", "quantize.group_equals_single", State::kFailed, "QM-C-003",
     "in a group: tensor 'codes'"},
    {"rows_dequantizes_coarsely", "kernel.dequantize_equals_reference", State::kFailed, "QM-C-004",
     "the reference says"},
    {"rows_drops_row_17", "kernel.matmul_equals_product", State::kFailed, "QM-C-005", "17 rows"},
    {"rows_transposes_wrongly", "kernel.matmul_transposed_equals_product", State::kFailed,
     "QM-C-005", "NMSE"},
    {"rows_prepack_changes", "kernel.prepack_changes_nothing", State::kFailed, "QM-C-006",
     "other values"},
    {"rows_check_refuses_all", "format.check_accepts_valid", State::kFailed, "QM-P-010",
     "rows wants"},
    {"rows_check_passes_all", "format.check_refuses_damaged", State::kFailed, "QM-P-010",
     "check accepts it"},
    {"rows_loses_a_bit", "format.round_trip", State::kFailed, "QM-C-011", "'scale' differs"},
    {"rows_any_target", "format.unknown_target", State::kFailed, "QM-C-011", "no-such-target"},
};

// Cases that no plugin offends here: the first two repeat others at the size of a large model, the
// others need a GPU.
inline constexpr const char* kCasesWithoutOffence[] = {
    "memory.large", "quantize.real_size", "kernel.matmul_in_a_graph", "kernel.two_streams"};

}  // namespace quantmill::check

#endif  // QUANTMILL_TESTS_SDK_CHECK_OFFENCES_H_
