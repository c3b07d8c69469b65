// Tells, in about 10 ns a tensor, whether what a plan was built for is still what the model holds.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <vector>

namespace fastema {

class Watch {
 public:
  // dicts: the _parameters, _buffers and _modules of every module, as they are now; tensors: what the plan reads.
  Watch(const std::vector<pybind11::dict>& dicts, std::vector<at::Tensor> tensors);

  // True while every dict holds the same objects in the same order, and every tensor the same memory, sizes and
  // strides.
  bool holds() const;

 private:
  // Everything in flat arrays: after a training step the model's own objects are out of the cache, and every
  // indirection of ours would be one more miss.
  struct Slots {
    PyObject* dict;
    size_t end;  // its values are values_[previous end, end)
  };
  struct Memory {
    const c10::TensorImpl* tensor;
    const c10::StorageImpl* storage;
    const void* data;  // of the storage
    int64_t offset;    // elements
    caffe2::TypeMeta dtype;
    size_t end;  // its sizes and strides are dimensions_[previous end, end)
  };

  std::vector<pybind11::dict> dicts_;  // held, with every value, so that a new object cannot take a dead one's address
  std::vector<pybind11::object> values_;
  std::vector<at::Tensor> tensors_;
  std::vector<Slots> slots_;                // [dicts_]
  std::vector<PyObject*> value_addresses_;  // [values_]
  std::vector<Memory> memory_;              // [tensors_]
  std::vector<int64_t> dimensions_;
};

}  // namespace fastema
