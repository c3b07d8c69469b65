// The Python module fastema._C: the bindings, and one function that joins a Plan and a Watch.
// fastema/backends/native.py is its only importer.
#include <pybind11/stl.h>

#include "plan.h"
#include "python_tensor.h"
#include "storage_exchange.h"
#include "watch.h"

namespace py = pybind11;

namespace {

PyTypeObject* tensor_type = nullptr;

// Calls Plan::update with an UpdateArgs of fastema/backends/contract.py. The fields are taken out by hand: pybind11's
// own conversion of a tuple subclass takes as long as an update of one tensor.
void update(fastema::Plan& plan, const py::tuple& args) {
  using Scalars = std::optional<at::Tensor>;
  if (args.size() != 4) throw py::type_error("an update takes UpdateArgs");
  const auto field = [&](int index) { return py::handle(PyTuple_GET_ITEM(args.ptr(), index)); };
  const auto weights = field(0).cast<std::vector<double>>();
  const bool skip_nonfinite = field(1).cast<bool>();
  const Scalars skip = field(2).is_none() ? std::nullopt : field(2).cast<Scalars>();
  const Scalars device_weights = field(3).is_none() ? std::nullopt : field(3).cast<Scalars>();
  const py::gil_scoped_release released;
  plan.update(weights, skip_nonfinite, skip, device_weights);
}

// Updates if the watch holds, in one call from Python, which holds the interpreter's lock. Returns "moved" if the watch
// does not hold, and nothing was done; "averages moved" if the averages' memory was replaced during the update, whose
// result is in the old memory then; else null.
const char* update_watched(fastema::Plan& plan, const fastema::Watch& watch, const py::tuple& args) {
  if (!watch.holds()) return "moved";
  update(plan, args);
  return watch.shadows_hold() ? nullptr : "averages moved";
}

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

bool fastema::is_tensor(PyObject* object) { return PyObject_TypeCheck(object, tensor_type); }

PYBIND11_MODULE(_C, module) {
  using fastema::Isa;
  using fastema::Plan;
  using fastema::StorageExchange;
  using fastema::Watch;
  using Tensors = std::vector<at::Tensor>;

  module.doc() = "fastema's kernels; use fastema.FastEMA.";
  // A reference for ever: the class outlives every module.
  tensor_type =
      reinterpret_cast<PyTypeObject*>(py::object(py::module_::import("torch").attr("Tensor")).release().ptr());
  module.def(
      "use_kernels",
      [](uintptr_t cpu, uintptr_t gpu, uintptr_t current_stream) {
        fastema::use_kernels(reinterpret_cast<const fastema::CpuKernels*>(cpu),
                             reinterpret_cast<const fastema::GpuKernels*>(gpu),
                             reinterpret_cast<fastema::CurrentStream*>(current_stream));
      },
      py::arg("cpu"), py::arg("gpu"), py::arg("current_stream"), "Take the kernels at these addresses; 0: none.");
  module.def("has_cuda", &fastema::has_gpu_kernels, "Whether there are kernels for a GPU.");
  module.def("gpu_type", [] { return c10::DeviceTypeName(fastema::gpu_type(), true); }, "The kind of GPU.");
  module.def("probe_cuda", &fastema::probe_cuda, py::arg("index"), py::call_guard<py::gil_scoped_release>(),
             "Why the CUDA kernels cannot run on this device, or None.");
  module.def("advance_clock", &fastema::advance_clock, py::call_guard<py::gil_scoped_release>(),
             "One optimizer step of fastema.core.counters.DeviceCounter, on its GPU.");
  module.def(
      "cpu_isa", [] { return fastema::cpu_kernels().isa_name(fastema::cpu_kernels().best_isa()); },
      "The instruction set in use.");

  py::enum_<Isa>(module, "Isa")
      .value("baseline", Isa::kBaseline)
      .value("avx2", Isa::kAvx2)
      .value("avx512", Isa::kAvx512);

  py::class_<Plan>(module, "Plan")
      .def(py::init<std::vector<fastema::TensorSegment>, const Tensors&>(), py::arg("segments"), py::arg("views"),
           py::call_guard<py::gil_scoped_release>())
      .def("update", &update, py::arg("args"))
      .def("update_watched", &update_watched, py::arg("watch"), py::arg("args"))
      .def("exchange", &Plan::exchange, py::arg("which"), py::call_guard<py::gil_scoped_release>())
      .def("nonfinite_count", &Plan::nonfinite_count, py::call_guard<py::gil_scoped_release>())
      .def("chunk_count", &Plan::chunk_count)
      .def("set_isa", &Plan::set_isa);

  py::class_<StorageExchange>(module, "StorageExchange")
      .def(py::init<const Tensors&, const Tensors&, const Tensors&,
                    const std::vector<std::pair<at::Tensor, at::Tensor>>&>(),
           py::arg("lives"), py::arg("others"), py::arg("managed"), py::arg("parts") = py::tuple())
      .def("enter", &StorageExchange::enter, py::arg("version_step"))
      .def("untouched", &StorageExchange::untouched)
      .def("leave_untouched", &StorageExchange::leave_untouched)
      .def("leave", &StorageExchange::leave, py::arg("staying") = std::vector<size_t>())
      .def_property_readonly("entered", &StorageExchange::entered);
  module.def("make_second_owner", &fastema::make_second_owner, "Let `flat` own the memory of `tensor` as well.");

  using Loose = std::vector<std::pair<py::dict, std::string>>;
  py::class_<Watch>(module, "Watch", py::custom_type_setup(&collect_garbage_through_watches))
      .def(py::init<const std::vector<py::dict>&, const std::vector<py::object>&, const Tensors&, const Loose&>(),
           py::arg("dicts"), py::arg("tensors"), py::arg("shadows") = py::tuple(), py::arg("loose") = Loose())
      .def("holds", &Watch::holds)
      .def("layout_holds", &Watch::layout_holds)
      .def("shadows_hold", &Watch::shadows_hold);
}
