// One block a chunk: find my chunk -> scalar head up to 16-byte alignment -> full vectors -> scalar tail.
//
// The table holds every dtype mix, so one launch does them all; a block's kind is uniform, so the switch costs one
// branch. Vectors are 16 bytes of the narrower operand, several of them in flight before the first is used.
#include <cuda_runtime.h>

#include "cuda_kernels.h"
#include "ema_math.h"

#ifndef FASTEMA_LAUNCH  // the tests run this source on the host with a launch of their own
#define FASTEMA_LAUNCH(kernel, blocks, threads, stream, ...) kernel<<<blocks, threads, 0, stream>>>(__VA_ARGS__)
#endif

namespace fastema {
namespace {

constexpr int kThreads = 256;
// 3 x 256 threads with 128 bytes in flight each are 96 KiB a multiprocessor, three times what hides the latency of an
// H100's memory; it leaves 80 registers a thread, so that no dtype pair spills.
constexpr int kResidentBlocksPerMultiprocessor = 3;

// kCount elements that are moved as a whole: 16-byte accesses where the pointer allows them.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Pack {
  T values[kCount];
};

template <class T>
__device__ uint32_t elements_to_alignment(const T* pointer) {
  const uint32_t bytes = (16u - static_cast<uint32_t>(reinterpret_cast<uintptr_t>(pointer) & 15u)) & 15u;
  return bytes / static_cast<uint32_t>(sizeof(T));
}

template <class T>
__device__ bool is_aligned(const T* pointer) {
  return (reinterpret_cast<uintptr_t>(pointer) & 15u) == 0;
}

// What a block does to an element, one of three rules. `shadow(k)` comes before the elements of shadow k.
template <bool kGuard, class Shadow, class Live>
struct Average {
  const UpdateArgs& args;
  Weight<Opmath<Shadow>> weight{0.0};
  unsigned int kept = 0;
  bool counts = false;

  __device__ explicit Average(const UpdateArgs& update_args) : args(update_args) {}
  __device__ void shadow(int k) {
    weight = Weight<Opmath<Shadow>>(args.device_weights != nullptr ? args.device_weights[k] : args.weights[k]);
    counts = k == 0 && args.count_kept;  // an element is counted once for all shadows
  }
  __device__ Shadow operator()(Shadow shadow, Live live) {
    const Shadow result = averaged_element(shadow, live, weight);
    if constexpr (kGuard) {
      const bool keep = is_kept<Shadow>(live);
      kept += keep && counts;
      return keep ? shadow : result;
    }
    return result;
  }
};

template <class Shadow, class Live>
struct Convert {
  __device__ void shadow(int) {}
  __device__ Shadow operator()(Shadow, Live live) { return converted_element<Shadow>(live); }
};

struct CopyBytes {
  __device__ void shadow(int) {}
  __device__ uint8_t operator()(uint8_t, uint8_t live) { return live; }
};

template <int kCount, bool kLiveAligned, class Live>
__device__ Pack<Live, kCount> load_live(const Live* live) {
  if constexpr (kLiveAligned) {
    return *reinterpret_cast<const Pack<Live, kCount>*>(live);
  } else {
    Pack<Live, kCount> pack;
#pragma unroll
    for (int i = 0; i < kCount; ++i) pack.values[i] = live[i];
    return pack;
  }
}

// The shadows of one chunk: their chunks lie `count` apart in the table.
template <class Shadow>
struct ShadowPointers {
  const Chunk* chunk;
  int64_t count;
  uint32_t offset;  // elements

  __device__ Shadow* operator[](int k) const { return static_cast<Shadow*>(chunk[k * count].shadow) + offset; }
};

// kInFlight packs of kCount elements per thread, kThreads packs apart: live is read once for all shadows.
template <int kCount, int kInFlight, bool kLiveAligned, class Shadow, class Live, class Rule>
__device__ __forceinline__ void run_packs(ShadowPointers<Shadow> shadows, int first, int last, const Live* live,
                                          uint32_t index, Rule& rule) {
  using ShadowPack = Pack<Shadow, kCount>;
  Pack<Live, kCount> lives[kInFlight];
#pragma unroll
  for (int n = 0; n < kInFlight; ++n) {
    lives[n] = load_live<kCount, kLiveAligned>(live + static_cast<int64_t>(index + n * kThreads) * kCount);
  }
#pragma unroll 1
  for (int k = first; k < last; ++k) {
    rule.shadow(k);
    ShadowPack* packs = reinterpret_cast<ShadowPack*>(shadows[k]) + index;
    ShadowPack values[kInFlight];
#pragma unroll
    for (int n = 0; n < kInFlight; ++n) values[n] = packs[n * kThreads];
#pragma unroll
    for (int n = 0; n < kInFlight; ++n) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[n].values[i] = rule(values[n].values[i], lives[n].values[i]);
      packs[n * kThreads] = values[n];
    }
  }
}

// The aligned body: `vectors` packs of kCount elements.
template <int kCount, int kInFlight, bool kLiveAligned, class Shadow, class Live, class Rule>
__device__ __forceinline__ void run_vectors(ShadowPointers<Shadow> shadows, int first, int last, const Live* live,
                                            uint32_t vectors, Rule& rule) {
  uint32_t index = threadIdx.x;
  for (; index + (kInFlight - 1) * kThreads < vectors; index += kInFlight * kThreads) {
    run_packs<kCount, kInFlight, kLiveAligned>(shadows, first, last, live, index, rule);
  }
  for (; index < vectors; index += kThreads) {
    run_packs<kCount, 1, kLiveAligned>(shadows, first, last, live, index, rule);
  }
}

template <class Shadow, class Live, class Rule>
__device__ __forceinline__ void run_elements(ShadowPointers<Shadow> shadows, int first, int last, const Live* live,
                                             uint32_t begin, uint32_t end, Rule& rule) {
  for (uint32_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const Live live_value = live[i];
    for (int k = first; k < last; ++k) {
      rule.shadow(k);
      Shadow* shadow = shadows[k];
      shadow[i] = rule(shadow[i], live_value);
    }
  }
}

// Shadows first .. last - 1 of one chunk, all of the same alignment.
template <class Shadow, class Live, class Rule>
__device__ __forceinline__ void run_shadows(const Chunk* chunk, int64_t count, int first, int last, Rule& rule) {
  constexpr int kNarrow = sizeof(Shadow) < sizeof(Live) ? sizeof(Shadow) : sizeof(Live);
  constexpr int kWide = sizeof(Shadow) < sizeof(Live) ? sizeof(Live) : sizeof(Shadow);
  // A pack is 16 bytes of the narrower operand and at most 32 of the wider. 16 elements are in flight a thread (4 of
  // doubles): the most that 80 registers hold without spilling, with the guard, on every architecture compiled for.
  constexpr int kCount = 16 / kNarrow < 32 / kWide ? 16 / kNarrow : 32 / kWide;
  constexpr int kInFlight = (kWide == 8 ? 4 : 16) / kCount;
  const uint32_t elements = chunk->count;
  const Live* live = static_cast<const Live*>(chunk->live);
  const ShadowPointers<Shadow> shadows{chunk, count, 0};

  const uint32_t to_alignment = elements_to_alignment(shadows[first]);
  const uint32_t head = to_alignment < elements ? to_alignment : elements;
  const uint32_t vectors = (elements - head) / kCount;
  const ShadowPointers<Shadow> body{chunk, count, head};

  run_elements(shadows, first, last, live, 0, head, rule);
  if (is_aligned(live + head)) {
    run_vectors<kCount, kInFlight, true>(body, first, last, live + head, vectors, rule);
  } else {  // this chunk's own misfortune: its shadow still moves in vectors
    run_vectors<kCount, 1, false>(body, first, last, live + head, vectors, rule);
  }
  run_elements(shadows, first, last, live, head + vectors * kCount, elements, rule);
}

template <class Shadow, class Live, class Rule>
__device__ __forceinline__ void run_chunk(const Chunk* chunk, int64_t count, int shadows, Rule& rule) {
  bool alike = true;
  for (int k = 1; k < shadows; ++k) {
    const auto difference =
        reinterpret_cast<uintptr_t>(chunk[k * count].shadow) ^ reinterpret_cast<uintptr_t>(chunk->shadow);
    alike = alike && (difference & 15u) == 0;
  }
  const int together = alike ? shadows : 1;
  for (int first = 0; first < shadows; first += together) {
    run_shadows<Shadow, Live>(chunk, count, first, first + together, rule);
  }
}

template <bool kGuard, class Shadow, class Live>
__device__ __forceinline__ void run_rule(const Chunk* chunk, int64_t count, const UpdateArgs& args,
                                         unsigned long long* kept) {
  if (chunk->kind >= kConvert) {
    Convert<Shadow, Live> convert;
    run_chunk<Shadow, Live>(chunk, count, args.shadows, convert);
    return;
  }
  Average<kGuard, Shadow, Live> average(args);
  run_chunk<Shadow, Live>(chunk, count, args.shadows, average);
  if constexpr (kGuard) {
    if (average.kept != 0) atomicAdd(kept, static_cast<unsigned long long>(average.kept));  // rare by nature
  }
}

template <bool kGuard, class Shadow>
__device__ __forceinline__ void run_shadow(const Chunk* chunk, int64_t count, const UpdateArgs& args,
                                           unsigned long long* kept) {
  switch (static_cast<Dtype>(chunk->kind % 4)) {
    case Dtype::kFloat32:
      return run_rule<kGuard, Shadow, float>(chunk, count, args, kept);
    case Dtype::kFloat64:
      return run_rule<kGuard, Shadow, double>(chunk, count, args, kept);
    case Dtype::kBFloat16:
      return run_rule<kGuard, Shadow, BFloat16>(chunk, count, args, kept);
    default:
      return run_rule<kGuard, Shadow, Float16>(chunk, count, args, kept);
  }
}

template <bool kGuard>
__global__ void __launch_bounds__(kThreads, kResidentBlocksPerMultiprocessor)
    update_kernel(const Chunk* chunks, int64_t count, const __grid_constant__ UpdateArgs args,
                  unsigned long long* kept) {
  if (args.skip != nullptr && *args.skip != 0.0f) return;
  const Chunk* chunk = chunks + blockIdx.x;
  if (chunk->kind == kCopyBytes) {
    CopyBytes copy;
    return run_chunk<uint8_t, uint8_t>(chunk, count, args.shadows, copy);
  }
  switch (static_cast<Dtype>(chunk->kind % 16 / 4)) {
    case Dtype::kFloat32:
      return run_shadow<kGuard, float>(chunk, count, args, kept);
    case Dtype::kFloat64:
      return run_shadow<kGuard, double>(chunk, count, args, kept);
    case Dtype::kBFloat16:
      return run_shadow<kGuard, BFloat16>(chunk, count, args, kept);
    default:
      return run_shadow<kGuard, Float16>(chunk, count, args, kept);
  }
}

__global__ void __launch_bounds__(kThreads, kResidentBlocksPerMultiprocessor) exchange_kernel(const Chunk* chunks) {
  using Vector = Pack<uint32_t, 4>;
  const Chunk chunk = chunks[blockIdx.x];
  uint8_t* shadow = static_cast<uint8_t*>(chunk.shadow);
  uint8_t* live = static_cast<uint8_t*>(const_cast<void*>(chunk.live));
  const uint32_t bytes = chunk.count * chunk.shadow_element_bytes;
  const uint32_t to_alignment = elements_to_alignment(shadow);
  const uint32_t head = to_alignment < bytes ? to_alignment : bytes;
  const uint32_t vectors = is_aligned(live + head) ? (bytes - head) / 16 : 0;
  const uint32_t tail = head + vectors * 16;
  const auto swap_byte = [&](uint32_t i) {
    const uint8_t byte = shadow[i];
    shadow[i] = live[i];
    live[i] = byte;
  };
  for (uint32_t i = threadIdx.x; i < head; i += kThreads) swap_byte(i);
  Vector* shadow_vectors = reinterpret_cast<Vector*>(shadow + head);
  Vector* live_vectors = reinterpret_cast<Vector*>(live + head);
#pragma unroll 4
  for (uint32_t i = threadIdx.x; i < vectors; i += kThreads) {
    const Vector vector = shadow_vectors[i];
    shadow_vectors[i] = live_vectors[i];
    live_vectors[i] = vector;
  }
  for (uint32_t i = tail + threadIdx.x; i < bytes; i += kThreads) swap_byte(i);
}

CudaError message(cudaError_t status) { return status == cudaSuccess ? nullptr : cudaGetErrorString(status); }

// The caller has made `device` current in torch's copy of the CUDA runtime. This one is linked statically and follows
// since CUDA 12; before, it is told.
cudaError_t follow_torch_to(int device) {
  int current = -1;
  const cudaError_t status = cudaGetDevice(&current);
  return status == cudaSuccess && current != device ? cudaSetDevice(device) : status;
}

}  // namespace

CudaError resident_blocks(int device, int64_t& blocks) {
  int multiprocessors = 0;
  const cudaError_t status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  blocks = static_cast<int64_t>(multiprocessors) * kResidentBlocksPerMultiprocessor;
  return message(status);
}

CudaError launch_update(const Chunk* chunks, int64_t count, const UpdateArgs& args, unsigned long long* kept,
                        int device, void* stream) {
  if (count == 0) return nullptr;
  const cudaError_t status = follow_torch_to(device);
  if (status != cudaSuccess) return message(status);
  const auto kernel = args.guard ? update_kernel<true> : update_kernel<false>;
  FASTEMA_LAUNCH(kernel, static_cast<unsigned int>(count), kThreads, static_cast<cudaStream_t>(stream), chunks, count,
                 args, kept);
  return message(cudaGetLastError());
}

CudaError launch_exchange(const Chunk* chunks, int64_t count, int device, void* stream) {
  if (count == 0) return nullptr;
  const cudaError_t status = follow_torch_to(device);
  if (status != cudaSuccess) return message(status);
  FASTEMA_LAUNCH(exchange_kernel, static_cast<unsigned int>(count), kThreads, static_cast<cudaStream_t>(stream),
                 chunks);
  return message(cudaGetLastError());
}

CudaError probe(int device) {
  cudaError_t status = follow_torch_to(device);
  const void* kernels[] = {reinterpret_cast<const void*>(update_kernel<false>),
                           reinterpret_cast<const void*>(update_kernel<true>),
                           reinterpret_cast<const void*>(exchange_kernel)};
  for (const void* kernel : kernels) {
    cudaFuncAttributes attributes;
    if (status == cudaSuccess) status = cudaFuncGetAttributes(&attributes, kernel);
  }
  if (status != cudaSuccess) (void)cudaGetLastError();  // else the next launch reports it once more
  return message(status);
}

}  // namespace fastema
