# How to build a plugin, in this tree and from an installed SDK alike.

# quantmill_add_plugin(NAME SOURCES ... [CUDA_SOURCES ...] [CUDA_ARCHITECTURES ...])
#
# Builds the module qm_NAME, libqm_NAME.so in <build>/lib/quantmill/plugins, from the object library
# qm_NAME_objects (which unit tests link directly). CUDA_SOURCES are compiled, and QM_HAVE_CUDA is
# defined, only in a CUDA build. A plugin shows one symbol, has no undefined ones, is never unloaded,
# carries its own CUDA runtime and may not link the host's libraries. Adds tests of the exported
# and the undefined symbols and, where the quantmill program is at hand, the manifest
# libqm_NAME.qm.json. A project in
# C needs no C++ compiler; any generator and any compiler of the GCC command line will do.
function(quantmill_add_plugin name)
  cmake_parse_arguments(ARG "" "" "SOURCES;CUDA_SOURCES;CUDA_ARCHITECTURES" ${ARGN})
  if(NOT ARG_SOURCES)
    message(FATAL_ERROR "quantmill_add_plugin(${name}): SOURCES is empty")
  endif()
  if(ARG_UNPARSED_ARGUMENTS)
    message(FATAL_ERROR "quantmill_add_plugin(${name}): unknown arguments ${ARG_UNPARSED_ARGUMENTS}")
  endif()
  set(plugin qm_${name})
  set(objects qm_${name}_objects)
  set(sources ${ARG_SOURCES})
  if(QM_HAVE_CUDA)
    list(APPEND sources ${ARG_CUDA_SOURCES})
  endif()

  get_property(languages GLOBAL PROPERTY ENABLED_LANGUAGES)
  set(linker_language C)  # a project in C needs no C++ compiler
  if("CXX" IN_LIST languages)
    set(linker_language CXX)
  endif()

  add_library(${objects} OBJECT ${sources})
  target_link_libraries(${objects} PUBLIC quantmill_sdk)
  if("CXX" IN_LIST languages)
    target_compile_features(${objects} PUBLIC cxx_std_20)
  endif()
  if("C" IN_LIST languages)
    target_compile_features(${objects} PUBLIC c_std_11)
  endif()
  # The same bytes whatever the compiler fuses; and loops with float comparisons vectorise once the
  # compiler need not preserve floating-point exceptions (values do not change).
  target_compile_options(${objects} PRIVATE
    $<$<COMPILE_LANGUAGE:C,CXX>:-ffp-contract=off -fno-trapping-math>)
  set_target_properties(${objects} PROPERTIES
    POSITION_INDEPENDENT_CODE ON CXX_EXTENSIONS OFF
    C_VISIBILITY_PRESET hidden CXX_VISIBILITY_PRESET hidden CUDA_VISIBILITY_PRESET hidden
    VISIBILITY_INLINES_HIDDEN ON)
  if(TARGET quantmill_options)
    target_link_libraries(${objects} PRIVATE quantmill_options)
  endif()

  add_library(${plugin} MODULE $<TARGET_OBJECTS:${objects}>)
  set(map ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/quantmill_plugin.map)
  target_link_options(${plugin} PRIVATE -Wl,-z,defs -Wl,-z,nodelete -Wl,--version-script=${map})
  target_link_libraries(${plugin} PRIVATE m)
  set_target_properties(${plugin} PROPERTIES
    LINKER_LANGUAGE ${linker_language} LINK_DEPENDS ${map} PREFIX lib
    BUILD_WITH_INSTALL_RPATH ON INSTALL_RPATH ""
    # The same folder under generators of several configurations.
    LIBRARY_OUTPUT_DIRECTORY $<1:${CMAKE_BINARY_DIR}/lib/quantmill/plugins>)
  if(QM_SANITIZE)  # the sanitizer's own symbols are resolved by the program that loads the plugin
    target_link_options(${plugin} PRIVATE -Wl,-z,undefs)
  endif()
  if(QM_HAVE_CUDA AND ARG_CUDA_SOURCES)
    target_compile_definitions(${objects} PUBLIC QM_HAVE_CUDA)
    target_link_libraries(${objects} PUBLIC CUDA::cudart_static)
    target_link_libraries(${plugin} PRIVATE CUDA::cudart_static)
    set_target_properties(${objects} ${plugin} PROPERTIES CUDA_RUNTIME_LIBRARY Static)
    if(NOT TARGET quantmill_options)  # CMake 3.25 does not know how to ask nvcc for C++20
      target_compile_options(${objects} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-std=c++20>)
    endif()
    if(ARG_CUDA_ARCHITECTURES)
      set_target_properties(${objects} PROPERTIES CUDA_ARCHITECTURES "${ARG_CUDA_ARCHITECTURES}")
    endif()
  endif()

  install(TARGETS ${plugin} LIBRARY DESTINATION lib/quantmill/plugins)
  if(NOT QM_SANITIZE)  # instrumented code exports bookkeeping symbols
    add_test(NAME qm_${name}.exports
             COMMAND ${CMAKE_COMMAND} -DNM=${CMAKE_NM} -DREADELF=${CMAKE_READELF}
                     -DFILE=$<TARGET_FILE:${plugin}>
                     -P ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/quantmill_check_exports.cmake)
    set_tests_properties(qm_${name}.exports PROPERTIES LABELS fast)
    # QM_PLUGIN_LIBRARIES: shared libraries ("libz.so") that plugins of this project may need.
    add_test(NAME qm_${name}.symbols
             COMMAND ${CMAKE_COMMAND} -DNM=${CMAKE_NM} -DREADELF=${CMAKE_READELF}
                     -DFILE=$<TARGET_FILE:${plugin}> -DOBJECTS=$<JOIN:$<TARGET_OBJECTS:${objects}>,|>
                     "-DLIBRARIES=$<JOIN:${QM_PLUGIN_LIBRARIES},|>"
                     -P ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/quantmill_lint_plugin.cmake)
    set_tests_properties(qm_${name}.symbols PROPERTIES LABELS fast)
  endif()
  if(QUANTMILL_EXECUTABLE)  # of an installed SDK
    add_test(NAME qm_${name}.check
             COMMAND ${QUANTMILL_EXECUTABLE} check $<TARGET_FILE:${plugin}>)
  endif()

  # At the end of the directory, when every target_link_libraries has been said; the manifest at the
  # end of the whole project, when the program's target exists.
  cmake_language(EVAL CODE "cmake_language(DEFER CALL quantmill_check_plugin_links_ [[${name}]])
    cmake_language(DEFER DIRECTORY [[${CMAKE_SOURCE_DIR}]] CALL quantmill_add_manifest_ [[${plugin}]])")
endfunction()

# quantmill_add_plugin_test(NAME SOURCES ... [CUDA_SOURCES ...])
# A GoogleTest program NAME_test with the plugin's objects and the fake host linked in; nothing is
# built when tests are off or GoogleTest is missing.
function(quantmill_add_plugin_test name)
  cmake_parse_arguments(ARG "" "" "SOURCES;CUDA_SOURCES" ${ARGN})
  if(NOT QM_BUILD_TESTS OR NOT TARGET GTest::gtest_main)
    message(STATUS "qm_${name}_test is left out: QM_BUILD_TESTS is off or GoogleTest is missing")
    return()
  endif()
  include(GoogleTest)
  set(sources ${ARG_SOURCES})
  if(QM_HAVE_CUDA)
    list(APPEND sources ${ARG_CUDA_SOURCES})
  endif()
  add_executable(qm_${name}_test ${sources})
  target_link_libraries(qm_${name}_test PRIVATE qm_${name}_objects quantmill_sdk_testing
                                                GTest::gtest GTest::gtest_main)
  if(TARGET quantmill_options)
    target_link_libraries(qm_${name}_test PRIVATE quantmill_options)
  endif()
  set_target_properties(qm_${name}_test PROPERTIES
                        RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/tests)
  if(TARGET fast_tests)
    add_dependencies(fast_tests qm_${name}_test)
  endif()
  gtest_discover_tests(qm_${name}_test DISCOVERY_MODE PRE_TEST PROPERTIES LABELS fast TIMEOUT 600)
endfunction()

function(quantmill_check_plugin_links_ name)
  foreach(target qm_${name} qm_${name}_objects)
    get_target_property(libraries ${target} LINK_LIBRARIES)
    foreach(library IN LISTS libraries)
      if(library MATCHES "^quantmill_" AND
         NOT library MATCHES "^quantmill_(sdk|sdk_testing|plugin_api|options)$")
        message(FATAL_ERROR "plugin ${name} links ${library}: a plugin must load in any host of its "
                            "ABI version, so it may link quantmill_sdk only; ask the host for what "
                            "is needed through qm_call::host_ext")
      endif()
    endforeach()
  endforeach()
endfunction()

function(quantmill_add_manifest_ plugin)
  if(TARGET quantmill)
    set(program quantmill)
  elseif(QUANTMILL_EXECUTABLE)
    set(program ${QUANTMILL_EXECUTABLE})
  else()
    return()
  endif()
  set(manifest ${CMAKE_BINARY_DIR}/lib/quantmill/plugins/lib${plugin}.qm.json)
  add_custom_command(OUTPUT ${manifest}
    COMMAND ${program} inspect --manifest $<TARGET_FILE:${plugin}>
    DEPENDS ${plugin} ${program} COMMENT "Writing the manifest of ${plugin}" VERBATIM)
  add_custom_target(${plugin}_manifest ALL DEPENDS ${manifest})
  install(FILES ${manifest} DESTINATION lib/quantmill/plugins)
  # Instrumented code writes files and starts threads while it is loaded.
  if(TARGET quantmill AND QM_BUILD_TESTS AND NOT QM_SANITIZE)
    add_test(NAME ${plugin}.check COMMAND quantmill check $<TARGET_FILE:${plugin}>)
    set_tests_properties(${plugin}.check PROPERTIES LABELS program TIMEOUT 600)
  endif()
endfunction()
