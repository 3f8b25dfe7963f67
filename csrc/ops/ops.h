// What each op's file gives the Python module.
#pragma once

#include <pybind11/pybind11.h>

namespace vlm {

void bind_workspace(pybind11::module_& m);
void bind_attention(pybind11::module_& m);
void bind_contrastive(pybind11::module_& m);
void bind_contrastive_autograd(pybind11::module_& m);
void bind_patch_embed(pybind11::module_& m);

}  // namespace vlm
