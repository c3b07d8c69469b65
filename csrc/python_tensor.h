// torch's tensors in Python objects: torch's own header for them takes 14 s to compile, and needs libtorch_python.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

namespace fastema {

// The beginning of torch's THPVariable (torch/csrc/autograd/python_variable.h), equal in torch 2.10 to 2.15.
struct TensorObject {
  PyObject head;
  at::Tensor tensor;
};

inline const at::Tensor& tensor_in(PyObject* object) { return reinterpret_cast<TensorObject*>(object)->tensor; }

bool is_tensor(PyObject* object);

}  // namespace fastema

namespace pybind11::detail {

template <>
struct type_caster<at::Tensor> {
  PYBIND11_TYPE_CASTER(at::Tensor, const_name("torch.Tensor"));

  bool load(handle source, bool) {
    if (!fastema::is_tensor(source.ptr())) return false;
    value = fastema::tensor_in(source.ptr());
    return true;
  }
};

}  // namespace pybind11::detail
