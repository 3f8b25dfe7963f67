// For ctypes: the tests of the emulator launch kernels on memory of their own.
#include "emulator.h"

#define VLM_EXPORT extern "C" __attribute__((visibility("default")))

VLM_EXPORT void vlm_emu_add_memory(void* p, size_t bytes, int initialised, const char* name) {
  vlm::emu::add_memory(p, bytes, initialised != 0, name);
}

VLM_EXPORT void vlm_emu_remove_memory(void* p) { vlm::emu::remove_memory(p); }

VLM_EXPORT const char* vlm_emu_take_findings() { return vlm::emu::take_findings(); }
