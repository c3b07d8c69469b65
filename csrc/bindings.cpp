// The Python module fastema._C: nothing but bindings. fastema/backends/native.py is its only importer.
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "plan.h"
#include "storage_exchange.h"
#include "watch.h"

namespace py = pybind11;

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  using fastema::Isa;
  using fastema::Plan;
  using fastema::StorageExchange;
  using fastema::Watch;
  using Tensors = std::vector<at::Tensor>;

  module.doc() = "fastema's kernels; use fastema.FastEMA.";
  module.def("has_cuda", &fastema::has_cuda, "Whether the CUDA kernels were compiled in.");
  module.def("probe_cuda", &fastema::probe_cuda, py::arg("index"), py::call_guard<py::gil_scoped_release>(),
             "Why the CUDA kernels cannot run on this device, or None.");
  module.def("advance_clock", &fastema::advance_clock, py::arg("table"), py::arg("update_every"), py::arg("found_inf"),
             py::arg("step"), py::arg("num_updates"), py::arg("weights"), py::arg("skip"),
             py::call_guard<py::gil_scoped_release>());
  module.def("cpu_isa", [] { return fastema::isa_name(fastema::best_isa()); }, "The instruction set in use.");

  py::enum_<Isa>(module, "Isa")
      .value("baseline", Isa::kBaseline)
      .value("avx2", Isa::kAvx2)
      .value("avx512", Isa::kAvx512);

  py::class_<Plan>(module, "Plan")
      .def(py::init<std::vector<Tensors>, Tensors, const std::vector<bool>&, const Tensors&>(), py::arg("shadows"),
           py::arg("lives"), py::arg("copies"), py::arg("views"), py::call_guard<py::gil_scoped_release>())
      .def("update", &Plan::update, py::arg("weights"), py::arg("guard"), py::arg("skip") = py::none(),
           py::arg("device_weights") = py::none(), py::call_guard<py::gil_scoped_release>())
      .def("exchange", &Plan::exchange, py::arg("which"), py::call_guard<py::gil_scoped_release>())
      .def("nonfinite_count", &Plan::nonfinite_count, py::call_guard<py::gil_scoped_release>())
      .def("chunk_count", &Plan::chunk_count)
      .def("set_isa", &Plan::set_isa);

  py::class_<StorageExchange>(module, "StorageExchange")
      .def(py::init<const Tensors&, const Tensors&, const Tensors&>(), py::arg("lives"), py::arg("others"),
           py::arg("managed"))
      .def("enter", &StorageExchange::enter, py::arg("version_step"))
      .def("leave", &StorageExchange::leave)
      .def_property_readonly("entered", &StorageExchange::entered);

  py::class_<Watch>(module, "Watch")
      .def(py::init<const std::vector<py::dict>&, Tensors>(), py::arg("dicts"), py::arg("tensors"))
      .def("holds", &Watch::holds);
}
