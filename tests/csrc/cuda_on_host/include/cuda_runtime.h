// A stand-in for the CUDA runtime that runs kernels on the host: blocks and threads become loops. It fits kernels
// without shared memory and barriers, whose threads are independent, such as ours. No part of the library.
#pragma once

#include <cstdint>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct Index {
  unsigned int x;
};
inline thread_local Index threadIdx{0}, blockIdx{0};  // streams may be threads

// A warp of one thread.
constexpr int warpSize = 1;
inline bool __any_sync(unsigned int, bool value) { return value; }
inline unsigned int __shfl_xor_sync(unsigned int, unsigned int value, int) { return value; }

inline void atomicAdd(unsigned long long* target, unsigned long long value) {
  __atomic_fetch_add(target, value, __ATOMIC_RELAXED);
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorUnknown = 999 };
constexpr int cudaDevAttrMultiProcessorCount = 16;
inline const char* cudaGetErrorString(cudaError_t) { return "error"; }

// tests/accelerator has devices and streams of its own, and defines these.
#ifndef FASTEMA_LAUNCH
#define FASTEMA_CURRENT_DEVICE() 0
#define FASTEMA_LAUNCH_FAILED() false
#define FASTEMA_LAUNCH(kernel, blocks, threads, stream, ...) \
  for (blockIdx.x = 0; blockIdx.x < (blocks); ++blockIdx.x)  \
    for (threadIdx.x = 0; threadIdx.x < (threads); ++threadIdx.x) kernel(__VA_ARGS__)
#endif

inline cudaError_t cudaGetDevice(int* device) { return *device = FASTEMA_CURRENT_DEVICE(), cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaErrorUnknown; }  // the caller has made it current
struct cudaFuncAttributes {};
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return FASTEMA_LAUNCH_FAILED() ? cudaErrorUnknown : cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) { return *value = 2, cudaSuccess; }
