// Two devices that are made up, for tests of host code: their streams are threads of this process, their memory is at
// addresses that nothing in this process can read. No torch.
//
// A tensor's address is in a range that is never mapped. The memory itself is `kOffset` bytes further, and only work on
// a stream goes there. So whatever the host does with a tensor's address faults, also while a stream is at work.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <set>
#include <string>

namespace hostgpu {

constexpr int kDevices = 2;
constexpr size_t kArena = size_t{1} << 30;     // bytes of one device
constexpr size_t kOffset = kDevices * kArena;  // from an address to its memory
constexpr unsigned char kPoison = 0x7b;        // what is freed is filled with: 1.3e36 as a float, no address as one

// Where a stream finds what a tensor's address stands for. An offset, no look-up: a host address leads nowhere.
template <class T>
T* memory(T* address) {
  return address == nullptr ? nullptr : reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(address) + kOffset);
}

// What memcpy and memset do, in loops of ours: ThreadSanitizer does not look into those that it was not compiled into.
void copy_bytes(void* to, const void* from, size_t bytes);
void fill_bytes(void* at, unsigned char value, size_t bytes);

// A moment in the work of a stream: reached when all that was enqueued before it is done.
class Moment;

class Stream {
 public:
  virtual ~Stream() = default;
  virtual int device() const = 0;
  // Enqueues: `task` runs in the stream's thread, after all that was enqueued before.
  virtual void run(std::function<void()> task) = 0;
  virtual std::shared_ptr<Moment> moment() = 0;
  // Lets what is enqueued from now on wait for a moment of another stream.
  virtual void wait(std::shared_ptr<Moment> moment) = 0;
  virtual bool is_idle() = 0;
  virtual void synchronize() = 0;
};

bool is_reached(const Moment& moment);
void synchronize(Moment& moment);
double milliseconds(Moment& from, Moment& to);  // both reached

// Stream 0 is the default one of its device; the others are made at the first use of their number.
Stream& stream(int device, int64_t number);
int64_t new_stream_number(int device);  // 32 of them, then they come again, as torch has it on CUDA
void synchronize_device(int device);

// How many tasks all streams have been given.
uint64_t tasks();

// Every task starts up to so many microseconds late, at random.
void set_delay(int microseconds);

// What the device found out: an exception in a task, a write to memory after it was freed. Empty: nothing. Told once.
std::string take_error();

// ---- the allocator: what is freed is reused at once on the stream that it was allocated on ----

void* allocate(int device, Stream& stream, size_t bytes);
void free(void* address);
// Lets the memory be reused only after what `stream` has been given when the memory is freed.
void record(void* address, Stream& stream);
int device_of(const void* address);  // -1: none
size_t allocations();                // so far
size_t bytes_in_use();

// ---- pinned memory of the host ----

void* allocate_pinned(size_t bytes);
void free_pinned(void* address);
bool is_pinned(const void* address);
void record_pinned(const void* address, Stream& stream);

}  // namespace hostgpu
