// The extension module: what is bound here needs no torch header, ops bind themselves.
#include <pybind11/pybind11.h>

#include <sstream>
#include <string>

#include "bindings/build_config.h"
#include "cpu/gemm.h"
#include "cpu/isa.h"
#include "ops/ops.h"
#ifdef VLM_HAS_CUDA
#include "vlm/device.h"
#endif

namespace py = pybind11;

namespace {

py::list split(const std::string& text, char separator) {
  py::list parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, separator);) parts.append(part);
  return parts;
}

py::object text_or_none(const char* text) {
  return *text ? py::object(py::str(text)) : py::object(py::none());
}

py::dict build_info() {
  namespace build = vlm::build;
  py::dict info;
  info["version"] = build::kVersion;
  info["torch"] = build::kTorch;
  info["python"] = build::kPython;
  info["compiler"] = build::kCompiler;
  info["cuda"] = *build::kCuda != '\0';
  info["cuda_version"] = text_or_none(build::kCuda);
  info["cuda_archs"] = split(build::kCudaArchs, ';');
  info["isas"] = split(build::kIsas, ';');
  info["sanitize"] = split(build::kSanitize, ',');
  info["commit"] = text_or_none(build::kCommit);
  return info;
}

void set_cpu_isa(const std::string& name) {
  if (!vlm::set_cpu_isa(name.c_str())) {
    throw py::value_error("set_cpu_isa: this CPU runs " + std::string(vlm::cpu_isas()) + ", and '" +
                          name + "' is none of them");
  }
}

py::dict cuda_devices() {
  py::list devices;
  const char* error = "vlm_kernels was built without CUDA: rebuild it with VLM_CUDA=ON";
#ifdef VLM_HAS_CUDA
  int count = 0;
  error = vlm::cuda::device_count(&count);
  for (int device = 0; device < count && error == nullptr; ++device) {
    char text[512] = "";
    error = vlm::cuda::device_description(device, text, sizeof(text));
    if (error == nullptr) devices.append(text);
  }
#endif
  py::dict result;
  result["devices"] = devices;
  result["error"] = error ? py::object(py::str(error)) : py::object(py::none());
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled kernels of vlm_kernels; call them through vlm_kernels.ops.";
  m.def("build_info", &build_info, "What this extension was built from, with and for.");
  m.def("cpu_isa", &vlm::cpu_isa, "The instruction set the CPU kernels run on.");
  m.def(
      "cpu_isas", [] { return split(vlm::cpu_isas(), ','); },
      "The instruction sets that this CPU can run.");
  m.def(
      "gemm_probe",
      [](const std::string& dtype, double seconds) {
        if (dtype != "fp32" && dtype != "bf16") {
          throw py::value_error("gemm_probe: dtype is '" + dtype + "', expected 'fp32' or 'bf16'");
        }
        return vlm::gemm_probe(dtype == "bf16", seconds);
      },
      py::arg("dtype"), py::arg("seconds"), py::call_guard<py::gil_scoped_release>(),
      "FLOP/s of the CPU kernels' bare multiply on torch's threads.");
  m.def("set_cpu_isa", &set_cpu_isa, py::arg("name"),
        "Choose the instruction set of the CPU kernels; ValueError if this CPU lacks it.");
  m.def("cuda_devices", &cuda_devices,
        "{'devices': descriptions, 'error': why CUDA cannot be used, or None}.");
  vlm::bind_attention(m);
  vlm::bind_contrastive(m);
  vlm::bind_patch_embed(m);
  vlm::bind_workspace(m);
}
