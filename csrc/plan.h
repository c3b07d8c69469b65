// The torch side of an update: holds the tensors, builds and checks the chunk list, dispatches by device.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "chunks.h"
#include "cpu_kernels.h"

namespace fastema {

class Plan {
 public:
  // One segment per index i: shadows[i] and lives[i] are 1-D, contiguous, of equal length and on one device.
  // copies[i]: copied rather than averaged. `views`: the shadow tensors that users see, whose version counters an
  // update bumps. Throws (std::invalid_argument) before anything is allocated.
  Plan(std::vector<at::Tensor> shadows, std::vector<at::Tensor> lives, const std::vector<bool>& copies,
       const std::vector<at::Tensor>& views);

  // shadow <- shadow + weight * (live - shadow), or a copy, for every segment, in one parallel region or one launch.
  // found_inf: a float32 scalar on the plan's device; not zero: nothing happens.
  void update(double weight, bool guard, const std::optional<at::Tensor>& found_inf);

  // Swaps the contents of every shadow and live segment; throws where their dtypes differ.
  void exchange();

  // How many elements the guard has kept so far. On a GPU this synchronises.
  int64_t nonfinite_count() const;

  int64_t chunk_count() const { return static_cast<int64_t>(work_.chunks.size()); }
  void set_isa(Isa isa) { isa_ = isa; }  // for tests: at most what the machine has

 private:
  void* current_stream() const;

  std::vector<at::Tensor> shadows_, lives_;  // held, so that the pointers in the chunks stay valid
  at::Device device_ = at::kCPU;
  std::vector<c10::VariableVersion> view_versions_;
  bool same_dtypes_ = true;
  Isa isa_;
  CpuChunks work_;
  int64_t kept_on_cpu_ = 0;
  at::Tensor device_chunks_, device_kept_;  // GPU only: bytes of the chunk table; int64 scalar
};

// Whether this build has the CUDA kernels.
bool has_cuda();

}  // namespace fastema
