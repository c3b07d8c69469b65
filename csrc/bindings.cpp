// The Python module fastema._C: the bindings, and one function that joins a Plan and a Watch.
// fastema/backends/native.py is its only importer.
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "plan.h"
#include "storage_exchange.h"
#include "watch.h"

namespace py = pybind11;

namespace {

// Lets the garbage collector see the Python objects that a Watch refers to.
void collect_garbage_through_watches(PyHeapTypeObject* heap_type) {
  PyTypeObject* type = &heap_type->ht_type;
  type->tp_flags |= Py_TPFLAGS_HAVE_GC;
  static const auto watch_of = [](PyObject* self) -> fastema::Watch* {
    auto value = reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder();
    return value.holder_constructed() ? value.value_ptr<fastema::Watch>() : nullptr;
  };
  type->tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    const fastema::Watch* watch = watch_of(self);
    return watch == nullptr ? 0 : watch->traverse(visit, arg);
  };
  type->tp_clear = [](PyObject* self) {
    if (fastema::Watch* watch = watch_of(self)) watch->clear();
    return 0;
  };
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  using fastema::Isa;
  using fastema::Plan;
  using fastema::StorageExchange;
  using fastema::Watch;
  using Tensors = std::vector<at::Tensor>;

  module.doc() = "fastema's kernels; use fastema.FastEMA.";
  module.def("has_cuda", &fastema::has_cuda, "Whether the CUDA kernels were compiled in.");
  module.def("gpu_type", [] { return c10::DeviceTypeName(fastema::kGpu, true); }, "The kind of device they run on.");
  module.def("probe_cuda", &fastema::probe_cuda, py::arg("index"), py::call_guard<py::gil_scoped_release>(),
             "Why the CUDA kernels cannot run on this device, or None.");
  module.def("advance_clock", &fastema::advance_clock, py::call_guard<py::gil_scoped_release>(),
             "One optimizer step of fastema.core.decay.device_schedule.DeviceSchedule, on its GPU.");
  module.def("cpu_isa", [] { return fastema::isa_name(fastema::best_isa()); }, "The instruction set in use.");

  py::enum_<Isa>(module, "Isa")
      .value("baseline", Isa::kBaseline)
      .value("avx2", Isa::kAvx2)
      .value("avx512", Isa::kAvx512);

  py::class_<Plan>(module, "Plan")
      .def(
          py::init<std::vector<Tensors>, Tensors, const std::vector<bool>&, const Tensors&, fastema::OptionalTensors>(),
          py::arg("shadows"), py::arg("lives"), py::arg("copies"), py::arg("views"),
          py::arg("lows") = fastema::OptionalTensors(), py::call_guard<py::gil_scoped_release>())
      .def("update", &Plan::update, py::arg("weights"), py::arg("skip_nonfinite"), py::arg("skip") = py::none(),
           py::arg("device_weights") = py::none(), py::call_guard<py::gil_scoped_release>())
      .def("update_watched", &Plan::update_watched, py::arg("watch"), py::arg("weights"), py::arg("skip_nonfinite"),
           py::arg("skip") = py::none())
      .def("exchange", &Plan::exchange, py::arg("which"), py::call_guard<py::gil_scoped_release>())
      .def("nonfinite_count", &Plan::nonfinite_count, py::call_guard<py::gil_scoped_release>())
      .def("chunk_count", &Plan::chunk_count)
      .def("set_isa", &Plan::set_isa);

  py::class_<StorageExchange>(module, "StorageExchange")
      .def(py::init<const Tensors&, const Tensors&, const Tensors&,
                    const std::vector<std::pair<at::Tensor, at::Tensor>>&>(),
           py::arg("lives"), py::arg("others"), py::arg("managed"),
           py::arg("parts") = std::vector<std::pair<at::Tensor, at::Tensor>>())
      .def("enter", &StorageExchange::enter, py::arg("version_step"))
      .def("untouched", &StorageExchange::untouched)
      .def("leave_untouched", &StorageExchange::leave_untouched)
      .def("leave", &StorageExchange::leave, py::arg("staying") = std::vector<size_t>())
      .def_property_readonly("entered", &StorageExchange::entered);
  module.def("second_owner", &fastema::second_owner, "A second storage over the memory of a tensor's.");

  using Loose = std::vector<std::pair<py::dict, std::string>>;
  py::class_<Watch>(module, "Watch", py::custom_type_setup(&collect_garbage_through_watches))
      .def(py::init<const std::vector<py::dict>&, const std::vector<py::object>&, const Tensors&, const Loose&>(),
           py::arg("dicts"), py::arg("tensors"), py::arg("shadows") = Tensors(), py::arg("loose") = Loose())
      .def("holds", &Watch::holds)
      .def("layout_holds", &Watch::layout_holds)
      .def("shadows_hold", &Watch::shadows_hold);
}
