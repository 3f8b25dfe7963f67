#include "cuda/attention.cuh"
#include "cuda/launch.cuh"

namespace vlm::cuda {

int64_t long_scratch_bytes(const Problem&) { return 0; }
const char* long_fwd(const Problem&, DType, const ForwardOut&, void*, cudaStream_t) {
  return "not written yet";
}

}  // namespace vlm::cuda
