# vlm_add_isa_objects(<target> <source>...) compiles the sources once per instruction set, each time
# into a namespace VLM_ISA, and once more without one for the choice at run time (VLM_DISPATCH of
# csrc/cpu/isa.h), and links the objects into the target. Never -march=native: what is built here
# runs on other machines too.
set(VLM_ISAS default)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  list(APPEND VLM_ISAS avx2 avx512)
endif()
set(VLM_ISA_FLAGS_avx2 -mavx2 -mfma -mf16c -mbmi2)
set(VLM_ISA_FLAGS_avx512 ${VLM_ISA_FLAGS_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl
  -mprefer-vector-width=512)

function(vlm_add_isa_objects target)
  foreach(isa IN ITEMS dispatch ${VLM_ISAS})
    set(objects ${target}_${isa})
    add_library(${objects} OBJECT ${ARGN})
    if(NOT isa STREQUAL dispatch)
      target_compile_definitions(${objects} PRIVATE VLM_ISA=isa_${isa})
    endif()
    # psabi: vectors wider than the ISA's registers are passed in inlined functions only.
    target_compile_options(${objects} PRIVATE ${VLM_ISA_FLAGS_${isa}} -Wno-psabi)
    target_link_libraries(${objects} PRIVATE vlm_options)
    target_link_libraries(${target} PRIVATE ${objects})
  endforeach()
endfunction()
