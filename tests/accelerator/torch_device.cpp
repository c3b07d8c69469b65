// Tells torch of the devices in device.h, as PrivateUse1: guard, allocators, copies, and every other operation by
// running its CPU kernel on a stream's thread.
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>
#include <thread>

#include "device.h"

namespace {

constexpr at::DeviceType kType = at::kPrivateUse1;

// ---- current device and streams, of each thread ----

thread_local int current_device = 0;
thread_local int64_t current_streams[hostgpu::kDevices] = {};
std::atomic<bool> has_context[hostgpu::kDevices] = {};  // as on CUDA: what a device's first use costs memory for

hostgpu::Stream& native(const c10::Stream& stream) { return hostgpu::stream(stream.device_index(), stream.id()); }
c10::Stream of(int device, int64_t number) {
  return c10::Stream(c10::Stream::UNSAFE, at::Device(kType, static_cast<c10::DeviceIndex>(device)), number);
}
hostgpu::Stream& current(int device) { return hostgpu::stream(device, current_streams[device]); }

void set_device(int device) {
  TORCH_CHECK(device >= 0 && device < hostgpu::kDevices, "no device ", device, ": there are ", hostgpu::kDevices);
  has_context[device] = true;
  current_device = device;
}

struct Event {
  std::shared_ptr<hostgpu::Moment> moment;
  int device;
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr at::DeviceType static_type = kType;
  at::DeviceType type() const override { return kType; }
  at::Device getDevice() const override { return {kType, static_cast<c10::DeviceIndex>(current_device)}; }
  void setDevice(at::Device device) const override { set_device(device.index()); }
  void uncheckedSetDevice(at::Device device) const noexcept override { current_device = device.index(); }
  at::Device exchangeDevice(at::Device device) const override {
    const at::Device before = getDevice();
    if (device.index() != before.index()) set_device(device.index());
    return before;
  }
  c10::DeviceIndex deviceCount() const noexcept override { return hostgpu::kDevices; }

  c10::Stream getStream(at::Device device) const override {
    const int index = device.has_index() ? device.index() : current_device;
    return of(index, current_streams[index]);
  }
  c10::Stream getDefaultStream(at::Device device) const override { return of(device.index(), 0); }
  c10::Stream getNewStream(at::Device device, int) const override {
    const int index = device.has_index() ? device.index() : current_device;
    has_context[index] = true;
    return of(index, hostgpu::new_stream_number(index));
  }
  c10::Stream getStreamFromGlobalPool(at::Device device, bool) const override { return getNewStream(device, 0); }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const c10::Stream before = getStream(stream.device());
    current_streams[stream.device_index()] = stream.id();
    return before;
  }
  void* getStreamNativeHandle(const c10::Stream stream) const override { return &native(stream); }
  bool queryStream(const c10::Stream& stream) const override { return native(stream).is_idle(); }
  void synchronizeStream(const c10::Stream& stream) const override { native(stream).synchronize(); }
  void synchronizeDevice(c10::DeviceIndex device) const override { hostgpu::synchronize_device(device); }
  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& stream) const override {
    if (data.get() != nullptr) hostgpu::record(data.get(), native(stream));
  }

  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex, const c10::EventFlag) const override {
    if (*event == nullptr) *event = new Event{nullptr, stream.device_index()};
    auto* own = static_cast<Event*>(*event);
    TORCH_CHECK(own->device == stream.device_index(), "the event is of another device than the stream");
    own->moment = native(stream).moment();
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (event != nullptr) native(stream).wait(static_cast<Event*>(event)->moment);
  }
  bool queryEvent(void* event) const override {
    return event == nullptr || hostgpu::is_reached(*static_cast<Event*>(event)->moment);
  }
  void synchronizeEvent(void* event) const override {
    has_context[current_device] = true;
    if (event != nullptr) hostgpu::synchronize(*static_cast<Event*>(event)->moment);
  }
  double elapsedTime(void* from, void* to, const c10::DeviceIndex) const override {
    return hostgpu::milliseconds(*static_cast<Event*>(from)->moment, *static_cast<Event*>(to)->moment);
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// ---- memory ----

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    const at::Device device(kType, static_cast<c10::DeviceIndex>(current_device));
    if (bytes == 0) return {nullptr, device};
    has_context[current_device] = true;
    void* address = hostgpu::allocate(current_device, current(current_device), bytes);
    return {address, address, &hostgpu::free, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &hostgpu::free; }
  void copy_data(void*, const void*, size_t) const override { TORCH_CHECK(false, "not on this device"); }
};

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* address = hostgpu::allocate_pinned(bytes);
    return {address, address, &hostgpu::free_pinned, at::Device(at::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &hostgpu::free_pinned; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

DeviceAllocator device_allocator;
PinnedAllocator pinned_allocator;
REGISTER_ALLOCATOR(kType, &device_allocator);

std::atomic<bool> may_wait{true};

void check_may_wait() { TORCH_CHECK(may_wait, "called a synchronizing operation"); }

// What an operation does that needs a value from the device.
void wait_for(hostgpu::Stream& stream) {
  check_may_wait();
  stream.synchronize();
}

void enqueue_copy(hostgpu::Stream& stream, void* to, const void* from, size_t bytes) {
  if (bytes > 0) stream.run([=] { hostgpu::copy_bytes(to, from, bytes); });
}

void resize_storage(const c10::Storage& storage, size_t bytes) {
  const c10::DeviceGuard guard(storage.device());
  c10::DataPtr memory = device_allocator.allocate(bytes);
  const size_t kept = std::min(bytes, storage.nbytes());
  enqueue_copy(current(current_device), hostgpu::memory(memory.get()), hostgpu::memory(storage.mutable_data()), kept);
  storage.set_data_ptr_noswap(std::move(memory));
  storage.set_nbytes(bytes);
}

struct Hooks final : at::PrivateUse1HooksInterface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex device) const override { return has_context[device]; }
  c10::DeviceIndex deviceCount() const override { return hostgpu::kDevices; }
  c10::DeviceIndex getCurrentDevice() const override { return static_cast<c10::DeviceIndex>(current_device); }
  void setCurrentDevice(c10::DeviceIndex device) const override { set_device(device); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override {
    const int before = current_device;
    if (device >= 0 && device != before) set_device(device);
    return static_cast<c10::DeviceIndex>(before);
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override {
    const int before = current_device;
    if (device >= 0) current_device = device;
    return static_cast<c10::DeviceIndex>(before);
  }
  bool isPinnedPtr(const void* address) const override { return hostgpu::is_pinned(address); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  at::Device getDeviceFromPtr(void* address) const override {
    return {kType, static_cast<c10::DeviceIndex>(hostgpu::device_of(address))};
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    resize_storage(storage, bytes);
  }
};

// ---- tensors: made, seen otherwise, resized ----

at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  const c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_generic(size, &device_allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  const c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_strided_generic(size, stride, &device_allocator,
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

void make_room(const at::Tensor& tensor) {
  const size_t needed = at::detail::computeStorageNbytes(tensor.sizes(), tensor.strides(), tensor.dtype().itemsize(),
                                                         tensor.storage_offset());
  if (tensor.numel() > 0 && needed > tensor.storage().nbytes()) resize_storage(tensor.storage(), needed);
}

const at::Tensor& resize_(const at::Tensor& self, c10::IntArrayRef size, std::optional<at::MemoryFormat>) {
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  make_room(self);
  return self;
}

at::Tensor& set_storage(at::Tensor& self, at::Storage storage, int64_t offset, c10::IntArrayRef size,
                        c10::IntArrayRef stride) {
  at::native::checkSetStorage(self, storage, offset, size, stride);
  at::TensorImpl* impl = self.unsafeGetTensorImpl();
  impl->set_storage_offset(offset);
  if (stride.data() != nullptr) {
    impl->set_sizes_and_strides(size, stride);
  } else {
    impl->set_sizes_contiguous(size);
  }
  make_room(self);
  return self;
}

// ---- copies ----

bool is_on_device(const at::Tensor& tensor) { return tensor.device().type() == kType; }

// The memory of a device tensor as a CPU tensor, for a stream's thread alone. It keeps nothing alive: what is freed too
// early is poisoned under it.
at::Tensor on_stream(const at::Tensor& tensor) {
  auto* data = static_cast<char*>(hostgpu::memory(tensor.storage().mutable_data()));
  if (tensor.numel() == 0)
    return at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(at::kCPU));
  data += tensor.storage_offset() * static_cast<int64_t>(tensor.element_size());
  return at::from_blob(data, tensor.sizes(), tensor.strides(), tensor.options().device(at::kCPU));
}

void copy_on_device(const at::Tensor& from, const at::Tensor& to) {
  hostgpu::Stream& stream = current(to.device().index());
  const at::Tensor source = on_stream(from), target = on_stream(to);
  if (from.dtype() == to.dtype() && from.is_contiguous() && to.is_contiguous() && from.sizes() == to.sizes()) {
    enqueue_copy(stream, target.mutable_data_ptr(), source.const_data_ptr(), to.nbytes());
    return;
  }
  stream.run([source, target] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    target.copy_(source);
  });
}

void copy_to_device(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  if (!to.is_contiguous()) {
    const at::Tensor whole = at::empty(to.sizes(), to.options());
    copy_to_device(from, whole, non_blocking);
    return copy_on_device(whole, to);
  }
  at::Tensor source = from.to(to.scalar_type()).expand(to.sizes()).contiguous();
  hostgpu::Stream& stream = current(to.device().index());
  void* const target = on_stream(to).mutable_data_ptr();
  if (hostgpu::is_pinned(source.const_data_ptr())) {
    hostgpu::record_pinned(source.const_data_ptr(), stream);
    enqueue_copy(stream, target, source.const_data_ptr(), to.nbytes());
  } else {  // the caller may write to `from` as soon as this returns
    stream.run([staged = source.clone(), target, bytes = to.nbytes()] {
      hostgpu::copy_bytes(target, staged.const_data_ptr(), bytes);
    });
  }
  if (!non_blocking) wait_for(stream);
}

void copy_to_host(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  hostgpu::Stream& stream = current(from.device().index());
  if (from.dtype() != to.dtype() || !from.is_contiguous() || from.sizes() != to.sizes()) {
    const at::Tensor whole = at::empty(to.sizes(), from.options().dtype(to.dtype()));
    copy_on_device(from, whole);
    return copy_to_host(whole, to, non_blocking);
  }
  if (!to.is_contiguous()) {
    const at::Tensor whole = at::empty(to.sizes(), to.options());
    copy_to_host(from, whole, false);
    to.copy_(whole);
    return;
  }
  const bool is_pinned = to.numel() > 0 && hostgpu::is_pinned(to.const_data_ptr());
  if (!non_blocking || !is_pinned) check_may_wait();  // nothing is enqueued into memory that an error would free
  if (is_pinned) hostgpu::record_pinned(to.const_data_ptr(), stream);
  enqueue_copy(stream, to.mutable_data_ptr(), on_stream(from).const_data_ptr(), to.nbytes());
  if (!non_blocking || !is_pinned) wait_for(stream);
}

// Between two devices, after what either has been given and before what it is given next.
void copy_across(const at::Tensor& from, const at::Tensor& to) {
  hostgpu::Stream &source = current(from.device().index()), &target = current(to.device().index());
  const at::Tensor read = on_stream(from), written = on_stream(to);
  source.wait(target.moment());
  source.run([read, written] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    written.copy_(read);
  });
  target.wait(source.moment());
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  if (!is_on_device(from)) {
    copy_to_device(from, to, non_blocking);
  } else if (!is_on_device(to)) {
    copy_to_host(from, to, non_blocking);
  } else if (from.device() == to.device()) {
    copy_on_device(from, to);
  } else {
    copy_across(from, to);
  }
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  if (from.sizes() != to.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

void record_stream(at::Tensor& self, at::Stream stream) {
  if (void* data = self.storage().mutable_data()) hostgpu::record(data, native(stream));
}

// ---- everything else: its CPU kernel, on the stream ----

template <class Change>
c10::IValue with_tensors(const c10::IValue& value, const Change& change) {
  if (value.isTensor()) return change(value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> changed;
    for (const at::Tensor& tensor : value.toTensorVector()) changed.push_back(change(tensor));
    return changed;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> changed;
    for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector()) {
      changed.push_back(tensor.has_value() ? std::optional(change(*tensor)) : std::nullopt);
    }
    return changed;
  }
  return value;
}

at::Tensor as_argument(const at::Tensor& tensor) {
  if (!tensor.defined()) return tensor;
  if (is_on_device(tensor)) return on_stream(tensor);
  at::Tensor copy = tensor.clone();  // the host may write to it meanwhile
  if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) copy.unsafeGetTensorImpl()->set_wrapped_number(true);
  return copy;
}

at::Tensor as_shape(const at::Tensor& tensor) {
  if (!tensor.defined() || !is_on_device(tensor)) return tensor;
  return at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(at::kMeta));
}

at::Tensor like_shape(const at::Tensor& shape, at::Device device) {
  if (!shape.defined()) return shape;
  return at::empty_strided(shape.sizes(), shape.strides(), shape.options().device(device));
}

std::vector<at::Tensor> tensors_in(const std::vector<c10::IValue>& values) {
  std::vector<at::Tensor> found;
  for (const c10::IValue& value : values) {
    with_tensors(value, [&](const at::Tensor& tensor) { return found.push_back(tensor), tensor; });
  }
  return found;
}

torch::jit::Stack shapes_of(const std::vector<c10::IValue>& arguments) {
  torch::jit::Stack shapes;
  for (const c10::IValue& argument : arguments) {
    shapes.push_back(argument.isDevice() ? c10::IValue(at::Device(at::kMeta)) : with_tensors(argument, as_shape));
  }
  return shapes;
}

// `abs` and others give an empty output, for the kernel to resize: the CPU's could not, on a stream.
void resize_outputs(const c10::OperatorHandle& op, const std::vector<c10::IValue>& arguments) {
  const auto is_empty_output = [&](size_t i) {
    return op.schema().arguments()[i].is_out() && arguments[i].isTensor() && arguments[i].toTensor().numel() == 0;
  };
  std::vector<size_t> outputs;
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (is_empty_output(i)) outputs.push_back(i);
  }
  if (outputs.empty()) return;
  const torch::jit::Stack shapes = shapes_of(arguments);
  torch::jit::Stack stack = shapes;
  op.callBoxed(stack);
  for (const size_t i : outputs) arguments[i].toTensor().resize_(shapes[i].toTensor().sizes());
}

// Makes outputs of the shapes that the Meta kernel tells; nothing where there is none, or where values decide.
std::optional<std::vector<c10::IValue>> outputs_of(const c10::OperatorHandle& op,
                                                   const std::vector<c10::IValue>& arguments, at::Device device) {
  // Of 16-bit inputs the CPU's batch_norm gives statistics of another dtype than the Meta kernel tells.
  if (op.schema().name().find("native_batch_norm") != std::string::npos &&
      tensors_in(arguments).front().element_size() == 2) {
    return std::nullopt;
  }
  for (const c10::Argument& result : op.schema().returns()) {
    if (result.type()->kind() != c10::TypeKind::TensorType) return std::nullopt;
  }
  torch::jit::Stack shapes = shapes_of(arguments);
  try {
    op.callBoxed(shapes);
  } catch (const std::exception&) {
    return std::nullopt;
  }
  for (c10::IValue& shape : shapes) {
    shape = with_tensors(shape, [&](const at::Tensor& tensor) { return like_shape(tensor, device); });
  }
  return shapes;
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const c10::FunctionSchema& schema = op.schema();
  const auto first = stack->end() - static_cast<ptrdiff_t>(schema.arguments().size());
  const std::vector<c10::IValue> arguments(first, stack->end());
  at::Device device = Guard().getDevice();
  for (const at::Tensor& tensor : tensors_in(arguments)) {
    if (tensor.defined() && is_on_device(tensor)) device = tensor.device();
  }
  const c10::DeviceGuard guard(device);
  hostgpu::Stream& stream = current(device.index());
  resize_outputs(op, arguments);
  torch::jit::Stack inputs;
  for (const c10::IValue& argument : arguments) {
    inputs.push_back(argument.isDevice() ? c10::IValue(at::Device(at::kCPU)) : with_tensors(argument, as_argument));
  }

  std::vector<c10::IValue> written;  // the arguments that it returns: of `add_`, of `add.out`
  for (const c10::Argument& result : schema.returns()) {
    if (result.alias_info() == nullptr) break;
    TORCH_CHECK(result.alias_info()->isWrite(), schema.name(), " returns a view, and has no kernel on this device");
    for (size_t i = 0; i < arguments.size(); ++i) {
      const auto* alias = schema.arguments()[i].alias_info();
      if (alias != nullptr && *alias == *result.alias_info()) written.push_back(arguments[i]);
    }
  }
  stack->erase(first, stack->end());
  if (written.size() == schema.returns().size()) {
    stream.run([op, inputs]() mutable {
      const at::AutoDispatchBelowADInplaceOrView below;
      op.callBoxed(inputs);
    });
    stack->insert(stack->end(), written.begin(), written.end());
    return;
  }
  if (const auto outputs = outputs_of(op, arguments, device)) {
    std::vector<at::Tensor> targets;
    for (const at::Tensor& output : tensors_in(*outputs)) {
      targets.push_back(output.defined() ? on_stream(output) : output);
    }
    stream.run([op, inputs, targets]() mutable {
      const at::AutoDispatchBelowADInplaceOrView below;
      op.callBoxed(inputs);
      const std::vector<at::Tensor> results = tensors_in(inputs);
      for (size_t i = 0; i < targets.size(); ++i) {
        // In eval mode the CPU's batch_norm returns no statistics, where the Meta kernel has some.
        if (targets[i].defined() && targets[i].sizes() == results[i].sizes()) targets[i].copy_(results[i]);
      }
    });
    stack->insert(stack->end(), outputs->begin(), outputs->end());
    return;
  }

  wait_for(stream);
  op.callBoxed(inputs);
  for (const c10::IValue& result : inputs) {
    stack->push_back(
        with_tensors(result, [&](const at::Tensor& tensor) { return tensor.defined() ? tensor.to(device) : tensor; }));
  }
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("resize_", &resize_);
  library.impl("set_.source_Storage_storage_offset", &set_storage);
  library.impl("set_.source_Storage", static_cast<at::Tensor& (*)(at::Tensor&, at::Storage)>(&at::native::set_));
  library.impl("set_.source_Tensor", &at::native::set_tensor_);
  library.impl("as_strided", &at::native::as_strided_tensorimpl);
  library.impl("view", &at::native::view);
  library.impl("_reshape_alias", &at::native::_reshape_alias);
  library.impl("unfold", &at::native::unfold);
  library.impl("view_as_real", &at::native::view_as_real);
  library.impl("view_as_complex", &at::native::view_as_complex);
  library.impl("_copy_from", &copy_from);
  library.impl("_copy_from_and_resize", &copy_from_and_resize);
  library.impl("record_stream", &record_stream);
}

// A stream's work waits until this is opened.
class Gate {
 public:
  explicit Gate(const c10::Stream& stream) {
    native(stream).run([open = open_] {
      while (!*open) std::this_thread::sleep_for(std::chrono::microseconds(200));
    });
  }
  void open() { *open_ = true; }

 private:
  std::shared_ptr<std::atomic<bool>> open_ = std::make_shared<std::atomic<bool>>(false);
};

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  namespace py = pybind11;
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  module.def("device_count", [] { return hostgpu::kDevices; });
  module.def("current_device", [] { return current_device; });
  module.def("set_device", &set_device);
  module.def("has_context", [](int device) { return has_context[device].load(); });
  module.def("set_delay", &hostgpu::set_delay, "Let every task start up to so many microseconds late.");
  module.def("take_error", &hostgpu::take_error, "What the device found out since the last call, or nothing.");
  module.def(
      "synchronize", [](int device) { hostgpu::synchronize_device(device < 0 ? current_device : device); },
      py::arg("device") = -1, py::call_guard<py::gil_scoped_release>());
  module.def("set_sync_debug_mode", [](const std::string& mode) { may_wait = mode != "error"; });
  module.def("tasks", &hostgpu::tasks);
  module.def("allocations", &hostgpu::allocations);
  module.def("bytes_in_use", &hostgpu::bytes_in_use);
  module.def(
      "sleep",
      [](double seconds) {
        current(current_device).run([=] { std::this_thread::sleep_for(std::chrono::duration<double>(seconds)); });
      },
      "Let the current stream sleep.");
  py::class_<Gate>(module, "Gate").def(py::init<const c10::Stream&>()).def("open", &Gate::open);
}
