// Checks, in about 10 ns a tensor, whether the model still holds what a plan was built for.
//
// It holds Python references, which the garbage collector can follow, and no at::Tensor of the model: C++ references to
// a tensor hide the Python objects behind it, and forbid torch.utils.swap_tensors.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <string>
#include <utility>
#include <vector>

namespace fastema {

class Watch {
 public:
  // dicts    the _parameters, _buffers and _modules of every module, as they are now
  // tensors  Python tensors that the plan reads
  // shadows  one tensor of every storage that holds averages
  // loose    (dict, key): values that may be replaced at any time
  Watch(const std::vector<pybind11::dict>& dicts, const std::vector<pybind11::object>& tensors,
        const std::vector<at::Tensor>& shadows, const std::vector<std::pair<pybind11::dict, std::string>>& loose);

  // True while every dict holds the same objects in the same order, every tensor the same memory, sizes and strides,
  // and every storage of averages the same memory.
  bool holds() const { return slots_hold() && places_hold(true) && shadows_hold(); }
  // The same, but storages may have other memory: while pointers are exchanged.
  bool layout_holds() const { return slots_hold() && places_hold(false); }
  // Whether the averages are where they were.
  bool shadows_hold() const;

  // For the garbage collector.
  int traverse(visitproc visit, void* arg) const;
  void clear();

 private:
  bool slots_hold() const;
  bool places_hold(bool with_memory) const;

  // Everything in flat arrays: after a training step the model's own objects are out of the cache, and every
  // indirection of ours would be one more miss.
  struct Slots {
    PyObject* dict;
    size_t end;  // its values are value_addresses_[previous end, end)
  };
  struct Place {
    PyObject* tensor;
    const c10::StorageImpl* storage;
    const void* data;  // of the storage
    int64_t offset;    // elements
    caffe2::TypeMeta dtype;
    size_t end;  // its sizes and strides are dimensions_[previous end, end)
  };
  struct Memory {
    c10::Storage storage;
    const void* data;
    size_t bytes;
  };

  std::vector<pybind11::object> held_;      // every dict, value and tensor, so that no new object can take its address
  std::vector<Slots> slots_;                // [dicts]
  std::vector<PyObject*> value_addresses_;  // [values]; null: loose
  std::vector<Place> places_;               // [tensors]
  std::vector<int64_t> dimensions_;
  std::vector<Memory> shadows_;
  bool cleared_ = false;
};

}  // namespace fastema
