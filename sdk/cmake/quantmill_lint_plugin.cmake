# cmake -DNM=nm -DREADELF=readelf -DFILE=libqm_x.so [-DOBJECTS=a.o|b.o] [-DLIBRARIES=libz.so|liby.so] -P this:
# fails if FILE needs a shared library beyond the C and C++ runtimes and those named in LIBRARIES, or
# if one of the plugin's own objects calls what ends or changes the host's process. The objects are
# asked, not FILE: the CUDA runtime linked into it calls setenv itself. assert() is let pass: release
# builds leave it out.
cmake_minimum_required(VERSION 3.25)
set(runtimes "^(libc|libm|libmvec|libpthread|libdl|librt|libstdc\\+\\+|libgcc_s)\\.so\\.[0-9]+$|^ld-linux.*\\.so\\.[0-9]+$")
string(REPLACE "|" ";" objects "${OBJECTS}")
string(REPLACE "|" ";" LIBRARIES "${LIBRARIES}")
set(faults "")

execute_process(COMMAND ${READELF} --dynamic --wide ${FILE}
                OUTPUT_VARIABLE dynamic RESULT_VARIABLE result)
if(NOT result EQUAL 0)
  message(FATAL_ERROR "${READELF} cannot read ${FILE}")
endif()
string(REGEX MATCHALL "\\(NEEDED\\)[^\n]*" lines "${dynamic}")
foreach(line IN LISTS lines)
  string(REGEX REPLACE ".*\\[(.*)\\].*" "\\1" library "${line}")
  string(REGEX REPLACE "\\.so\\..*" ".so" name "${library}")
  if(NOT library MATCHES "${runtimes}" AND NOT name IN_LIST LIBRARIES)
    list(APPEND faults "it needs ${library}, which may be absent where it is loaded: link that statically, \
use the host's service (qm_call::host_ext), or name ${name} in QM_PLUGIN_LIBRARIES")
  endif()
endforeach()

set(process exit _exit _Exit quick_exit abort pthread_exit signal sigaction bsd_signal sysv_signal
            __sysv_signal sigset setenv unsetenv putenv clearenv)
set(device cudaDeviceReset cudaDeviceSynchronize)
foreach(object IN LISTS objects)
  execute_process(COMMAND ${NM} --undefined-only --format=posix ${object}
                  OUTPUT_VARIABLE listing RESULT_VARIABLE result)
  if(NOT result EQUAL 0)
    message(FATAL_ERROR "${NM} cannot read ${object}")
  endif()
  string(REGEX MATCHALL "[^\n]+" lines "${listing}")
  foreach(line IN LISTS lines)
    string(REGEX REPLACE "[ @].*" "" name "${line}")
    if(name STREQUAL "exit" AND object MATCHES "\\.cu\\.(o|obj)$")
      # nvcc gives device functions a host body that calls exit and is never reached.
    elseif(name IN_LIST process)
      list(APPEND faults "${object} calls ${name} (QM-P-007): return a status instead, the process is \
the host's")
    elseif(name IN_LIST device)
      list(APPEND faults "${object} calls ${name} (QM-P-006): wait for call->cuda_stream alone")
    endif()
  endforeach()
endforeach()

if(faults)
  list(JOIN faults "\n  " text)
  message(FATAL_ERROR "${FILE}:\n  ${text}")
endif()
