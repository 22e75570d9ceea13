# For the cases of tests/sdk/check that are about one table of a plugin, in a folder of their own.
# quantmill_case_plugin(NAME SOURCE [MACROS...]): libqm_NAME.so from SOURCE.c.
function(quantmill_case_plugin name source)
  add_library(case_${name} MODULE ${source}.c)
  target_compile_definitions(case_${name} PRIVATE ${ARGN})
  target_link_libraries(case_${name} PRIVATE quantmill_sdk quantmill_options m)
  set_target_properties(case_${name} PROPERTIES PREFIX "" OUTPUT_NAME libqm_${name}
    C_VISIBILITY_PRESET hidden LIBRARY_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/tests/case_plugins)
  set_property(GLOBAL APPEND PROPERTY QM_CASE_PLUGINS case_${name})
endfunction()

quantmill_case_plugin(transform_smooth transform_smooth)
quantmill_case_plugin(transform_rotates transform_smooth ROTATES)
quantmill_case_plugin(transform_unknown_target transform_smooth UNKNOWN_TARGET)
quantmill_case_plugin(transform_zero_scale transform_smooth ZERO_SCALE)
quantmill_case_plugin(transform_tiny_scale transform_smooth TINY_SCALE)
quantmill_case_plugin(transform_shears transform_smooth SHEARS)
quantmill_case_plugin(transform_clips_hard transform_smooth CLIPS_HARD)
quantmill_case_plugin(transform_restless transform_smooth RESTLESS)
quantmill_case_plugin(reparam_low_rank reparam_low_rank)
quantmill_case_plugin(reparam_gain reparam_gain)
quantmill_case_plugin(reparam_weight_gain reparam_gain KIND_WEIGHT)
quantmill_case_plugin(reparam_not_identity reparam_gain NOT_IDENTITY)
quantmill_case_plugin(reparam_impure reparam_gain IMPURE)
quantmill_case_plugin(reparam_needs_saved reparam_gain NEEDS_SAVED)
quantmill_case_plugin(reparam_saves_too_much reparam_gain SAVES_TOO_MUCH)
quantmill_case_plugin(reparam_overwrites reparam_gain OVERWRITES)
quantmill_case_plugin(reparam_wrong_vjp reparam_gain WRONG_VJP)
quantmill_case_plugin(reparam_wrong_finalize reparam_gain WRONG_FINALIZE)
quantmill_case_plugin(reparam_bad_name reparam_gain BAD_NAME)
quantmill_case_plugin(reparam_other_phase reparam_gain OTHER_PHASE)
quantmill_case_plugin(reparam_restless_init reparam_gain RESTLESS_INIT)
quantmill_case_plugin(reparam_needs_weight reparam_gain NEEDS_WEIGHT)
quantmill_case_plugin(reparam_needs_gradient reparam_gain NEEDS_GRADIENT)
quantmill_case_plugin(reparam_all_or_nothing reparam_gain ALL_OR_NOTHING)

quantmill_case_plugin(adapter_right reparam_adapter)
foreach(offence FORGETS_ALPHA DROPS_ALPHA NOT_JSON NO_TYPE TAKES_BROKEN TAKES_ALL TAKES_TYPES UNKNOWN_OPTION)
  string(TOLOWER ${offence} name)
  quantmill_case_plugin(adapter_${name} reparam_adapter ${offence})
endforeach()

# For the cases of tuning: the tuner of tests/crash, misbehaving by default.
quantmill_case_plugin(tune_right ../crash/tuner)
quantmill_case_plugin(tune_alone ../crash/tuner ALONE=1)
quantmill_case_plugin(tune_half_table ../crash/tuner HALF_TABLE=1)
foreach(offence worse short unknown-name nan edit-weight stay greedy restless overwrite beyond excuse
                all-packed forgets-why)
  string(REPLACE "-" "_" name ${offence})
  quantmill_case_plugin(tune_${name} ../crash/tuner MISBEHAVE="${offence}")
endforeach()

# For the cases of quantizers, kernels and formats.
quantmill_case_plugin(rows_right rows _GNU_SOURCE)
foreach(offence any_parameters any_target check_passes_all check_refuses_all counts_threads
                dequantizes_coarsely divides_by_channels divides_by_range drops_row_17 group_differs
                ignores_strides loses_a_bit needs_full_rank needs_range needs_rows no_doc overflows
                passes_nan_on prepack_changes refuses_choice refuses_widths stops_late
                transposes_wrongly)
  string(TOUPPER ${offence} upper)
  quantmill_case_plugin(rows_${offence} rows _GNU_SOURCE OFFENCE=${upper})
endforeach()
