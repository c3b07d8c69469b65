#include "plan.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/version.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace fastema {
namespace {

constexpr const char* kNoGpuKernels = "fastema._C was built without CUDA";

const CpuKernels* cpu_table = nullptr;
const GpuKernels* gpu_table = nullptr;
[[maybe_unused]] CurrentStream* current_stream_in_torch = nullptr;

// Complex tensors come in as pairs (view_as_real), so these are all dtypes that are averaged.
std::optional<Dtype> averaged_dtype(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return Dtype::kFloat32;
    case at::kDouble:
      return Dtype::kFloat64;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    case at::kHalf:
      return Dtype::kFloat16;
    default:
      return std::nullopt;
  }
}

Kind kind_of(const at::Tensor& shadow, const at::Tensor* low, const at::Tensor& live, bool copy) {
  if (low != nullptr) {
    if (shadow.scalar_type() != at::kBFloat16 || live.scalar_type() != at::kBFloat16 ||
        low->scalar_type() != at::kShort) {
      throw std::invalid_argument(std::string("a float32 in two planes is a bfloat16 and an int16 beside a bfloat16 ") +
                                  "tensor, got " + c10::toString(shadow.scalar_type()) + " and " +
                                  c10::toString(low->scalar_type()) + " beside " + c10::toString(live.scalar_type()));
    }
    return static_cast<Kind>((copy ? kConvert : kAverage) + dtype_pair(Dtype::kPlanes, Dtype::kBFloat16));
  }
  if (copy && shadow.scalar_type() == live.scalar_type()) return kCopyBytes;
  const auto shadow_dtype = averaged_dtype(shadow.scalar_type());
  const auto live_dtype = averaged_dtype(live.scalar_type());
  if (!shadow_dtype || !live_dtype) {
    throw std::invalid_argument(std::string("no kernel for a ") + c10::toString(shadow.scalar_type()) +
                                " shadow of a " + c10::toString(live.scalar_type()) + " tensor");
  }
  return static_cast<Kind>((copy ? kConvert : kAverage) + dtype_pair(*shadow_dtype, *live_dtype));
}

// The segment under its shadow `k`, for the kernels.
Segment checked(const TensorSegment& segment, size_t k, at::Device device) {
  const auto& [shadows, live, copy, lows] = segment;
  const at::Tensor& shadow = shadows[k];
  if (shadow.dim() != 1 || live.dim() != 1 || !shadow.is_contiguous() || !live.is_contiguous() ||
      shadow.numel() != live.numel()) {
    throw std::invalid_argument("a segment must be two contiguous 1-D tensors of equal length");
  }
  if (shadow.device() != device || live.device() != device) {
    throw std::invalid_argument("all segments of a plan must lie on one device");
  }
  if (shadow.scalar_type() != shadows.front().scalar_type()) {
    throw std::invalid_argument("all shadows of a segment must have one dtype");
  }
  const at::Tensor* low = lows.empty() ? nullptr : &lows[k];
  if (low != nullptr &&
      (low->dim() != 1 || !low->is_contiguous() || low->numel() != shadow.numel() || low->device() != device)) {
    throw std::invalid_argument("both planes of a segment must be contiguous, of equal length and on one device");
  }
  const Kind kind = kind_of(shadow, low, live, copy);
  const int64_t count = kind == kCopyBytes ? shadow.numel() * shadow.element_size() : shadow.numel();
  return {shadow.mutable_data_ptr(), low == nullptr ? nullptr : low->mutable_data_ptr(), live.const_data_ptr(), count,
          kind};
}

const void* scalars(const std::optional<at::Tensor>& tensor, at::ScalarType type, int64_t count, at::Device device,
                    const char* name) {
  if (!tensor.has_value()) return nullptr;
  if (tensor->scalar_type() != type || tensor->numel() != count || tensor->device() != device ||
      !tensor->is_contiguous()) {
    throw std::invalid_argument(std::string(name) + " must be " + std::to_string(count) + " " + c10::toString(type) +
                                " on " + device.str());
  }
  return tensor->const_data_ptr();
}

void check(CudaError error, const char* what) {
  if (error != nullptr) throw std::runtime_error(std::string("CUDA error in ") + what + ": " + error);
}

const GpuKernels& gpu_kernels() {
  if (gpu_table == nullptr) throw std::invalid_argument(kNoGpuKernels);
  return *gpu_table;
}

void* handle_of(const c10::Stream& stream) {
#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 11
  void* handle = nullptr;
  if (current_stream_in_torch == nullptr || current_stream_in_torch(stream.device_index(), &handle) != 0) {
    throw std::runtime_error("torch did not tell its current stream");
  }
  return handle;
#else  // no CUDA header of torch, so that this compiles against CPU-only torch too
  return stream.native_handle();
#endif
}

// A GPU wants chunks small enough to fill it.
int64_t chunk_size(const std::vector<Segment>& segments, at::Device device) {
  if (device.is_cpu()) return kCpuChunkElements;
  int64_t blocks = 0, elements = 0;
  check(gpu_kernels().resident_blocks(device.index(), blocks), "resident_blocks");
  for (const Segment& segment : segments) elements += segment.count;
  return chunk_elements_for(elements, blocks);
}

}  // namespace

void use_kernels(const CpuKernels* cpu, const GpuKernels* gpu, CurrentStream* current_stream) {
  if (std::string(cpu->version) != FASTEMA_VERSION) {
    throw std::invalid_argument(std::string("the kernels are of fastema ") + cpu->version + ", the extension of " +
                                FASTEMA_VERSION);
  }
  cpu_table = cpu;
  gpu_table = gpu;
  current_stream_in_torch = current_stream;
#ifndef FASTEMA_OWN_THREADS
  cpu->use_parallel_for(torch_parallel_for);
#endif
}

const CpuKernels& cpu_kernels() { return *cpu_table; }

bool has_gpu_kernels() { return gpu_table != nullptr; }

at::DeviceType gpu_type() { return gpu_table == nullptr ? at::kCUDA : at::DeviceType(gpu_table->device_type); }

std::optional<std::string> probe_cuda(int index) {
  if (gpu_table == nullptr) return kNoGpuKernels;
  const c10::DeviceGuard guard(at::Device(gpu_type(), static_cast<c10::DeviceIndex>(index)));
  const CudaError error = gpu_table->probe(index);
  return error == nullptr ? std::nullopt : std::optional<std::string>(error);
}

Plan::Plan(std::vector<TensorSegment> segments, const std::vector<at::Tensor>& views)
    : segments_(std::move(segments)), isa_(cpu_table->best_isa()), on_cpu_(nullptr, cpu_table->free_chunks) {
  if (!segments_.empty()) {
    const auto& [shadows, live, copy, lows] = segments_.front();
    shadows_ = static_cast<int>(shadows.size());
    device_ = live.device();
    if (shadows_ == 0) throw std::invalid_argument("a segment needs at least one shadow");
  }
  if (!device_.is_cpu() && device_.type() != gpu_type()) {
    throw std::invalid_argument("the native backend runs on CPU and CUDA, the tensors are on " + device_.str());
  }
  for (const auto& [shadows, live, copy, lows] : segments_) {
    if (shadows.size() != static_cast<size_t>(shadows_) || (!lows.empty() && lows.size() != shadows.size())) {
      throw std::invalid_argument("every segment of a plan must have as many shadows, and as many low planes or none");
    }
    same_dtypes_ = same_dtypes_ && shadows.front().scalar_type() == live.scalar_type();
  }
  std::vector<Chunk> chunks;
  for (int k = 0; k < shadows_; ++k) {
    std::vector<Segment> of_shadow;
    of_shadow.reserve(segments_.size());
    for (const TensorSegment& segment : segments_) of_shadow.push_back(checked(segment, k, device_));
    const std::vector<Chunk> cuts = cut(of_shadow, chunk_size(of_shadow, device_));
    chunks.insert(chunks.end(), cuts.begin(), cuts.end());
  }
  chunk_count_ = static_cast<int64_t>(chunks.size()) / std::max(shadows_, 1);
  view_versions_.reserve(views.size());
  for (const at::Tensor& view : views) view_versions_.push_back(view.unsafeGetTensorImpl()->version_counter());
  if (segments_.empty()) return;
  if (device_.is_cpu()) {
    const int64_t count = static_cast<int64_t>(chunks.size());
    on_cpu_.reset(cpu_table->make_chunks(chunks.data(), count, shadows_));
  } else {
    const int64_t bytes = static_cast<int64_t>(chunks.size() * sizeof(Chunk));
    const at::Tensor table = at::from_blob(chunks.data(), {bytes}, at::TensorOptions().dtype(at::kByte));
    device_chunks_ = table.to(device_);
    // A copy that the host waits for, as of the table: a memset of this stream could come after an update on another.
    device_nonfinite_ = at::zeros({}, at::TensorOptions().dtype(at::kLong)).to(device_);
  }
}

void* Plan::current_stream() {
  const c10::impl::VirtualGuardImpl torch(device_.type());
  const c10::Stream stream = torch.getStream(device_);
  // The memory may be freed while another stream than its own still reads it: the allocator then waits for that one.
  if (std::find(streams_.begin(), streams_.end(), stream) == streams_.end()) {
    const auto record = [&](const at::Tensor& tensor) {
      torch.recordDataPtrOnStream(tensor.storage().data_ptr(), stream);
    };
    record(device_chunks_);
    record(device_nonfinite_);
    for (const auto& [shadows, live, copy, lows] : segments_) {
      record(live);
      std::for_each(shadows.begin(), shadows.end(), record);
      std::for_each(lows.begin(), lows.end(), record);
    }
    streams_.push_back(stream);
  }
  return handle_of(stream);
}

void Plan::update(const std::vector<double>& weights, bool skip_nonfinite, const std::optional<at::Tensor>& skip,
                  const std::optional<at::Tensor>& device_weights) {
  if (weights.size() != static_cast<size_t>(shadows_) && !segments_.empty()) {
    throw std::invalid_argument("got " + std::to_string(weights.size()) + " weights for " + std::to_string(shadows_) +
                                " shadows");
  }
  UpdateArgs args{};
  args.skip_nonfinite = skip_nonfinite;
  args.skip = static_cast<const float*>(scalars(skip, at::kFloat, 1, device_, "skip"));
  const auto* device =
      static_cast<const double*>(scalars(device_weights, at::kDouble, weights.size(), device_, "weights"));
  if (device_.is_cpu() && args.skip != nullptr && *args.skip != 0.0f) return;
  const c10::DeviceGuard on_device(device_);
  for (c10::VariableVersion& version : view_versions_) version.bump();
  for (int first = 0; first < shadows_; first += kMaxShadows) {
    args.shadows = std::min(kMaxShadows, shadows_ - first);
    args.count_live = first == 0;
    std::copy_n(weights.begin() + first, args.shadows, args.weights);
    if (device_.is_cpu()) {
      if (device != nullptr) std::copy_n(device + first, args.shadows, args.weights);
      nonfinite_on_cpu_ += cpu_table->update(*on_cpu_, first, args, at::get_num_threads(), isa_);
      continue;
    }
    args.device_weights = device == nullptr ? nullptr : device + first;
    const Chunk* chunks = static_cast<const Chunk*>(device_chunks_.const_data_ptr()) + first * chunk_count_;
    auto* nonfinite = static_cast<unsigned long long*>(device_nonfinite_.mutable_data_ptr());
    check(gpu_kernels().update(chunks, chunk_count_, args, nonfinite, device_.index(), current_stream()), "update");
  }
}

void Plan::exchange(int which) {
  if (segments_.empty()) return;
  if (which < 0 || which >= shadows_) throw std::invalid_argument("no such shadow");
  if (!same_dtypes_) throw std::invalid_argument("contents of different dtypes cannot be exchanged exactly");
  if (device_.is_cpu()) return cpu_table->exchange(*on_cpu_, which, at::get_num_threads());
  const c10::DeviceGuard on_device(device_);
  const Chunk* chunks = static_cast<const Chunk*>(device_chunks_.const_data_ptr()) + which * chunk_count_;
  check(gpu_kernels().exchange(chunks, chunk_count_, device_.index(), current_stream()), "exchange");
}

int64_t Plan::nonfinite_count() const {
  return device_.is_cpu() ? nonfinite_on_cpu_ : device_nonfinite_.item<int64_t>();
}

void advance_clock(const at::Tensor& table, int64_t update_every, const std::optional<at::Tensor>& found_inf,
                   const at::Tensor& step, const at::Tensor& num_updates, const at::Tensor& weights,
                   const at::Tensor& skip) {
  const at::Device device = table.device();
  const auto data = [&](const at::Tensor& tensor, at::ScalarType type, int64_t count, const char* name) {
    return const_cast<void*>(scalars(tensor, type, count, device, name));
  };
  if (device.type() != gpu_type() || table.dim() != 2 || table.size(0) < 1 || update_every < 1) {
    throw std::invalid_argument("the clock needs a table [rows, shadows] on a CUDA device and update_every >= 1");
  }
  ClockArgs args{};
  args.rows = table.size(0);
  args.shadows = static_cast<int>(table.size(1));
  args.update_every = update_every;
  args.table = static_cast<const double*>(data(table, at::kDouble, table.numel(), "table"));
  args.found_inf = static_cast<const float*>(scalars(found_inf, at::kFloat, 1, device, "found_inf"));
  args.step = static_cast<int64_t*>(data(step, at::kLong, 1, "step"));
  args.num_updates = static_cast<int64_t*>(data(num_updates, at::kLong, 1, "num_updates"));
  args.weights = static_cast<double*>(data(weights, at::kDouble, args.shadows, "weights"));
  args.skip = static_cast<float*>(data(skip, at::kFloat, 1, "skip"));
  const c10::DeviceGuard on_device(device);
  const c10::Stream stream = c10::impl::VirtualGuardImpl(device.type()).getStream(device);
  check(gpu_kernels().clock(args, device.index(), handle_of(stream)), "advance_clock");
}

}  // namespace fastema
