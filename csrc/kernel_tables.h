// How the extension, which is compiled for one torch and one Python, finds the kernels, which are compiled once for
// all: tables of functions in libraries of their own. The extension knows CpuChunks by its address alone.
#pragma once

#include <cstdint>

#include "cpu_kernels.h"
#include "cuda_kernels.h"

#if defined(_WIN32)
#define FASTEMA_EXPORT extern "C" __declspec(dllexport)
#else
#define FASTEMA_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace fastema {

struct CpuKernels {
  const char* version;                                                       // of fastema
  CpuChunks* (*make_chunks)(const Chunk* list, int64_t count, int shadows);  // copies the list
  void (*free_chunks)(CpuChunks* work);
  int64_t (*update)(const CpuChunks& work, int first, const UpdateArgs& args, int threads, Isa isa);
  void (*exchange)(const CpuChunks& work, int shadow, int threads);
  Isa (*best_isa)();
  const char* (*isa_name)(Isa isa);
  void (*use_parallel_for)(ParallelFor* parallel_for);
};

struct GpuKernels {
  int32_t device_type;  // a c10::DeviceType
  CudaError (*resident_blocks)(int device, int64_t& blocks);
  CudaError (*update)(const Chunk* chunks, int64_t count, const UpdateArgs& args, unsigned long long* nonfinite,
                      int device, void* stream);
  CudaError (*exchange)(const Chunk* chunks, int64_t count, int device, void* stream);
  CudaError (*clock)(const ClockArgs& args, int device, void* stream);
  CudaError (*probe)(int device);
};

}  // namespace fastema
