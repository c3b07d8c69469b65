#include "watch.h"

#include <utility>

namespace fastema {
namespace {

// The address of the first element; unlike data_ptr() it never throws, not even for storage that was freed.
const void* first_element(const at::Tensor& tensor) {
  const c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  const char* base = static_cast<const char*>(impl->storage().data());
  return base + impl->storage_offset() * static_cast<int64_t>(impl->itemsize());
}

}  // namespace

Watch::Watch(const std::vector<pybind11::dict>& dicts, std::vector<at::Tensor> tensors) : tensors_(std::move(tensors)) {
  slots_.reserve(dicts.size());
  for (const pybind11::dict& dict : dicts) {
    Slots slots{dict, {}};
    for (const auto& item : dict) slots.values.push_back(pybind11::reinterpret_borrow<pybind11::object>(item.second));
    slots_.push_back(std::move(slots));
  }
  memory_.reserve(tensors_.size());
  for (const at::Tensor& tensor : tensors_) {
    memory_.push_back({first_element(tensor), tensor.sizes().vec(), tensor.strides().vec()});
  }
}

bool Watch::holds() const {
  for (const Slots& slots : slots_) {
    if (PyDict_Size(slots.dict.ptr()) != static_cast<Py_ssize_t>(slots.values.size())) return false;
    PyObject *key, *value;
    Py_ssize_t position = 0;
    for (size_t i = 0; PyDict_Next(slots.dict.ptr(), &position, &key, &value); ++i) {
      if (value != slots.values[i].ptr()) return false;
    }
  }
  for (size_t i = 0; i < tensors_.size(); ++i) {
    const Memory& memory = memory_[i];
    if (first_element(tensors_[i]) != memory.data || tensors_[i].sizes() != at::IntArrayRef(memory.sizes) ||
        tensors_[i].strides() != at::IntArrayRef(memory.strides)) {
      return false;
    }
  }
  return true;
}

}  // namespace fastema
