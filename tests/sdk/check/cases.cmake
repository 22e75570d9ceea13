# The pieces the cases are made of, and cases on plugins with one thing wrong, in this process.
quantmill_test(sdk_check_cases_test
  SOURCES cases_test.cc packed_samples_test.cc plain_rounding_test.cc synthetic_block_test.cc
          synthetic_test.cc
  DEPS quantmill_check quantmill_host_plugins quantmill_host_worker quantmill_cpu quantmill_cuda)
target_compile_definitions(sdk_check_cases_test PRIVATE
  QM_CASE_PLUGIN_DIR="${PROJECT_BINARY_DIR}/tests/case_plugins"
  QM_PLUGIN_DIR="${PROJECT_BINARY_DIR}/lib/quantmill/plugins")
get_property(case_plugins GLOBAL PROPERTY QM_CASE_PLUGINS)
add_dependencies(sdk_check_cases_test qm_affine qm_gptq qm_ptq ${case_plugins})
