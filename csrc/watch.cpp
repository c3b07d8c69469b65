#include "watch.h"

#include <c10/core/StorageImpl.h>

#include <algorithm>
#include <utility>

namespace fastema {
namespace {

constexpr size_t kAhead = 8;  // how many objects ahead to ask for, so that their cache misses overlap

// The storage of a tensor; unlike data_ptr() this never throws, not even for storage that was freed.
const c10::StorageImpl* storage_of(const c10::TensorImpl* tensor) {
  return tensor->unsafe_storage().unsafeGetStorageImpl();
}

// One to four numbers, as a rule: std::equal would call memcmp for them.
bool same(at::IntArrayRef now, const int64_t* then) {
  bool equal = true;
  for (size_t i = 0; i < now.size(); ++i) equal &= now[i] == then[i];
  return equal;
}

}  // namespace

Watch::Watch(const std::vector<pybind11::dict>& dicts, std::vector<at::Tensor> tensors)
    : dicts_(dicts), tensors_(std::move(tensors)) {
  for (const pybind11::dict& dict : dicts_) {
    for (const auto& item : dict) values_.push_back(pybind11::reinterpret_borrow<pybind11::object>(item.second));
    slots_.push_back({dict.ptr(), values_.size()});
  }
  for (const pybind11::object& value : values_) value_addresses_.push_back(value.ptr());
  for (const at::Tensor& tensor : tensors_) {
    const c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
    const c10::StorageImpl* storage = storage_of(impl);
    for (const at::IntArrayRef dimensions : {impl->sizes(), impl->strides()}) {
      dimensions_.insert(dimensions_.end(), dimensions.begin(), dimensions.end());
    }
    memory_.push_back({impl, storage, storage->data(), impl->storage_offset(), impl->dtype(), dimensions_.size()});
  }
}

bool Watch::holds() const {
  size_t begin = 0;
  for (size_t i = 0; i < slots_.size(); ++i) {
    if (i + kAhead < slots_.size()) __builtin_prefetch(slots_[i + kAhead].dict);
    const Slots& slots = slots_[i];
    if (PyDict_GET_SIZE(slots.dict) != static_cast<Py_ssize_t>(slots.end - begin)) return false;
    PyObject *key, *value;
    Py_ssize_t position = 0;
    for (; begin < slots.end; ++begin) {
      if (!PyDict_Next(slots.dict, &position, &key, &value) || value != value_addresses_[begin]) return false;
    }
  }
  begin = 0;
  for (size_t i = 0; i < memory_.size(); ++i) {
    if (i + kAhead < memory_.size()) {
      const char* tensor = reinterpret_cast<const char*>(memory_[i + kAhead].tensor);
      __builtin_prefetch(tensor);
      __builtin_prefetch(tensor + 64);
      __builtin_prefetch(tensor + 128);
      __builtin_prefetch(memory_[i + kAhead].storage);
    }
    const Memory& memory = memory_[i];
    const size_t dimensions = (memory.end - begin) / 2;
    const c10::TensorImpl* tensor = memory.tensor;
    if (storage_of(tensor) != memory.storage || memory.storage->data() != memory.data ||
        tensor->storage_offset() != memory.offset || tensor->dtype() != memory.dtype ||
        static_cast<size_t>(tensor->dim()) != dimensions || !same(tensor->sizes(), dimensions_.data() + begin) ||
        !same(tensor->strides(), dimensions_.data() + begin + dimensions)) {
      return false;
    }
    begin = memory.end;
  }
  return true;
}

}  // namespace fastema
