// Where this extension expects the fields of torch's structures, as data that fastema/backends/loading.py reads from
// the file and compares with a tensor's before it loads it. The same torch minor may be built otherwise.
#include <Python.h>
#include <c10/core/StorageImpl.h>
#include <c10/core/TensorImpl.h>

#include <cstddef>

namespace fastema {

struct Layout {
  char mark[24];
  int64_t tensor_in_object;
  int64_t storage, version_counter, sizes_and_strides, storage_offset, count, dtype;  // in a TensorImpl
  int64_t data, bytes;                                                                // in a StorageImpl
};

namespace {

struct Fields : c10::TensorImpl {  // whose fields are protected
  static constexpr Layout layout() {
    return {"fastema: torch's layout",
            sizeof(PyObject),  // see python_tensor.h
            offsetof(Fields, storage_),
            offsetof(Fields, version_counter_),
            offsetof(Fields, sizes_and_strides_),
            offsetof(Fields, storage_offset_),
            offsetof(Fields, numel_),
            offsetof(Fields, data_type_),
            sizeof(c10::intrusive_ptr_target),  // its first two fields, which are private
            sizeof(c10::intrusive_ptr_target) + sizeof(c10::DataPtr)};
  }
};

}  // namespace
}  // namespace fastema

// Exported, so that the linker keeps it.
extern "C" {
extern __attribute__((visibility("default"))) const fastema::Layout fastema_torch_layout;
const fastema::Layout fastema_torch_layout = fastema::Fields::layout();
}
