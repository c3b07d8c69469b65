// One block a chunk: find my chunk -> scalar head up to 16-byte alignment -> full vectors -> scalar tail.
//
// The table holds every dtype mix, so one launch does them all; a block's kind is uniform, so the switch costs one
// branch. Vectors are 16 bytes of the narrower operand, several of them in flight before the first is used.
#include <cuda_runtime.h>

#include "cuda_kernels.h"
#include "ema_math.h"

namespace fastema {
namespace {

constexpr int kThreads = 256;
constexpr int kResidentBlocksPerMultiprocessor = 4;  // 1,024 threads: the register budget is 64 a thread

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

// Elements of the shadow's dtype and of the live dtype, one rule: an average ...
template <bool kGuard, class Shadow, class Live>
struct Average {
  Weight<Opmath<Shadow>> weight;
  unsigned int kept = 0;

  __device__ explicit Average(double weight_of_live) : weight(weight_of_live) {}
  __device__ Shadow operator()(Shadow shadow, Live live) {
    const Shadow result = averaged_element(shadow, live, weight);
    if constexpr (kGuard) {
      const bool keep = is_kept<Shadow>(live);
      kept += keep;
      return keep ? shadow : result;
    }
    return result;
  }
};

// ... or a converting copy.
template <class Shadow, class Live>
struct Convert {
  __device__ Shadow operator()(Shadow, Live live) { return converted_element<Shadow>(live); }
};

// ... or a copy of bytes.
struct CopyBytes {
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

// The aligned body: `vectors` packs of kCount elements.
template <int kCount, int kInFlight, bool kLiveAligned, class Shadow, class Live, class Rule>
__device__ void run_vectors(Shadow* shadow, const Live* live, uint32_t vectors, Rule& rule) {
  using ShadowPack = Pack<Shadow, kCount>;
  using LivePack = Pack<Live, kCount>;
  ShadowPack* shadow_packs = reinterpret_cast<ShadowPack*>(shadow);
  const uint32_t full = vectors / (kThreads * kInFlight) * (kThreads * kInFlight);
  for (uint32_t first = threadIdx.x; first < full; first += kThreads * kInFlight) {
    ShadowPack shadows[kInFlight];
    LivePack lives[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      shadows[k] = shadow_packs[first + k * kThreads];
      lives[k] = load_live<kCount, kLiveAligned>(live + static_cast<int64_t>(first + k * kThreads) * kCount);
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) shadows[k].values[i] = rule(shadows[k].values[i], lives[k].values[i]);
      shadow_packs[first + k * kThreads] = shadows[k];
    }
  }
  for (uint32_t index = full + threadIdx.x; index < vectors; index += kThreads) {
    ShadowPack shadow_pack = shadow_packs[index];
    const LivePack live_pack = load_live<kCount, kLiveAligned>(live + static_cast<int64_t>(index) * kCount);
#pragma unroll
    for (int i = 0; i < kCount; ++i) shadow_pack.values[i] = rule(shadow_pack.values[i], live_pack.values[i]);
    shadow_packs[index] = shadow_pack;
  }
}

template <class Shadow, class Live, class Rule>
__device__ void run_chunk(const Chunk& chunk, Rule& rule) {
  constexpr int kNarrow = sizeof(Shadow) < sizeof(Live) ? sizeof(Shadow) : sizeof(Live);
  constexpr int kWide = sizeof(Shadow) < sizeof(Live) ? sizeof(Live) : sizeof(Shadow);
  // A pack is 16 bytes of the narrower operand and at most 32 of the wider. 16 elements are in flight a thread (4 of
  // doubles): the most that 64 registers hold without spilling, with the guard, on every architecture compiled for.
  constexpr int kCount = 16 / kNarrow < 32 / kWide ? 16 / kNarrow : 32 / kWide;
  constexpr int kInFlight = (kWide == 8 ? 4 : 16) / kCount;
  Shadow* shadow = static_cast<Shadow*>(chunk.shadow);
  const Live* live = static_cast<const Live*>(chunk.live);

  const uint32_t to_alignment = elements_to_alignment(shadow);
  const uint32_t head = to_alignment < chunk.count ? to_alignment : chunk.count;
  const uint32_t vectors = (chunk.count - head) / kCount;
  const uint32_t tail = head + vectors * kCount;

  for (uint32_t i = threadIdx.x; i < head; i += kThreads) shadow[i] = rule(shadow[i], live[i]);
  if (is_aligned(live + head)) {
    run_vectors<kCount, kInFlight, true>(shadow + head, live + head, vectors, rule);
  } else {  // this chunk's own misfortune: its shadow still moves in vectors
    run_vectors<kCount, 1, false>(shadow + head, live + head, vectors, rule);
  }
  for (uint32_t i = tail + threadIdx.x; i < chunk.count; i += kThreads) shadow[i] = rule(shadow[i], live[i]);
}

template <bool kGuard, class Shadow, class Live>
__device__ void run_rule(const Chunk& chunk, double weight, unsigned long long* kept) {
  if (chunk.kind >= kConvert) {
    Convert<Shadow, Live> convert;
    run_chunk<Shadow, Live>(chunk, convert);
    return;
  }
  Average<kGuard, Shadow, Live> average(weight);
  run_chunk<Shadow, Live>(chunk, average);
  if constexpr (kGuard) {
    if (average.kept != 0) atomicAdd(kept, static_cast<unsigned long long>(average.kept));  // rare by nature
  }
}

template <bool kGuard, class Shadow>
__device__ void run_shadow(const Chunk& chunk, double weight, unsigned long long* kept) {
  switch (static_cast<Dtype>(chunk.kind % 4)) {
    case Dtype::kFloat32:
      return run_rule<kGuard, Shadow, float>(chunk, weight, kept);
    case Dtype::kFloat64:
      return run_rule<kGuard, Shadow, double>(chunk, weight, kept);
    case Dtype::kBFloat16:
      return run_rule<kGuard, Shadow, BFloat16>(chunk, weight, kept);
    default:
      return run_rule<kGuard, Shadow, Float16>(chunk, weight, kept);
  }
}

template <bool kGuard>
__global__ void __launch_bounds__(kThreads, kResidentBlocksPerMultiprocessor)
    update_kernel(const Chunk* chunks, UpdateArgs args, unsigned long long* kept) {
  if (args.found_inf != nullptr && *args.found_inf != 0.0f) return;
  const Chunk chunk = chunks[blockIdx.x];
  if (chunk.kind == kCopyBytes) {
    CopyBytes copy;
    return run_chunk<uint8_t, uint8_t>(chunk, copy);
  }
  switch (static_cast<Dtype>(chunk.kind % 16 / 4)) {
    case Dtype::kFloat32:
      return run_shadow<kGuard, float>(chunk, args.weight, kept);
    case Dtype::kFloat64:
      return run_shadow<kGuard, double>(chunk, args.weight, kept);
    case Dtype::kBFloat16:
      return run_shadow<kGuard, BFloat16>(chunk, args.weight, kept);
    default:
      return run_shadow<kGuard, Float16>(chunk, args.weight, kept);
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

// Makes `device` current for the launch and puts the previous one back.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device) {
    status_ = cudaGetDevice(&previous_);
    if (status_ == cudaSuccess && previous_ != device) status_ = cudaSetDevice(device);
  }
  ~CurrentDevice() {
    if (previous_ >= 0) cudaSetDevice(previous_);
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;
  cudaError_t status() const { return status_; }

 private:
  int previous_ = -1;
  cudaError_t status_;
};

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
  const CurrentDevice current(device);
  if (current.status() != cudaSuccess) return message(current.status());
  const auto kernel = args.guard ? update_kernel<true> : update_kernel<false>;
  kernel<<<static_cast<unsigned int>(count), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(chunks, args, kept);
  return message(cudaGetLastError());
}

CudaError launch_exchange(const Chunk* chunks, int64_t count, int device, void* stream) {
  if (count == 0) return nullptr;
  const CurrentDevice current(device);
  if (current.status() != cudaSuccess) return message(current.status());
  exchange_kernel<<<static_cast<unsigned int>(count), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(chunks);
  return message(cudaGetLastError());
}

}  // namespace fastema
