#include "storage_exchange.h"

#include <c10/core/StorageImpl.h>

#include <stdexcept>
#include <string>
#include <utility>

namespace fastema {
namespace {

constexpr size_t kAhead = 8;  // after a training step these objects are out of the cache: let the misses overlap

}  // namespace

StorageExchange::StorageExchange(const std::vector<at::Tensor>& lives, const std::vector<at::Tensor>& others,
                                 const std::vector<at::Tensor>& managed) {
  if (lives.size() != others.size()) throw std::invalid_argument("lives and others must have equal lengths");
  for (const at::Tensor& tensor : lives) lives_.push_back(tensor.storage());
  for (const at::Tensor& tensor : others) others_.push_back(tensor.storage());
  for (const at::Tensor& tensor : managed) {
    // Inference tensors carry no counter, and no graph refers to them.
    if (!tensor.is_inference()) counters_.push_back(tensor.unsafeGetTensorImpl()->version_counter());
  }
  versions_.resize(counters_.size());
}

void StorageExchange::swap() noexcept {
  for (size_t i = 0; i < lives_.size(); ++i) {
    if (i + kAhead < lives_.size()) {
      __builtin_prefetch(lives_[i + kAhead].unsafeGetStorageImpl(), 1);
      __builtin_prefetch(others_[i + kAhead].unsafeGetStorageImpl(), 1);
    }
    c10::StorageImpl* live = lives_[i].unsafeGetStorageImpl();
    c10::StorageImpl* other = others_[i].unsafeGetStorageImpl();
    c10::DataPtr pointer = live->set_data_ptr(c10::DataPtr());
    live->set_data_ptr_noswap(other->set_data_ptr(std::move(pointer)));
  }
}

void StorageExchange::enter(uint32_t version_step) {
  if (entered_) throw std::logic_error("the exchange is already entered");
  for (size_t i = 0; i < lives_.size(); ++i) {
    if (i + kAhead < lives_.size()) {
      __builtin_prefetch(lives_[i + kAhead].unsafeGetStorageImpl(), 1);
      __builtin_prefetch(others_[i + kAhead].unsafeGetStorageImpl(), 1);
    }
    const c10::Storage &live = lives_[i], &other = others_[i];
    if (live.nbytes() != other.nbytes() || live.device() != other.device()) {
      throw std::invalid_argument("storages of " + std::to_string(live.nbytes()) + " bytes on " + live.device().str() +
                                  " and " + std::to_string(other.nbytes()) + " bytes on " + other.device().str() +
                                  " cannot change places");
    }
  }
  // Writing access materialises copy-on-write storages; it may allocate, so it comes before the first swap.
  for (const c10::Storage& storage : lives_) storage.mutable_data();
  for (const c10::Storage& storage : others_) storage.mutable_data();
  swap();
  // First all are read: slices of one buffer share one counter.
  for (size_t i = 0; i < counters_.size(); ++i) versions_[i] = counters_[i].current_version();
  for (size_t i = 0; i < counters_.size(); ++i) {
    counters_[i].set_version(static_cast<int64_t>(versions_[i] + version_step));
  }
  entered_ = true;
}

void StorageExchange::leave() {
  if (!entered_) throw std::logic_error("the exchange is not entered");
  swap();
  for (size_t i = 0; i < counters_.size(); ++i) counters_[i].set_version(versions_[i]);
  entered_ = false;
}

}  // namespace fastema
