# For the cases of transforms and reparametrizations (tests/sdk/check), in a folder of their own.
# quantmill_case_plugin(NAME SOURCE [MACROS...]): libqm_NAME.so from SOURCE.c.
function(quantmill_case_plugin name source)
  add_library(case_${name} MODULE ${source}.c)
  target_compile_definitions(case_${name} PRIVATE ${ARGN})
  target_link_libraries(case_${name} PRIVATE quantmill_plugin_api quantmill_options m)
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

# For the cases of tuning: the tuner of tests/crash, misbehaving by default.
quantmill_case_plugin(tune_right ../crash/tuner)
quantmill_case_plugin(tune_alone ../crash/tuner ALONE=1)
quantmill_case_plugin(tune_half_table ../crash/tuner HALF_TABLE=1)
foreach(offence worse short unknown-name nan edit-weight stay greedy restless overwrite beyond excuse
                all-packed)
  string(REPLACE "-" "_" name ${offence})
  quantmill_case_plugin(tune_${name} ../crash/tuner MISBEHAVE="${offence}")
endforeach()
