#include "watch.h"

#include <c10/core/StorageImpl.h>

#include <algorithm>

#include "python_tensor.h"

namespace fastema {
namespace {

constexpr size_t kAhead = 8;  // how many objects ahead to ask for, so that their cache misses overlap

const c10::TensorImpl* tensor_of(PyObject* object) { return tensor_in(object).unsafeGetTensorImpl(); }

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

Watch::Watch(const std::vector<pybind11::dict>& dicts, const std::vector<pybind11::object>& tensors,
             const std::vector<at::Tensor>& shadows, const std::vector<std::pair<pybind11::dict, std::string>>& loose) {
  for (const pybind11::dict& dict : dicts) {
    held_.push_back(dict);
    for (const auto& item : dict) {
      const bool is_loose = std::any_of(loose.begin(), loose.end(), [&](const auto& slot) {
        return slot.first.is(dict) && pybind11::cast<std::string>(item.first) == slot.second;
      });
      if (!is_loose) held_.push_back(pybind11::reinterpret_borrow<pybind11::object>(item.second));
      value_addresses_.push_back(is_loose ? nullptr : item.second.ptr());
    }
    slots_.push_back({dict.ptr(), value_addresses_.size()});
  }
  for (const pybind11::object& tensor : tensors) {
    if (!is_tensor(tensor.ptr())) throw pybind11::type_error("a watch takes tensors");
    held_.push_back(tensor);
    const c10::TensorImpl* impl = tensor_of(tensor.ptr());
    const c10::StorageImpl* storage = storage_of(impl);
    for (const at::IntArrayRef dimensions : {impl->sizes(), impl->strides()}) {
      dimensions_.insert(dimensions_.end(), dimensions.begin(), dimensions.end());
    }
    places_.push_back(
        {tensor.ptr(), storage, storage->data(), impl->storage_offset(), impl->dtype(), dimensions_.size()});
  }
  for (const at::Tensor& shadow : shadows) {
    const c10::Storage& storage = shadow.storage();
    shadows_.push_back({storage, storage.data(), storage.nbytes()});
  }
}

bool Watch::slots_hold() const {
  size_t begin = 0;
  for (size_t i = 0; i < slots_.size(); ++i) {
    if (i + kAhead < slots_.size()) __builtin_prefetch(slots_[i + kAhead].dict);
    const Slots& slots = slots_[i];
    if (PyDict_GET_SIZE(slots.dict) != static_cast<Py_ssize_t>(slots.end - begin)) return false;
    PyObject *key, *value;
    Py_ssize_t position = 0;
    for (; begin < slots.end; ++begin) {
      if (!PyDict_Next(slots.dict, &position, &key, &value)) return false;
      if (value != value_addresses_[begin] && value_addresses_[begin] != nullptr) return false;
    }
  }
  return !cleared_;
}

bool Watch::places_hold(bool with_memory) const {
  size_t begin = 0;
  for (size_t i = 0; i < places_.size(); ++i) {
    if (i + 2 * kAhead < places_.size()) __builtin_prefetch(places_[i + 2 * kAhead].tensor);
    if (i + kAhead < places_.size()) {
      const char* ahead = reinterpret_cast<const char*>(tensor_of(places_[i + kAhead].tensor));
      __builtin_prefetch(ahead);
      __builtin_prefetch(ahead + 64);
      __builtin_prefetch(ahead + 128);
      __builtin_prefetch(places_[i + kAhead].storage);
    }
    const Place& place = places_[i];
    const size_t dimensions = (place.end - begin) / 2;
    const c10::TensorImpl* tensor = tensor_of(place.tensor);
    if (storage_of(tensor) != place.storage || (with_memory && place.storage->data() != place.data) ||
        tensor->storage_offset() != place.offset || tensor->dtype() != place.dtype ||
        static_cast<size_t>(tensor->dim()) != dimensions || !same(tensor->sizes(), dimensions_.data() + begin) ||
        !same(tensor->strides(), dimensions_.data() + begin + dimensions)) {
      return false;
    }
    begin = place.end;
  }
  return true;
}

bool Watch::shadows_hold() const {
  return std::all_of(shadows_.begin(), shadows_.end(), [](const Memory& memory) {
    return memory.storage.data() == memory.data && memory.storage.nbytes() == memory.bytes;
  });
}

int Watch::traverse(visitproc visit, void* arg) const {
  for (const pybind11::object& object : held_) Py_VISIT(object.ptr());
  return 0;
}

void Watch::clear() {
  cleared_ = true;
  slots_.clear();
  places_.clear();
  const std::vector<pybind11::object> released = std::move(held_);  // may run Python code, which finds nothing here
  held_.clear();
}

}  // namespace fastema
