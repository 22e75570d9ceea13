# cmake -DNM=nm -DFILE=libqm_x.so -P this: fails unless qm_plugin_entry_v1 is all that FILE exports.
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
