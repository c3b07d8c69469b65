// The torch side of an update: holds the tensors, builds and checks the chunk list, dispatches by device.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "kernel_tables.h"

namespace fastema {

// The Segment of fastema/backends/contract.py: [K] shadows, the live tensor, whether it is copied rather than averaged,
// and [K] low planes, or none. All are 1-D, contiguous, of equal length and on one device; the shadows have one dtype.
// A low plane is int16, of a float32 average of which the shadow is the high plane, bfloat16 as the live tensor.
using TensorSegment = std::tuple<std::vector<at::Tensor>, at::Tensor, bool, std::vector<at::Tensor>>;

// The kernels that plans built from now on run; `gpu`: null where there are none. `current_stream`: torch's
// aoti_torch_get_current_cuda_stream, which only torch 2.10 needs, where a stream does not tell its handle.
using CurrentStream = int32_t(int32_t device, void** handle);
void use_kernels(const CpuKernels* cpu, const GpuKernels* gpu, CurrentStream* current_stream);
const CpuKernels& cpu_kernels();
// Whether there are kernels for a GPU, and for which kind of device they are.
bool has_gpu_kernels();
at::DeviceType gpu_type();

class Plan {
 public:
  // `views`: the shadow tensors that users see, whose version counters an update bumps. Throws (std::invalid_argument)
  // before anything is allocated.
  Plan(std::vector<TensorSegment> segments, const std::vector<at::Tensor>& views);

  // shadow <- shadow + weight * (live - shadow), or a copy, for every segment, in one parallel region or one launch
  // (of up to kMaxShadows shadows).
  //   weights         [K], 1 - decay each
  //   skip_nonfinite  an element whose live value is NaN or infinite keeps its shadow, one whose shadow is takes the
  //                   live value, and both are counted
  //   skip            float32 scalar on the plan's device, or none: not zero when the update runs: nothing happens
  //   device_weights  float64 [K] on the plan's device, or none: read instead of `weights` when the update runs
  void update(const std::vector<double>& weights, bool skip_nonfinite, const std::optional<at::Tensor>& skip,
              const std::optional<at::Tensor>& device_weights);

  // Swaps the contents of live and of one shadow; throws where their dtypes differ.
  void exchange(int which);

  // How many live elements were not finite so far, each counted once for all shadows. On a GPU this synchronises.
  int64_t nonfinite_count() const;

  int64_t chunk_count() const { return chunk_count_; }
  void set_isa(Isa isa) { isa_ = isa; }  // for tests: at most what the machine has

 private:
  void* current_stream();

  std::vector<TensorSegment> segments_;  // held, so that the pointers in the chunks stay valid
  int shadows_ = 0;                      // K; 0 where there are no segments, whatever K is
  std::vector<c10::VariableVersion> view_versions_;
  at::Device device_ = at::kCPU;
  bool same_dtypes_ = true;
  Isa isa_;
  int64_t chunk_count_ = 0;                                  // of one shadow
  std::unique_ptr<CpuChunks, void (*)(CpuChunks*)> on_cpu_;  // CPU only
  int64_t nonfinite_on_cpu_ = 0;
  at::Tensor device_chunks_, device_nonfinite_;  // GPU only: bytes of the chunk table; int64 scalar
  std::vector<c10::Stream> streams_;             // GPU only: that use this memory; the allocator knows of them
};

// One optimizer step of fastema/core/counters.py in one launch: see ClockArgs in cuda_kernels.h. All
// tensors on one CUDA device.
void advance_clock(const at::Tensor& table, int64_t update_every, const std::optional<at::Tensor>& found_inf,
                   const at::Tensor& step, const at::Tensor& num_updates, const at::Tensor& weights,
                   const at::Tensor& skip);

// Why they cannot run on CUDA device `index`, or none.
std::optional<std::string> probe_cuda(int index);

}  // namespace fastema
