# cmake -DNM=nm -DREADELF=readelf -DFILE=libqm_x.so -P this: fails unless qm_plugin_entry_v1 is all that
# FILE exports, FILE stays loaded, and brings its own CUDA runtime.
execute_process(COMMAND ${NM} --dynamic --defined-only --format=posix ${FILE}
                OUTPUT_VARIABLE listing RESULT_VARIABLE result)
if(NOT result EQUAL 0)
  message(FATAL_ERROR "${NM} cannot read ${FILE}")
endif()
string(REGEX MATCHALL "[^\n]+" lines "${listing}")
set(names)
foreach(line IN LISTS lines)
  string(REGEX REPLACE "[ @].*" "" name "${line}")
  list(APPEND names ${name})
endforeach()
if(NOT "${names}" STREQUAL "qm_plugin_entry_v1")
  message(FATAL_ERROR "${FILE} exports [${names}]; a plugin exports qm_plugin_entry_v1 and nothing "
                      "else (QM-A-001); build it with quantmill_add_plugin")
endif()

execute_process(COMMAND ${READELF} --dynamic --wide ${FILE}
                OUTPUT_VARIABLE dynamic RESULT_VARIABLE result)
if(NOT result EQUAL 0)
  message(FATAL_ERROR "${READELF} cannot read ${FILE}")
endif()
if(NOT dynamic MATCHES "NODELETE")
  message(FATAL_ERROR "${FILE} may be unloaded (QM-H-003); link it with -Wl,-z,nodelete, or build it "
                      "with quantmill_add_plugin")
endif()
if(dynamic MATCHES "NEEDED[^\n]*libcudart")
  message(FATAL_ERROR "${FILE} needs a shared CUDA runtime, which the machine it runs on may not "
                      "have; link CUDA::cudart_static, or build it with quantmill_add_plugin")
endif()
