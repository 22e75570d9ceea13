# Options of the build, and the settings every target shares.

option(QM_BUILD_TESTS "Build the tests" ON)
option(QM_WARNINGS_AS_ERRORS "Treat compiler warnings as errors" ON)
set(QM_CUDA AUTO CACHE STRING "Build the CUDA parts: AUTO (if nvcc is found), ON or OFF")
set_property(CACHE QM_CUDA PROPERTY STRINGS AUTO ON OFF)
set(QM_CUDA_ARCHITECTURES "80-real;89-real;90a-real" CACHE STRING "GPU architectures to compile for")
option(CMAKE_UNITY_BUILD "Compile files of a target together: fewer compilations for the whole tree" ON)
set(QM_SANITIZE "" CACHE STRING "Sanitizers, e.g. address,undefined or thread")

if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "Build type" FORCE)
endif()

set(CMAKE_C_STANDARD 11)
set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
# Contracting a*b+c differently in two places would make equal code give unequal bytes.
add_compile_options($<$<COMPILE_LANGUAGE:C,CXX>:-ffp-contract=off>)

find_program(QM_CCACHE ccache)
if(QM_CCACHE)
  set(CMAKE_C_COMPILER_LAUNCHER ${QM_CCACHE})
  set(CMAKE_CXX_COMPILER_LAUNCHER ${QM_CCACHE})
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${QM_CCACHE})
endif()

set(QM_HAVE_CUDA FALSE)
if(NOT QM_CUDA STREQUAL "OFF")
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES ${QM_CUDA_ARCHITECTURES})
  endif()
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
    if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # CMake 3.25 does not know it for nvcc
      set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
      set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
    endif()
    set(CMAKE_CUDA_STANDARD 20)
    set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
    find_package(CUDAToolkit REQUIRED)
    set(QM_HAVE_CUDA TRUE)
  elseif(QM_CUDA STREQUAL "ON")
    message(FATAL_ERROR "QM_CUDA=ON but no CUDA compiler was found; put nvcc on PATH or set QM_CUDA=OFF")
  endif()
endif()

add_library(quantmill_options INTERFACE)
target_compile_options(quantmill_options INTERFACE
  $<$<COMPILE_LANGUAGE:C,CXX>:-Wall -Wextra>
  $<$<AND:$<COMPILE_LANGUAGE:C,CXX>,$<BOOL:${QM_WARNINGS_AS_ERRORS}>>:-Werror>
  $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra --expt-relaxed-constexpr -lineinfo>
  $<$<AND:$<COMPILE_LANGUAGE:CUDA>,$<BOOL:${QM_WARNINGS_AS_ERRORS}>>:-Werror=all-warnings>)
if(QM_SANITIZE)
  add_compile_options($<$<COMPILE_LANGUAGE:C,CXX>:-fsanitize=${QM_SANITIZE}>
                      $<$<COMPILE_LANGUAGE:C,CXX>:-fno-omit-frame-pointer>)
  add_link_options(-fsanitize=${QM_SANITIZE})
  # These checks double the time of compilation. The address sanitizer sees reads and writes through
  # null or freed pointers and beyond an object all the same, but neither misalignment nor a wrong
  # dynamic type: those are checked by scripts/fuzz alone, in the code that it covers.
  add_compile_options($<$<COMPILE_LANGUAGE:C,CXX>:-fno-sanitize=null,alignment,vptr,object-size>)
endif()
