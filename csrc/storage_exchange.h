// Swaps the data pointers of storages: no byte moves, and every view and alias of them follows.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <utility>
#include <vector>

namespace fastema {

class StorageExchange {
 public:
  // The storages of lives[i] and others[i] change places. `managed`: the tensors whose version counters tell autograd.
  // `parts`: pairs of 1-D byte tensors whose contents change places instead.
  StorageExchange(const std::vector<at::Tensor>& lives, const std::vector<at::Tensor>& others,
                  const std::vector<at::Tensor>& managed, const std::vector<std::pair<at::Tensor, at::Tensor>>& parts);

  // Throws, with nothing changed, unless each pair has equal size and device. Swaps, and moves the version counters by
  // `version_step`, so that a backward through a graph recorded before raises.
  void enter(uint32_t version_step);
  // Whether every storage has the memory and the size that it had when enter() was done.
  bool untouched() const;
  // leave() in one pass, where that is so; false, with nothing done, where it is not.
  bool leave_untouched();
  // Swaps back and puts the version counters back, so that such a backward works again. `staying`: pairs (by index)
  // that do not change back. Throws, with nothing changed, where sizes or devices of any other pair differ now.
  void leave(const std::vector<size_t>& staying);
  bool entered() const { return entered_; }

 private:
  void check(const std::vector<bool>& staying) const;
  void swap(const std::vector<bool>& staying);
  void restore_versions();

  struct Memory {
    const void* data;
    size_t bytes;
  };

  std::vector<c10::Storage> lives_, others_;
  std::vector<Memory> as_entered_;  // of every live and every other one, in turn
  std::vector<std::pair<at::Tensor, at::Tensor>> parts_;
  std::vector<c10::VariableVersion> counters_;
  std::vector<uint32_t> versions_;  // as they were on the way in
  bool entered_ = false;
};

// Makes `flat`, an empty tensor of bytes on the device of `tensor`, a second owner of the memory of `tensor`, all of
// it, 1-D. The memory is freed when both are gone, so that replacing the pointer of one (share_memory_(), resize_())
// frees nothing that a kernel works on. Where that memory is not plain memory of the host, both share one storage.
void make_second_owner(const at::Tensor& tensor, const at::Tensor& flat);

}  // namespace fastema
