# Finds LibTorch and describes it as the imported targets coda::torch and, for a CUDA build of torch, coda::torch_cuda.
# find_package(Torch) is not used: with a CUDA build of torch, which is what PyPI has, it fails wherever nvcc is missing, and where
# it works it adds CUDA flags to every target.
#
#   coda_find_torch([HINTS <folder>...])
#
# looks in CODA_TORCH_ROOT, in the torch that an earlier find_package(Torch) found, in the hints, in CMAKE_PREFIX_PATH and in the
# Python interpreter, and sets
#   CODA_TORCH_ROOT       the folder with torch's include and lib
#   CODA_TORCH_VERSION    such as 2.11.0
#   CODA_TORCH_CUDA       TRUE for a CUDA build of torch
#   CODA_TORCH_NOT_FOUND  one sentence, where there is none

function(_coda_torch_from_python result)
  find_package(Python QUIET COMPONENTS Interpreter)
  if(Python_EXECUTABLE)
    execute_process(
      COMMAND "${Python_EXECUTABLE}" -c
        "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '', end='')"
      OUTPUT_VARIABLE root ERROR_QUIET)
    set(${result} "${root}" PARENT_SCOPE)
  endif()
endfunction()

function(_coda_torch_version root result)
  # Releases before 2.9 have the second file only.
  foreach(header include/torch/headeronly/version.h include/torch/csrc/api/include/torch/version.h)
    if(EXISTS "${root}/${header}")
      file(STRINGS "${root}/${header}" lines REGEX "#define TORCH_VERSION_(MAJOR|MINOR|PATCH) ")
      if(lines)
        list(TRANSFORM lines REPLACE "^.* " "")
        list(JOIN lines "." version)
        set(${result} "${version}" PARENT_SCOPE)
        return()
      endif()
    endif()
  endforeach()
endfunction()

macro(coda_find_torch)
  cmake_parse_arguments(_coda_torch "" "" "HINTS" ${ARGN})
  set(_coda_torch_header include/torch/csrc/api/include/torch/torch.h)
  set(CODA_TORCH_ROOT "${CODA_TORCH_ROOT}" CACHE PATH "Folder with torch's include and lib: a LibTorch distribution or Python's torch")
  if(CODA_TORCH_ROOT)
    set(_coda_torch_root "${CODA_TORCH_ROOT}")
  elseif(TORCH_INSTALL_PREFIX)
    set(_coda_torch_root "${TORCH_INSTALL_PREFIX}")
  else()
    find_path(_coda_torch_root "${_coda_torch_header}" HINTS ${_coda_torch_HINTS}
      # From the last two, torch is found when CMAKE_PREFIX_PATH names torch/share/cmake or a site-packages folder.
      PATH_SUFFIXES libtorch ../.. torch
      NO_CACHE NO_CMAKE_SYSTEM_PATH NO_SYSTEM_ENVIRONMENT_PATH)
    if(NOT _coda_torch_root)
      _coda_torch_from_python(_coda_torch_root)
    endif()
  endif()

  set(CODA_TORCH_VERSION "")
  if(_coda_torch_root AND EXISTS "${_coda_torch_root}/${_coda_torch_header}")
    cmake_path(NORMAL_PATH _coda_torch_root OUTPUT_VARIABLE CODA_TORCH_ROOT)
    _coda_torch_version("${CODA_TORCH_ROOT}" CODA_TORCH_VERSION)
    set(CODA_TORCH_CUDA FALSE)
    if(EXISTS "${CODA_TORCH_ROOT}/lib/libtorch_cuda.so")
      set(CODA_TORCH_CUDA TRUE)
    endif()
    if(NOT TARGET coda::torch)
      add_library(coda::torch INTERFACE IMPORTED)
      target_include_directories(coda::torch INTERFACE
        "${CODA_TORCH_ROOT}/include" "${CODA_TORCH_ROOT}/include/torch/csrc/api/include")
      # libtorch.so holds no symbols, only torch's CPU and CUDA libraries as its dependencies: the linker must not drop it.
      target_link_options(coda::torch INTERFACE
        "LINKER:--push-state,--no-as-needed,${CODA_TORCH_ROOT}/lib/libtorch.so,--pop-state")
      target_link_libraries(coda::torch INTERFACE "${CODA_TORCH_ROOT}/lib/libtorch_cpu.so" "${CODA_TORCH_ROOT}/lib/libc10.so")
      if(CODA_TORCH_CUDA)
        # Programs must name these as well: the loader does not look in a program's run path for what its libraries need.
        add_library(coda::torch_cuda INTERFACE IMPORTED)
        target_link_options(coda::torch_cuda INTERFACE
          "LINKER:--push-state,--no-as-needed,${CODA_TORCH_ROOT}/lib/libtorch_cuda.so,${CODA_TORCH_ROOT}/lib/libc10_cuda.so,--pop-state")
      endif()
    endif()
  else()
    set(CODA_TORCH_NOT_FOUND "no LibTorch found")
    if(_coda_torch_root)
      set(CODA_TORCH_NOT_FOUND "no LibTorch in ${_coda_torch_root}")
    endif()
    string(APPEND CODA_TORCH_NOT_FOUND
      "; install torch into the Python that is first on PATH, or set CODA_TORCH_ROOT to the folder that holds torch's include and lib")
    set(CODA_TORCH_ROOT "")
  endif()
endmacro()
