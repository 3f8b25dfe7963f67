// torch's matrix multiply as the callback of vlm/gemm.h.
#pragma once

#include <c10/core/Device.h>

#include "vlm/gemm.h"

namespace vlm {

// Multiplies on `device`, on its current stream; `device` must outlive the calls. fp32 operands
// follow torch's own fp32 precision settings.
Gemm torch_gemm(const c10::Device* device);

}  // namespace vlm
