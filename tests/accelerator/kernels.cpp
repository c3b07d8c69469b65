// csrc/cuda_kernels.cu on the streams of device.h: a launch is a task, whose blocks and threads are loops.
//
// The kernels get what a GPU would have: the addresses in their arguments and in the chunk table lead to the memory
// behind them when the task runs, not before.
#include <c10/core/impl/VirtualGuardImpl.h>

#include <atomic>
#include <vector>

#include "../../csrc/chunks.h"
#include "../../csrc/cuda_kernels.h"
#include "device.h"

namespace {

using fastema::Chunk;
using fastema::ClockArgs;
using fastema::UpdateArgs;

template <class Kernel, class... Args>
void run_blocks(Kernel kernel, unsigned int blocks, unsigned int threads, Args... args);

template <class T>
void lead_to_memory(T*& address) {
  address = hostgpu::memory(address);
}

std::vector<Chunk> rows_in_memory(const Chunk* table, int64_t count) {
  std::vector<Chunk> rows(hostgpu::memory(table), hostgpu::memory(table) + count);
  for (Chunk& row : rows) {
    lead_to_memory(row.shadow), lead_to_memory(row.shadow_low), lead_to_memory(row.live);
  }
  return rows;
}

// An update.
template <class Kernel>
void enqueue(Kernel kernel, unsigned int blocks, unsigned int threads, void* stream, const Chunk* chunks, int64_t count,
             UpdateArgs args, unsigned long long* nonfinite) {
  static_cast<hostgpu::Stream*>(stream)->run([=]() mutable {
    const std::vector<Chunk> rows = rows_in_memory(chunks, count * args.shadows);
    lead_to_memory(args.device_weights), lead_to_memory(args.skip);
    run_blocks(kernel, blocks, threads, rows.data(), count, args, hostgpu::memory(nonfinite));
  });
}

// An exchange.
template <class Kernel>
void enqueue(Kernel kernel, unsigned int blocks, unsigned int threads, void* stream, const Chunk* chunks) {
  static_cast<hostgpu::Stream*>(stream)->run([=] {
    const std::vector<Chunk> rows = rows_in_memory(chunks, blocks);
    run_blocks(kernel, blocks, threads, rows.data());
  });
}

// A step of the clock.
template <class Kernel>
void enqueue(Kernel kernel, unsigned int blocks, unsigned int threads, void* stream, ClockArgs args) {
  static_cast<hostgpu::Stream*>(stream)->run([=]() mutable {
    lead_to_memory(args.table), lead_to_memory(args.found_inf), lead_to_memory(args.step);
    lead_to_memory(args.num_updates), lead_to_memory(args.weights), lead_to_memory(args.skip);
    run_blocks(kernel, blocks, threads, args);
  });
}

std::atomic<int64_t> launches{0};

// What a launch finds wrong, for cudaGetLastError().
thread_local bool failed = false;

}  // namespace

#define FASTEMA_CURRENT_DEVICE() c10::impl::VirtualGuardImpl(c10::DeviceType::PrivateUse1).getDevice().index()
#define FASTEMA_LAUNCH(kernel, blocks, threads, stream, ...)                                                  \
  do {                                                                                                        \
    failed = static_cast<hostgpu::Stream*>(static_cast<void*>(stream))->device() != FASTEMA_CURRENT_DEVICE(); \
    if (!failed) ++launches, enqueue(kernel, blocks, threads, stream, __VA_ARGS__);                           \
  } while (false)
#define FASTEMA_LAUNCH_FAILED() std::exchange(failed, false)
#include "../../csrc/cuda_kernels.cu"

namespace {

template <class Kernel, class... Args>
void run_blocks(Kernel kernel, unsigned int blocks, unsigned int threads, Args... args) {
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) kernel(args...);
  }
}

}  // namespace

// For the tests: how many kernels were launched so far.
extern "C" int64_t fastema_launches() { return launches; }
