#include "device.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <random>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

namespace hostgpu {
namespace {

using Clock = std::chrono::steady_clock;
constexpr size_t kPage = 4096, kAlignment = 64;
constexpr int64_t kStreams = 33;

size_t rounded_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

std::atomic<int> most_delay{0};
std::atomic<uint64_t> given{0};

std::mutex errors_mutex;
std::string first_error;

void note_error(const std::string& error) {
  const std::lock_guard lock(errors_mutex);
  if (first_error.empty()) first_error = error;
}

}  // namespace

class Moment {
 public:
  void reach() {
    const std::lock_guard lock(mutex_);
    reached_ = true;
    at_ = Clock::now();
    changed_.notify_all();
  }
  bool is_reached() {
    const std::lock_guard lock(mutex_);
    return reached_;
  }
  void synchronize() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return reached_; });
  }
  Clock::time_point at() {
    const std::lock_guard lock(mutex_);
    return at_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool reached_ = false;
  Clock::time_point at_;
};

bool is_reached(const Moment& moment) { return const_cast<Moment&>(moment).is_reached(); }
void synchronize(Moment& moment) { moment.synchronize(); }
double milliseconds(Moment& from, Moment& to) {
  return std::chrono::duration<double, std::milli>(to.at() - from.at()).count();
}

namespace {

template <class Word, class Step>
void each_word(size_t bytes, Step step) {
  for (size_t i = 0; i < bytes / sizeof(Word); ++i) step(i);
}

}  // namespace

void copy_bytes(void* to, const void* from, size_t bytes) {
  const bool is_aligned = (reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | bytes) % 8 == 0;
  if (is_aligned) {
    each_word<uint64_t>(bytes,
                        [&](size_t i) { static_cast<uint64_t*>(to)[i] = static_cast<const uint64_t*>(from)[i]; });
  } else {
    each_word<char>(bytes, [&](size_t i) { static_cast<char*>(to)[i] = static_cast<const char*>(from)[i]; });
  }
}

void fill_bytes(void* at, unsigned char value, size_t bytes) {
  each_word<unsigned char>(bytes, [&](size_t i) { static_cast<unsigned char*>(at)[i] = value; });
}

// ---- streams ----

namespace {

class Queue final : public Stream {
 public:
  Queue(int device, int64_t number) : device_(device), random_(static_cast<unsigned>(number * kDevices + device)) {
    std::thread([this] { work(); }).detach();
  }

  int device() const override { return device_; }

  void run(std::function<void()> task) override {
    const std::lock_guard lock(mutex_);
    tasks_.push_back(std::move(task));
    ++enqueued_, ++given;
    changed_.notify_all();
  }

  std::shared_ptr<Moment> moment() override {
    auto moment = std::make_shared<Moment>();
    run([moment] { moment->reach(); });
    return moment;
  }

  void wait(std::shared_ptr<Moment> moment) override {
    run([moment = std::move(moment)] { moment->synchronize(); });
  }

  bool is_idle() override {
    const std::lock_guard lock(mutex_);
    return done_ == enqueued_;
  }

  void synchronize() override {
    std::unique_lock lock(mutex_);
    const uint64_t goal = enqueued_;
    changed_.wait(lock, [&] { return done_ >= goal; });
  }

 private:
  void work() {
    while (true) {
      std::function<void()> task;
      {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [&] { return !tasks_.empty(); });
        task = std::move(tasks_.front());
        tasks_.pop_front();
      }
      if (const int delay = most_delay; delay > 0) {
        std::this_thread::sleep_for(std::chrono::microseconds(random_() % static_cast<unsigned>(delay)));
      }
      try {
        task();
      } catch (const std::exception& error) {
        note_error(std::string("a task on a stream failed: ") + error.what());
      }
      task = nullptr;  // what it holds is let go before it counts as done
      const std::lock_guard lock(mutex_);
      ++done_;
      changed_.notify_all();
    }
  }

  const int device_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> tasks_;
  uint64_t enqueued_ = 0, done_ = 0;
  std::minstd_rand random_;  // of the thread alone
};

// Never destroyed: the threads outlive main().
struct Streams {
  std::mutex mutex;
  std::map<std::pair<int, int64_t>, Queue*> made;
  int64_t next[kDevices] = {};
};
Streams& streams() {
  static auto* all = new Streams;
  return *all;
}

}  // namespace

Stream& stream(int device, int64_t number) {
  if (device < 0 || device >= kDevices || number < 0 || number >= kStreams) throw std::out_of_range("no such stream");
  Streams& all = streams();
  const std::lock_guard lock(all.mutex);
  Queue*& made = all.made[{device, number}];
  if (made == nullptr) made = new Queue(device, number);
  return *made;
}

int64_t new_stream_number(int device) {
  Streams& all = streams();
  const std::lock_guard lock(all.mutex);
  return 1 + all.next[device]++ % (kStreams - 1);
}

void synchronize_device(int device) {
  std::vector<Queue*> found;
  {
    const std::lock_guard lock(streams().mutex);
    for (const auto& [place, queue] : streams().made) {
      if (place.first == device) found.push_back(queue);
    }
  }
  for (Queue* queue : found) queue->synchronize();
}

uint64_t tasks() { return given; }

void set_delay(int microseconds) { most_delay = microseconds; }

std::string take_error() {
  const std::lock_guard lock(errors_mutex);
  return std::exchange(first_error, {});
}

// ---- the allocator ----

namespace {

using Moments = std::vector<std::shared_ptr<Moment>>;

Moments moments_of(const std::set<Stream*>& streams) {
  Moments moments;
  for (Stream* stream : streams) moments.push_back(stream->moment());
  return moments;
}

bool all_reached(const Moments& moments) {
  return std::all_of(moments.begin(), moments.end(), [](const auto& moment) { return is_reached(*moment); });
}

struct Block {
  char* pages;    // address
  size_t extent;  // bytes, whole pages; the next page is a guard
  Stream* home;   // that it was allocated on
  size_t bytes = 0;
  std::set<Stream*> others{};  // that use it too
};

class Allocator {
 public:
  Allocator() {
    // The second half is opened block by block; the guard pages and the first half never are.
    void* range = mmap(nullptr, 2 * kOffset, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (range == MAP_FAILED) throw std::runtime_error("no address space for the device memory");
    range_ = static_cast<char*>(range);
    for (int device = 0; device < kDevices; ++device) top_[device] = range_ + device * kArena;
  }

  void* allocate(int device, Stream& home, size_t bytes) {
    const std::lock_guard lock(mutex_);
    take_back();
    ++allocations_;
    const size_t size = rounded_up(std::max<size_t>(bytes, 1), kAlignment), extent = rounded_up(size, kPage);
    std::vector<Block>& reusable = free_[{&home, extent}];
    Block block{nullptr, extent, &home};
    if (!reusable.empty()) {
      block = std::move(reusable.back());
      reusable.pop_back();
      home.run([at = memory(block.pages), extent] {
        if (std::any_of(at, at + extent, [](char byte) { return static_cast<unsigned char>(byte) != kPoison; })) {
          note_error("memory was written to after it was freed");
        }
      });
    } else {
      block.pages = top_[device];
      top_[device] += extent + kPage;
      if (top_[device] > range_ + (device + 1) * kArena) throw std::runtime_error("the device is out of memory");
      if (mprotect(memory(block.pages), extent, PROT_READ | PROT_WRITE) != 0) throw std::runtime_error("mprotect");
      poison(block);
    }
    block.bytes = bytes;
    in_use_ += extent;
    void* address = block.pages + extent - size;  // the last byte is beside the guard page
    blocks_.emplace(address, std::move(block));
    return address;
  }

  void free(void* address) {
    const std::lock_guard lock(mutex_);
    take_back();
    const auto found = blocks_.find(address);
    if (found == blocks_.end()) return note_error("memory was freed that is not allocated");
    Block block = std::move(found->second);
    blocks_.erase(found);
    in_use_ -= block.extent;
    Moments moments = moments_of(block.others);
    block.others.clear();
    if (moments.empty()) {
      give_back(std::move(block));
    } else {
      busy_.emplace_back(std::move(block), std::move(moments));
    }
  }

  void record(void* address, Stream& stream) {
    const std::lock_guard lock(mutex_);
    const auto found = blocks_.find(address);
    if (found == blocks_.end()) return note_error("record_stream() of memory that is not allocated");
    if (found->second.home != &stream) found->second.others.insert(&stream);
  }

  int device_of(const void* address) const {
    const char* at = static_cast<const char*>(address);
    return at >= range_ && at < range_ + kOffset ? static_cast<int>((at - range_) / kArena) : -1;
  }

  size_t allocations() {
    const std::lock_guard lock(mutex_);
    return allocations_;
  }
  size_t in_use() {
    const std::lock_guard lock(mutex_);
    return in_use_;
  }

 private:
  void poison(const Block& block) {
    block.home->run([at = memory(block.pages), extent = block.extent] { fill_bytes(at, kPoison, extent); });
  }
  void give_back(Block block) {
    poison(block);
    const std::pair<Stream*, size_t> key{block.home, block.extent};
    free_[key].push_back(std::move(block));
  }
  // No stream is made to wait for another one here: that would hide a wait that the program lacks.
  void take_back() {
    for (size_t i = 0; i < busy_.size();) {
      if (all_reached(busy_[i].second)) {
        give_back(std::move(busy_[i].first));
        busy_.erase(busy_.begin() + static_cast<ptrdiff_t>(i));
      } else {
        ++i;
      }
    }
  }

  std::mutex mutex_;
  char* range_;
  char* top_[kDevices];
  std::map<void*, Block> blocks_;
  std::map<std::pair<Stream*, size_t>, std::vector<Block>> free_;
  std::vector<std::pair<Block, Moments>> busy_;  // freed, and still used by other streams
  size_t allocations_ = 0, in_use_ = 0;
};

Allocator& allocator() {
  static auto* one = new Allocator;
  return *one;
}

class PinnedAllocator {
 public:
  void* allocate(size_t bytes) {
    const std::lock_guard lock(mutex_);
    take_back();
    void* address = std::aligned_alloc(kAlignment, rounded_up(std::max<size_t>(bytes, 1), kAlignment));
    if (address == nullptr) throw std::bad_alloc();
    std::memset(address, kPoison, bytes);
    blocks_[static_cast<char*>(address)].bytes = bytes;
    return address;
  }

  void free(void* address) {
    const std::lock_guard lock(mutex_);
    const auto found = blocks_.find(static_cast<char*>(address));
    if (found == blocks_.end()) return note_error("pinned memory was freed that is not allocated");
    busy_.push_back({found->first, found->second.bytes, moments_of(found->second.users)});
    blocks_.erase(found);
    take_back();
  }

  bool has(const void* address) {
    const std::lock_guard lock(mutex_);
    return find(address) != blocks_.end();
  }

  void record(const void* address, Stream& stream) {
    const std::lock_guard lock(mutex_);
    const auto found = find(address);
    if (found != blocks_.end()) found->second.users.insert(&stream);
  }

 private:
  struct Pinned {
    size_t bytes = 0;
    std::set<Stream*> users{};
  };
  struct Busy {
    char* address;
    size_t bytes;
    Moments moments;
  };

  std::map<char*, Pinned>::iterator find(const void* address) {
    auto found = blocks_.upper_bound(static_cast<char*>(const_cast<void*>(address)));
    if (found == blocks_.begin()) return blocks_.end();
    --found;
    return address < found->first + std::max<size_t>(found->second.bytes, 1) ? found : blocks_.end();
  }
  void take_back() {
    for (size_t i = 0; i < busy_.size();) {
      if (all_reached(busy_[i].moments)) {
        std::memset(busy_[i].address, kPoison, busy_[i].bytes);
        std::free(busy_[i].address);
        busy_.erase(busy_.begin() + static_cast<ptrdiff_t>(i));
      } else {
        ++i;
      }
    }
  }

  std::mutex mutex_;
  std::map<char*, Pinned> blocks_;
  std::vector<Busy> busy_;
};

PinnedAllocator& pinned() {
  static auto* one = new PinnedAllocator;
  return *one;
}

}  // namespace

void* allocate(int device, Stream& stream, size_t bytes) { return allocator().allocate(device, stream, bytes); }
void free(void* address) { allocator().free(address); }
void record(void* address, Stream& stream) { allocator().record(address, stream); }
int device_of(const void* address) { return allocator().device_of(address); }
size_t allocations() { return allocator().allocations(); }
size_t bytes_in_use() { return allocator().in_use(); }

void* allocate_pinned(size_t bytes) { return pinned().allocate(bytes); }
void free_pinned(void* address) { pinned().free(address); }
bool is_pinned(const void* address) { return pinned().has(address); }
void record_pinned(const void* address, Stream& stream) { pinned().record(address, stream); }

}  // namespace hostgpu
