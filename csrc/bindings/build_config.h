// What CMake knew when it configured this build; defined by build_config.cpp.in.
#pragma once

namespace vlm::build {

extern const char* const kVersion;
extern const char* const kTorch;
extern const char* const kPython;
extern const char* const kCompiler;
extern const char* const kCuda;       // nvcc's version, "" without CUDA
extern const char* const kCudaArchs;  // "80;90"
extern const char* const kIsas;       // "default;avx2;avx512"
extern const char* const kSanitize;
extern const char* const kCommit;

}  // namespace vlm::build
