# vlm_torch: torch's headers and libraries, as the chosen Python sees them.
# Not find_package(Torch): it rewrites the CUDA architectures and leaves torch_python out.
set(query "
import sys
try:
    import torch
except ImportError as error:
    sys.exit(f'{error}')
print(torch.__version__, torch.__path__[0], int(torch.compiled_with_cxx11_abi()), sep=';', end='')
")
if(NOT VLM_TORCH_FOUND_BY STREQUAL "${Python_EXECUTABLE}")
  execute_process(COMMAND ${Python_EXECUTABLE} -c "${query}"
    OUTPUT_VARIABLE answer ERROR_VARIABLE error RESULT_VARIABLE failed)
  if(failed)
    message(FATAL_ERROR "${Python_EXECUTABLE} cannot import torch:\n${error}\n"
      "Install it first (pip install torch), then: pip install --no-build-isolation -e .")
  endif()
  list(GET answer 0 version)
  list(GET answer 1 dir)
  list(GET answer 2 abi)
  set(VLM_TORCH_VERSION ${version} CACHE INTERNAL "")
  set(VLM_TORCH_DIR ${dir} CACHE INTERNAL "")
  set(VLM_TORCH_CXX11_ABI ${abi} CACHE INTERNAL "")
  set(VLM_TORCH_FOUND_BY ${Python_EXECUTABLE} CACHE INTERNAL "")
endif()
if(VLM_TORCH_VERSION VERSION_LESS 2.11)
  message(FATAL_ERROR "vlm_kernels needs torch >= 2.11, and ${Python_EXECUTABLE} has "
    "${VLM_TORCH_VERSION}: pip install --upgrade torch")
endif()

add_library(vlm_torch INTERFACE)
# pybind11 comes with torch: its casters for tensors must match the one torch was built with.
target_include_directories(vlm_torch SYSTEM INTERFACE
  ${VLM_TORCH_DIR}/include ${VLM_TORCH_DIR}/include/torch/csrc/api/include)
target_compile_definitions(vlm_torch INTERFACE _GLIBCXX_USE_CXX11_ABI=${VLM_TORCH_CXX11_ABI})
# libtorch.so has no symbol of its own, but it is what pulls in libtorch_cuda where there is one,
# and the weak symbols of csrc/ops resolve through it: it must stay in DT_NEEDED.
set(lib ${VLM_TORCH_DIR}/lib)
target_link_libraries(vlm_torch INTERFACE
  -Wl,--no-as-needed,${lib}/libtorch.so,--as-needed
  ${lib}/libtorch_python.so ${lib}/libtorch_cpu.so ${lib}/libc10.so)
