// The module _C_emu: csrc/ops on the emulated csrc/cuda. Its ops are called with CPU tensors. While
// one runs, the storages of its tensor arguments and what it allocates are the device's memory.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "emulator.h"
#include "ops/bind.h"
#include "ops/device.h"
#include "ops/ops.h"

// Of kernels/faults.cu.
extern "C" {
const char* reverse_clean(const float* in, float* out, int n);
const char* unwritten_output(const float* in, float* out, int n);
const char* read_out_of_bounds(const float* in, float* out, int n);
const char* write_out_of_bounds(const float* in, float* out, int n);
}

namespace {

namespace emu = vlm::emu;
using at::Tensor;

// Blocks of torch's CPU allocator as cudaMalloc would give them: aligned to 512 bytes, without a
// value, and with nothing of the device's right before and behind.
class DeviceAllocator final : public c10::Allocator {
 public:
  explicit DeviceAllocator(c10::Allocator* host) : host_(host) {}

  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return host_->allocate(0);
    auto block = std::make_unique<Block>(host_->allocate(bytes + 2 * kAlignment));
    const auto base = reinterpret_cast<uintptr_t>(block->data.get());
    block->begin = reinterpret_cast<void*>((base + kAlignment) / kAlignment * kAlignment);
    const std::string name = "a tensor that the op allocated";
    emu::add_memory(block->begin, bytes, false, name.c_str());
    void* begin = block->begin;
    return {begin, block.release(), &free, c10::Device(c10::kCPU)};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

 private:
  static constexpr size_t kAlignment = 512;

  struct Block {
    explicit Block(c10::DataPtr host) : data(std::move(host)) {}
    c10::DataPtr data;
    void* begin = nullptr;
  };

  static void free(void* context) {
    const std::unique_ptr<Block> block(static_cast<Block*>(context));
    emu::remove_memory(block->begin);
  }

  c10::Allocator* host_;
};

std::recursive_mutex g_one_op;  // the allocator is the process's

class OnDevice {
 public:
  OnDevice(const c10::FunctionSchema& schema, const torch::jit::Stack& stack)
      : lock_(g_one_op), host_(c10::GetCPUAllocator()), device_(host_) {
    const size_t first = stack.size() - schema.arguments().size();
    for (size_t i = 0; i < schema.arguments().size(); ++i) {
      if (!stack[first + i].isTensor()) continue;
      const Tensor& x = stack[first + i].toTensor();
      if (!x.defined() || x.nbytes() == 0) continue;
      storages_.push_back(x.storage());
      emu::add_memory(x.storage().mutable_data(), x.storage().nbytes(), true,
                      schema.arguments()[i].name().c_str());
    }
    c10::SetCPUAllocator(&device_, kPriority);
  }
  ~OnDevice() {
    c10::SetCPUAllocator(host_, kPriority);
    for (c10::Storage& storage : storages_) emu::remove_memory(storage.mutable_data());
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  static constexpr uint8_t kPriority = 100;

  const std::lock_guard<std::recursive_mutex> lock_;
  c10::Allocator* host_;
  DeviceAllocator device_;
  std::vector<c10::Storage> storages_;
};

// The CPU kernel of each op: its CUDA kernel.
void emulate(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const OnDevice scope(op.schema(), *stack);
  emu::take_findings();
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CUDA), stack);
  const char* findings = emu::take_findings();
  TORCH_CHECK(findings == nullptr, op.schema().name(), ": ", findings);
}

void emulate_all_ops() {
  static torch::Library library(torch::Library::IMPL, VLM_QUOTE(VLM_LIBRARY), c10::DispatchKey::CPU,
                                __FILE__, __LINE__);
  for (const c10::OperatorName& name : c10::Dispatcher::singleton().getAllOpNames()) {
    if (name.getNamespace() != std::string_view(VLM_QUOTE(VLM_LIBRARY))) continue;
    const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name.name.c_str(), "");
    if (!op.hasKernelForDispatchKey(c10::DispatchKey::CUDA)) continue;
    const std::string unqualified = name.name.substr(name.name.find("::") + 2);
    library.impl(unqualified.c_str(), torch::CppFunction::makeFromBoxedFunction<&emulate>());
  }
}

// An op of the tests' own: one of these kernels from `x` to a fresh tensor.
Tensor probe(const Tensor& x, const std::string& entry, bool zeroed) {
  const Tensor out = zeroed ? at::zeros_like(x) : at::empty_like(x);
  const auto run = entry == "reverse_clean"        ? reverse_clean
                   : entry == "unwritten_output"   ? unwritten_output
                   : entry == "read_out_of_bounds" ? read_out_of_bounds
                                                   : write_out_of_bounds;
  vlm::check_launched("probe", run(x.const_data_ptr<float>(), out.mutable_data_ptr<float>(),
                                   static_cast<int>(x.numel())));
  return out;
}

TORCH_LIBRARY_FRAGMENT(VLM_LIBRARY, m) {
  m.def("probe(Tensor x, str entry, bool zeroed) -> Tensor");
}

TORCH_LIBRARY_IMPL(VLM_LIBRARY, CUDA, m) { m.impl("probe", probe); }

}  // namespace

PYBIND11_MODULE(_C_emu, m) {
  m.doc() = "The extension of vlm_kernels with its CUDA ops emulated on CPU tensors.";
  emulate_all_ops();
  vlm::bind_attention(m);
  vlm::bind_contrastive(m);
  vlm::bind_patch_embed(m);
  vlm::bind_workspace(m);
}
