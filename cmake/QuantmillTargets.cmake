# Short forms for the three kinds of target in this tree.
include(GoogleTest)

# All test executables of a label: "cmake --build DIR --target fast_tests".
foreach(label fast program slow gpu)
  add_custom_target(${label}_tests)
endforeach()

# quantmill_library(NAME SOURCES ... [CUDA_SOURCES ...] [DEPS ...])
# A static library quantmill_NAME; NAME is its folder with '_' for '/'. CUDA_SOURCES are compiled
# only in a CUDA build. Includes are written from the root of the tree ("core/tensor/tensor.h").
function(quantmill_library name)
  cmake_parse_arguments(ARG "" "" "SOURCES;CUDA_SOURCES;DEPS" ${ARGN})
  set(target quantmill_${name})
  set(sources ${ARG_SOURCES})
  if(QM_HAVE_CUDA)
    list(APPEND sources ${ARG_CUDA_SOURCES})
  endif()
  add_library(${target} STATIC ${sources})
  target_include_directories(${target} PUBLIC ${PROJECT_SOURCE_DIR})
  target_link_libraries(${target} PUBLIC ${ARG_DEPS} PRIVATE quantmill_options)
endfunction()

# quantmill_test(NAME SOURCES ... [CUDA_SOURCES ...] [DEPS ...] [LABEL fast|program|slow|gpu])
# A GoogleTest executable NAME, part of the target LABEL_tests, with one ctest entry per test case.
# Label program: runs the whole program and kills it; slow: left out by scripts/test. QM_SHARED_DIR
# in the environment names the folder with models and data that are not part of this tree; tests
# that need it skip without it (tests/support/shared_data.h).
function(quantmill_test name)
  cmake_parse_arguments(ARG "" "LABEL" "SOURCES;CUDA_SOURCES;DEPS" ${ARGN})
  if(NOT ARG_LABEL)
    set(ARG_LABEL fast)
  endif()
  set(sources ${ARG_SOURCES})
  if(QM_HAVE_CUDA)
    list(APPEND sources ${ARG_CUDA_SOURCES})
  endif()
  add_executable(${name} ${sources})
  target_include_directories(${name} PRIVATE ${PROJECT_SOURCE_DIR})
  target_link_libraries(${name} PRIVATE ${ARG_DEPS} quantmill_test_support GTest::gmock
                                        GTest::gtest GTest::gtest_main quantmill_options)
  set_target_properties(${name} PROPERTIES
                        RUNTIME_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/tests)
  add_dependencies(${ARG_LABEL}_tests ${name})
  gtest_discover_tests(${name} DISCOVERY_MODE PRE_TEST
                       PROPERTIES LABELS ${ARG_LABEL} TIMEOUT 600)
endfunction()

# quantmill_benchmark(NAME SOURCES ... DEPS ...): a Google Benchmark executable, not part of ctest.
function(quantmill_benchmark name)
  cmake_parse_arguments(ARG "" "" "SOURCES;DEPS" ${ARGN})
  add_executable(${name} ${ARG_SOURCES})
  target_include_directories(${name} PRIVATE ${PROJECT_SOURCE_DIR})
  target_link_libraries(${name} PRIVATE ${ARG_DEPS} benchmark::benchmark quantmill_options)
  set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/bench)
endfunction()
