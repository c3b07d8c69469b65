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
  struct Slots {
    pybind11::dict dict;
    std::vector<pybind11::object> values;  // held, so that a new object cannot take a dead one's address
  };
  struct Memory {
    const void* data;
    std::vector<int64_t> sizes, strides;
  };

  std::vector<Slots> slots_;
  std::vector<at::Tensor> tensors_;
  std::vector<Memory> memory_;  // [tensors_]
};

}  // namespace fastema
