// Swaps the data pointers of storages: no byte moves, and every view and alias of them follows.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace fastema {

class StorageExchange {
 public:
  // The storages of lives[i] and others[i] change places. `managed`: the tensors whose version counters tell autograd.
  StorageExchange(const std::vector<at::Tensor>& lives, const std::vector<at::Tensor>& others,
                  const std::vector<at::Tensor>& managed);

  // Throws, with nothing changed, unless each pair has equal size and device. Swaps, and moves the version counters by
  // `version_step`, so that a backward through a graph recorded before raises.
  void enter(uint32_t version_step);
  // Swaps back and puts the version counters back, so that such a backward works again.
  void leave();
  bool entered() const { return entered_; }

 private:
  void swap() noexcept;

  std::vector<c10::Storage> lives_, others_;
  std::vector<c10::VariableVersion> counters_;
  std::vector<uint32_t> versions_;  // as they were on the way in
  bool entered_ = false;
};

}  // namespace fastema
