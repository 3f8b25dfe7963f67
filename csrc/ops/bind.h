// Binds a registered op to the Python module: the call goes through a cached dispatcher handle, so
// that modes, subclasses, functorch and the profiler see it, without torch.ops' Python overhead.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/utils/pybind.h>

#include <string>
#include <vector>

// The emulated kernels are a library of their own, so that both can live in one process.
#ifdef VLM_EMULATED
#define VLM_LIBRARY vlm_kernels_emu
#else
#define VLM_LIBRARY vlm_kernels
#endif
#define VLM_QUOTE_(x) #x
#define VLM_QUOTE(x) VLM_QUOTE_(x)

namespace vlm {

// A registered op of this library, to be looked up once.
template <class Signature>
c10::TypedOperatorHandle<Signature> op_handle(const char* name) {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow((std::string(VLM_QUOTE(VLM_LIBRARY) "::") + name).c_str(), "")
      .typed<Signature>();
}

// What Python passes for a parameter.
template <class X>
struct FromPython {
  using type = X;
};
template <class X>
struct FromPython<at::ArrayRef<X>> {
  using type = std::vector<X>;
};

template <class Signature>
struct OpBinder;

template <class Result, class... Args>
struct OpBinder<Result(Args...)> {
  static void bind(pybind11::module_& m, const char* name) {
    const auto handle = op_handle<Result(Args...)>(name);
    m.def(
        name,
        [handle](typename FromPython<Args>::type... args) {
          return handle.call(static_cast<Args>(args)...);
        },
        pybind11::call_guard<pybind11::gil_scoped_release>());
  }
};

template <class Signature>
void bind_op(pybind11::module_& m, const char* name) {
  OpBinder<Signature>::bind(m, name);
}

}  // namespace vlm
