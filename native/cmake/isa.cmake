# Instruction sets: explicit flags per file, so that nothing outside an ISA file can need more than the baseline, and
# never -march=native, so that a wheel runs on every machine of the architecture.
#
# FQTSTATS_ISA_FLAGS_<isa> must say what native/cpu/isa.cc checks before it allows <isa>.

set(FQTSTATS_ISA_FLAGS_avx2 -mavx2)
set(FQTSTATS_ISA_FLAGS_avx512 -mavx2 -mavx512f -mavx512bw -mavx512dq -mavx512vl)
set(FQTSTATS_ISA_FLAGS_avx512vnni ${FQTSTATS_ISA_FLAGS_avx512} -mavx512vnni)
set(FQTSTATS_ISA_FLAGS_avx512vbmi ${FQTSTATS_ISA_FLAGS_avx512vnni} -mavx512vbmi -mavx512vpopcntdq)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
  # Its own intrinsics start from a value that they read uninitialized on purpose (GCC bug 105593).
  foreach(isa avx512 avx512vnni avx512vbmi)
    list(APPEND FQTSTATS_ISA_FLAGS_${isa} -Wno-uninitialized -Wno-maybe-uninitialized)
  endforeach()
endif()

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(FQTSTATS_X86 ON)
else()
  set(FQTSTATS_X86 OFF)
endif()

# fqtstats_add_kernel(<op>): adds kernels/<op>/*.cc to fqtstats_kernels. A file x86_<isa>.cc is compiled with that ISA's
# flags, and on x86-64 only.
function(fqtstats_add_kernel op)
  set(dir ${CMAKE_CURRENT_SOURCE_DIR}/kernels/${op})
  file(GLOB portable CONFIGURE_DEPENDS ${dir}/*.cc)
  set(x86 ${portable})
  list(FILTER portable EXCLUDE REGEX "/x86_[a-z0-9]+\\.cc$")
  list(FILTER x86 INCLUDE REGEX "/x86_[a-z0-9]+\\.cc$")
  target_sources(fqtstats_kernels PRIVATE ${portable})
  if(FQTSTATS_X86)
    foreach(source ${x86})
      string(REGEX REPLACE ".*/x86_([a-z0-9]+)\\.cc$" "\\1" isa ${source})
      if(NOT DEFINED FQTSTATS_ISA_FLAGS_${isa})
        message(FATAL_ERROR "${source}: no flags for ISA '${isa}' in cmake/isa.cmake")
      endif()
      set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS "${FQTSTATS_ISA_FLAGS_${isa}}")
      target_sources(fqtstats_kernels PRIVATE ${source})
    endforeach()
  endif()
endfunction()
