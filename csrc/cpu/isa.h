// Which instruction set the CPU kernels run on. Kernel files are compiled once per ISA with
// -DVLM_ISA=isa_default|isa_avx2|isa_avx512 and put everything into that namespace.
#pragma once

namespace vlm {

enum class Isa { isa_default, isa_avx2, isa_avx512 };

Isa current_isa();
bool has_bf16_dot();                 // the CPU multiplies bf16 pairs (avx512_bf16)
const char* cpu_isa();               // "default" | "avx2" | "avx512"
bool set_cpu_isa(const char* name);  // false: unknown, or not supported by this CPU
const char* cpu_isas();              // those this CPU supports, comma-separated

}  // namespace vlm

// Declares a kernel for each ISA and defines its dispatching twin:
//   VLM_DISPATCH(void, clip_stats, (const A& a, const B& b), (a, b))
#define VLM_DISPATCH(type, name, params, args)                                      \
  namespace isa_default {                                                           \
  type name params;                                                                 \
  }                                                                                 \
  VLM_IF_X86(namespace isa_avx2 { type name params; })                              \
  VLM_IF_X86(namespace isa_avx512 { type name params; })                            \
  type name params {                                                                \
    VLM_IF_X86(if (current_isa() == Isa::isa_avx512) return isa_avx512::name args;) \
    VLM_IF_X86(if (current_isa() == Isa::isa_avx2) return isa_avx2::name args;)     \
    return isa_default::name args;                                                  \
  }

#if defined(__x86_64__)
#define VLM_IF_X86(...) __VA_ARGS__
#else
#define VLM_IF_X86(...)
#endif
