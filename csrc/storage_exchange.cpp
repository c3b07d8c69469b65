#include "storage_exchange.h"

#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/StorageImpl.h>
#include <c10/util/intrusive_ptr.h>

#include <algorithm>
#include <stdexcept>
#include <string>

namespace fastema {
namespace {

constexpr size_t kAhead = 8;         // after a training step these objects are out of the cache: let the misses overlap
constexpr int64_t kBlock = 1 << 20;  // bytes that are held twice while contents change places

// Several operations of torch, but one call for Python: no signal comes in between.
void swap_contents(const at::Tensor& a, const at::Tensor& b, const at::Tensor& held) {
  for (int64_t begin = 0; begin < a.numel(); begin += kBlock) {
    const int64_t count = std::min(kBlock, a.numel() - begin);
    const at::Tensor block = held.narrow(0, 0, count), one = a.narrow(0, begin, count),
                     other = b.narrow(0, begin, count);
    block.copy_(one);
    one.copy_(other);
    other.copy_(block);
  }
}

// Memory with several owners. Not std::shared_ptr, which needs glibc 2.32.
struct SharedMemory : c10::intrusive_ptr_target {
  c10::DataPtr memory;
};

c10::DataPtr owner_of(c10::intrusive_ptr<SharedMemory> shared) {
  void* data = shared->memory.get();
  const c10::Device device = shared->memory.device();
  const auto release = [](void* owner) {
    c10::intrusive_ptr<SharedMemory>::reclaim(static_cast<SharedMemory*>(owner));
  };
  return {data, shared.release(), release, device};
}

}  // namespace

StorageExchange::StorageExchange(const std::vector<at::Tensor>& lives, const std::vector<at::Tensor>& others,
                                 const std::vector<at::Tensor>& managed,
                                 const std::vector<std::pair<at::Tensor, at::Tensor>>& parts)
    : parts_(parts) {
  if (lives.size() != others.size()) throw std::invalid_argument("lives and others must have equal lengths");
  for (const at::Tensor& tensor : lives) lives_.push_back(tensor.storage());
  for (const at::Tensor& tensor : others) others_.push_back(tensor.storage());
  for (const auto& [one, other] : parts_) {
    if (one.dim() != 1 || one.sizes() != other.sizes() || one.dtype() != other.dtype()) {
      throw std::invalid_argument("parts must be pairs of 1-D tensors of equal size and dtype");
    }
  }
  for (const at::Tensor& tensor : managed) {
    // Inference tensors carry no counter, and no graph refers to them.
    if (!tensor.is_inference()) counters_.push_back(tensor.unsafeGetTensorImpl()->version_counter());
  }
  versions_.resize(counters_.size());
  as_entered_.resize(2 * lives_.size());
}

void StorageExchange::check(const std::vector<bool>& staying) const {
  for (size_t i = 0; i < lives_.size(); ++i) {
    if (i + kAhead < lives_.size()) {
      __builtin_prefetch(lives_[i + kAhead].unsafeGetStorageImpl(), 1);
      __builtin_prefetch(others_[i + kAhead].unsafeGetStorageImpl(), 1);
    }
    const c10::Storage &live = lives_[i], &other = others_[i];
    if ((live.nbytes() != other.nbytes() || live.device() != other.device()) && !(i < staying.size() && staying[i])) {
      throw std::invalid_argument("storages of " + std::to_string(live.nbytes()) + " bytes on " + live.device().str() +
                                  " and " + std::to_string(other.nbytes()) + " bytes on " + other.device().str() +
                                  " cannot change places");
    }
  }
}

void StorageExchange::swap(const std::vector<bool>& staying) {
  std::vector<at::Tensor> held;
  for (const auto& part : parts_) {  // first: it may throw, out of memory
    held.push_back(at::empty({std::min(kBlock, part.first.numel())}, part.first.options()));
  }
  for (size_t i = 0; i < parts_.size(); ++i) swap_contents(parts_[i].first, parts_[i].second, held[i]);
  for (size_t i = 0; i < lives_.size(); ++i) {
    if (i + kAhead < lives_.size()) {
      __builtin_prefetch(lives_[i + kAhead].unsafeGetStorageImpl(), 1);
      __builtin_prefetch(others_[i + kAhead].unsafeGetStorageImpl(), 1);
    }
    if (i < staying.size() && staying[i]) continue;
    c10::StorageImpl* live = lives_[i].unsafeGetStorageImpl();
    c10::StorageImpl* other = others_[i].unsafeGetStorageImpl();
    c10::DataPtr pointer = live->set_data_ptr(c10::DataPtr());
    live->set_data_ptr_noswap(other->set_data_ptr(std::move(pointer)));
  }
}

void StorageExchange::enter(uint32_t version_step) {
  if (entered_) throw std::logic_error("the exchange is already entered");
  check({});
  for (size_t i = 0; i < lives_.size(); ++i) {
    // Writing access materialises copy-on-write storages; it may allocate, so it comes before the first swap.
    as_entered_[2 * i] = {others_[i].mutable_data(), others_[i].nbytes()};
    as_entered_[2 * i + 1] = {lives_[i].mutable_data(), lives_[i].nbytes()};
  }
  swap({});
  // First all are read: slices of one buffer share one counter.
  for (size_t i = 0; i < counters_.size(); ++i) versions_[i] = counters_[i].current_version();
  for (size_t i = 0; i < counters_.size(); ++i) {
    counters_[i].set_version(static_cast<int64_t>(versions_[i] + version_step));
  }
  entered_ = true;
}

bool StorageExchange::untouched() const {
  bool same = entered_;
  for (size_t i = 0; i < lives_.size(); ++i) {
    const Memory &live = as_entered_[2 * i], &other = as_entered_[2 * i + 1];
    same &= lives_[i].data() == live.data && lives_[i].nbytes() == live.bytes;
    same &= others_[i].data() == other.data && others_[i].nbytes() == other.bytes;
  }
  return same;
}

bool StorageExchange::leave_untouched() {
  if (!untouched()) return false;
  swap({});
  restore_versions();
  return true;
}

void StorageExchange::leave(const std::vector<size_t>& staying) {
  if (!entered_) throw std::logic_error("the exchange is not entered");
  std::vector<bool> stays(staying.empty() ? 0 : lives_.size());
  for (const size_t index : staying) stays.at(index) = true;
  check(stays);
  swap(stays);
  restore_versions();
}

void StorageExchange::restore_versions() {
  for (size_t i = 0; i < counters_.size(); ++i) counters_[i].set_version(versions_[i]);
  entered_ = false;
}

void make_second_owner(const at::Tensor& tensor, const at::Tensor& flat) {
  const c10::Storage& storage = tensor.storage();
  c10::StorageImpl* first = storage.unsafeGetStorageImpl();
  const int64_t count = static_cast<int64_t>(storage.nbytes());
  // Only such memory moves under share_memory_(); and what is pinned, mapped or on a device is known to its allocator
  // by the deleter that this would replace.
  const bool is_plain =
      storage.device().is_cpu() && first->data_ptr().get_deleter() == c10::GetCPUAllocator()->raw_deleter();
  if (!is_plain) {
    flat.set_(storage, 0, {count}, {1});
    return;
  }
  const auto shared = c10::make_intrusive<SharedMemory>();
  shared->memory = first->set_data_ptr(c10::DataPtr());
  first->set_data_ptr_noswap(owner_of(shared));
  const c10::Storage second(c10::Storage::use_byte_size_t(), storage.nbytes(), owner_of(shared), nullptr, false);
  flat.set_(second, 0, {count}, {1});
}

}  // namespace fastema
