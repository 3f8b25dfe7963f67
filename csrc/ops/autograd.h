// What the autograd nodes of the ops share.
#pragma once

#include <ATen/FuncTorchTLS.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>

#include <optional>
#include <string>

namespace vlm {

inline at::Tensor or_undefined(const std::optional<at::Tensor>& x) { return x ? *x : at::Tensor(); }

inline std::optional<at::Tensor> or_none(const at::Tensor& x) {
  return x.defined() ? std::optional<at::Tensor>(x) : std::nullopt;
}

// torch.func finds no way through a node in C++, and its own error does not name the call.
inline void refuse_transforms(const char* op) {
  const auto& functorch = at::functorch::functorchTLSAccessor();
  if (!functorch) return;
  try {
    functorch->checkSupportsCppAutogradFunction();
  } catch (const c10::Error&) {
    TORCH_CHECK_NOT_IMPLEMENTED(false, op,
                                ": torch.func (grad, vjp, jacrev, vmap) cannot differentiate it; "
                                "use backward() or torch.autograd.grad, or backend='reference'");
  }
}

// The ops have no autograd formula: the keys above them would only look for one.
struct BelowAutograd {
  at::AutoDispatchBelowADInplaceOrView below;
  c10::AutoGradMode no_grad{false};
};

// The gradients of a graph that is kept for a second derivative end here. `sources` are what they
// were computed from: whoever differentiates for one of those arrives here too.
struct SecondDerivative : torch::autograd::Function<SecondDerivative> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& grad,
                            at::TensorList /*sources*/, const char* op) {
    ctx->saved_data["op"] = std::string(op);
    return grad;
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list&) {
    TORCH_CHECK(false, ctx->saved_data["op"].toStringRef(),
                " has no second derivative: its backward is once_differentiable; use "
                "backend='reference'");
  }
};

// The gradients, each of which raises when it is differentiated.
inline torch::autograd::variable_list once_differentiable(
    torch::autograd::variable_list grads, const torch::autograd::variable_list& sources,
    const char* op) {
  if (!c10::GradMode::is_enabled()) return grads;
  torch::autograd::variable_list differentiable;
  for (const at::Tensor& x : sources) {
    if (x.defined() && x.requires_grad()) differentiable.push_back(x);
  }
  for (at::Tensor& grad : grads) {
    if (!grad.defined()) continue;
    // A leaf of its own, since a node may have kept none of the sources.
    grad =
        SecondDerivative::apply(grad.detach().requires_grad_(), at::TensorList(differentiable), op);
  }
  return grads;
}

}  // namespace vlm
