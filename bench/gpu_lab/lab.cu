// The update kernel of -DSOURCE, and kernels built from its parts, each timed beside a copy of as many bytes.
//
// Built and run by `python -m bench.gpu_lab`. Arguments: SCALE [PART OF A CASE'S NAME]. Prints a line for each case and
// variant: name, variant, microseconds alone, of the copy, in a chain, of the copy. Ends with 1 if any value is wrong,
// with 2 if a call of CUDA fails.
#include SOURCE

#include <cuda_bf16.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

namespace lab {
using namespace fastema;

void must(cudaError_t status, int line) {
  if (status == cudaSuccess) return;
  std::printf("lab.cu:%d: %s\n", line, cudaGetErrorString(status));
  std::fflush(stdout);
  std::_Exit(2);
}
#define MUST(call) must((call), __LINE__)

constexpr int kGrid = 1056;
constexpr double kWeight = 0.1;
cudaStream_t stream;

// ---- a tensor's first values follow from its index, so that no second copy is needed to check what came of them ----

struct Array {
  void* at;
  int16_t* low;  // of two planes; else null
  bool half;     // bfloat16, or the high plane
  uint32_t seed;
};

__device__ float first_value(const Array& array, int64_t i) {
  uint64_t mixed = (static_cast<uint64_t>(i) * 2 + array.seed + 1) * 0x9E3779B97F4A7C15ull;
  mixed = (mixed ^ (mixed >> 29)) * 0xBF58476D1CE4E5B9ull;
  const float value = static_cast<float>(static_cast<int32_t>(mixed >> 32)) * 0x1p-31f;
  return array.half && array.low == nullptr ? __bfloat162float(__float2bfloat16_rn(value)) : value;
}

__device__ float value_at(const Array& array, int64_t i) {
  if (!array.half) return static_cast<const float*>(array.at)[i];
  const BFloat16 high = static_cast<const BFloat16*>(array.at)[i];
  return array.low != nullptr ? join_planes(high, array.low[i]) : widen(high);
}

__global__ void fill(Array array, int64_t count) {
  for (int64_t i = blockIdx.x * 256ll + threadIdx.x; i < count; i += gridDim.x * 256ll) {
    const float value = first_value(array, i);
    if (!array.half) {
      static_cast<float*>(array.at)[i] = value;
    } else if (array.low != nullptr) {
      static_cast<BFloat16*>(array.at)[i] = high_plane(value), array.low[i] = low_plane(value);
    } else {
      static_cast<__nv_bfloat16*>(array.at)[i] = __float2bfloat16_rn(value);
    }
  }
}

// Every element of every tensor after one update, bit for bit, and that the gaps between them are as they were.
// Conversions are CUDA's own here, not those under test.
__global__ void count_wrong(Array shadow, Array live, const int64_t* begins, const int64_t* sizes,
                            unsigned long long* wrong) {
  const int64_t begin = begins[blockIdx.x], end = begins[blockIdx.x + 1];
  for (int64_t i = begin + blockIdx.y * 256ll + threadIdx.x; i < end; i += gridDim.y * 256ll) {
    float wanted = first_value(shadow, i);
    if (i < begin + sizes[blockIdx.x]) {
      wanted = fmaf(static_cast<float>(kWeight), first_value(live, i) - wanted, wanted);
      if (shadow.half && shadow.low == nullptr) wanted = __bfloat162float(__float2bfloat16_rn(wanted));
    }
    if (float_bits(value_at(shadow, i)) != float_bits(wanted)) atomicAdd(wrong, 1ull);
  }
}

__global__ void sweep(const uint4* at, int64_t count, unsigned* sink) {  // reads: leaves nothing to be written back
  unsigned sum = 0;
  for (int64_t i = blockIdx.x * 256ll + threadIdx.x; i < count; i += gridDim.x * 256ll) sum ^= at[i].x;
  if (sum == 0x5eed5eed) *sink = sum;
}

// ---- variants that are kernels of their own: float32, guarded ----

// A grid as large as the chip. The row of the next chunk is loaded before the tiles of this one.
__global__ void __launch_bounds__(kThreads, kResidentBlocksPerMultiprocessor)
    persistent(const Chunk* chunks, int64_t count, const __grid_constant__ UpdateArgs args, unsigned long long* bad) {
  Chunk now = load_chunk(chunks + blockIdx.x);
  for (int64_t i = blockIdx.x; i < count; i += gridDim.x) {
    const Chunk next = load_chunk(chunks + (i + gridDim.x < count ? i + gridDim.x : i));
    average<true, float, float>(Rows{chunks + i, count, 1}, now, args, bad);
    now = next;
  }
}

// The copy engine brings tiles into shared memory, three ahead; one barrier a place.
constexpr int kTile = 4096, kPlaces = 3, kBulkBlocks = 2;
struct Place {
  float live[kTile], shadow[kTile];
};

__device__ uint32_t in_shared(const void* at) { return static_cast<uint32_t>(__cvta_generic_to_shared(at)); }

__device__ void bring(float* to, const float* from, uint32_t bytes, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(in_shared(to)),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(in_shared(barrier))
      : "memory");
}

__global__ void __launch_bounds__(kThreads, kBulkBlocks)
    bulk(float* shadow, const float* live, int64_t elements, double weight_of_live) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900  // before, there is no such engine
  extern __shared__ __align__(128) unsigned char memory[];
  Place* places = reinterpret_cast<Place*>(memory);
  __shared__ __align__(8) uint64_t barriers[kPlaces];
  const int64_t tiles = (elements + kTile - 1) / kTile;
  const auto bytes_of = [&](int64_t tile) {
    const int64_t left = elements - tile * kTile;
    return static_cast<uint32_t>((left < kTile ? left : kTile) * sizeof(float));
  };
  const auto ask_for = [&](int64_t tile, int place) {
    if (threadIdx.x != 0 || tile >= tiles) return;
    const uint32_t bytes = bytes_of(tile);
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(in_shared(barriers + place)),
                 "r"(2 * bytes)
                 : "memory");
    bring(places[place].live, live + tile * kTile, bytes, barriers + place);
    bring(places[place].shadow, shadow + tile * kTile, bytes, barriers + place);
  };
  if (threadIdx.x == 0) {
    for (uint64_t& barrier : barriers) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(in_shared(&barrier)) : "memory");
    }
    asm volatile("fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;" ::: "memory");
  }
  for (int place = 0; place < kPlaces; ++place) ask_for(blockIdx.x + static_cast<int64_t>(place) * gridDim.x, place);
  __syncthreads();  // the barriers are there
  const fastema::Weight<float> weight(weight_of_live);
  int64_t round = 0;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x, ++round) {
    const int place = static_cast<int>(round % kPlaces);
    asm volatile(
        "{ .reg .pred here; AGAIN: mbarrier.try_wait.parity.shared::cta.b64 here, [%0], %1; @!here bra AGAIN; }" ::"r"(
            in_shared(barriers + place)),
        "r"(static_cast<uint32_t>(round / kPlaces % 2))
        : "memory");
    const float4* lives = reinterpret_cast<const float4*>(places[place].live);
    const float4* shadows = reinterpret_cast<const float4*>(places[place].shadow);
    for (uint32_t i = threadIdx.x; i < bytes_of(tile) / 16; i += kThreads) {
      const auto element = [&](float old, float value) {
        return is_finite(value) ? averaged(old, value, weight) : old;
      };
      const float4 a = shadows[i], b = lives[i];
      reinterpret_cast<float4*>(shadow + tile * kTile)[i] =
          make_float4(element(a.x, b.x), element(a.y, b.y), element(a.z, b.z), element(a.w, b.w));
    }
    __syncthreads();  // everyone has read the place
    ask_for(tile + static_cast<int64_t>(kPlaces) * gridDim.x, place);
  }
#endif
}

// ---- timing ----

using Call = std::function<void()>;
struct Times {
  double alone, chained;  // microseconds: after a sweep; in a graph of many
};

double elapsed_us(cudaEvent_t begin, cudaEvent_t end, const Call& call) {
  float milliseconds;
  MUST(cudaEventRecord(begin, stream));
  call();
  MUST(cudaEventRecord(end, stream));
  MUST(cudaEventSynchronize(end));
  MUST(cudaEventElapsedTime(&milliseconds, begin, end));
  return milliseconds * 1e3;
}

double median(std::vector<double> seen) {
  std::nth_element(seen.begin(), seen.begin() + seen.size() / 2, seen.end());
  return seen[seen.size() / 2];
}

Times time_of(const Call& call, bool large) {
  static uint4* swept = nullptr;
  static unsigned* sink = nullptr;
  static cudaEvent_t begin, end;
  constexpr int64_t kSwept = 16 << 20;  // of 16 bytes, four times an H200's second-level cache
  if (swept == nullptr) {
    MUST(cudaMalloc(&swept, kSwept * 16)), MUST(cudaMemset(swept, 1, kSwept * 16)), MUST(cudaMalloc(&sink, 4));
    MUST(cudaEventCreate(&begin)), MUST(cudaEventCreate(&end));
  }
  std::vector<double> alone, chained;
  for (int i = 0, rounds = large ? 10 : 27; i < rounds; ++i) {
    sweep<<<kGrid, 256, 0, stream>>>(swept, kSwept, sink);
    const double us = elapsed_us(begin, end, call);
    if (i >= 2) alone.push_back(us);
  }
  cudaGraph_t graph;
  cudaGraphExec_t ready;
  const int links = large ? 4 : 20;
  MUST(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < links; ++i) call();
  MUST(cudaStreamEndCapture(stream, &graph));
  MUST(cudaGraphInstantiate(&ready, graph, 0));
  for (int i = 0; i < 4; ++i) {
    const double us = elapsed_us(begin, end, [&] { MUST(cudaGraphLaunch(ready, stream)); });
    if (i >= 1) chained.push_back(us / links);
  }
  MUST(cudaGraphExecDestroy(ready)), MUST(cudaGraphDestroy(graph));
  return {median(alone), median(chained)};
}

// ---- cases ----

struct Case {
  const char* name;
  std::vector<int64_t> sizes;
  Dtype shadow, live;
  std::vector<int64_t> chunk_sizes;  // tried beside the plan's own
};

std::vector<int64_t> sizes_of_a_net() {  // 746 tensors, 31 M: two of three tiny, a few large, in no order
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < 746; ++i) {
    const int64_t spread = i * 7919 % 746;
    sizes.push_back(i % 83 == 41 ? 1000000 + 1600 * spread
                    : i % 3 != 0 ? 16 + spread * 1300 / 746
                                 : 2048 + spread * spread * 7 / 20);
  }
  return sizes;
}

struct Lab {
  int64_t blocks;
  unsigned long long *bad, *wrong;
  bool all_right = true;

  void run(const Case& one);
};

void Lab::run(const Case& one) {
  const bool planes = one.shadow == Dtype::kPlanes,
             is_float = one.shadow == Dtype::kFloat32 && one.live == Dtype::kFloat32;
  std::vector<int64_t> begins = {0};
  int64_t elements = 0;
  for (const int64_t size : one.sizes) elements += size, begins.push_back(begins.back() + (size + 127) / 128 * 128);
  const int64_t room = begins.back(), shadow_size = dtype_bytes(one.shadow), live_size = dtype_bytes(one.live);
  const int64_t bytes = elements * (live_size + 2 * (shadow_size + (planes ? 2 : 0)));
  Array shadow{nullptr, nullptr, one.shadow != Dtype::kFloat32, 0},
      live{nullptr, nullptr, one.live != Dtype::kFloat32, 1};
  char* copied;
  int64_t *device_begins, *device_sizes;
  MUST(cudaMalloc(&shadow.at, room * shadow_size)), MUST(cudaMalloc(&live.at, room * live_size));
  if (planes) MUST(cudaMalloc(&shadow.low, room * 2));
  MUST(cudaMalloc(&copied, bytes + 256));
  fill<<<kGrid, 256, 0, stream>>>(Array{copied, nullptr, false, 2}, bytes / 4);  // zeros can be moved faster
  MUST(cudaMalloc(&device_begins, begins.size() * 8)), MUST(cudaMalloc(&device_sizes, one.sizes.size() * 8));
  MUST(cudaMemcpy(device_begins, begins.data(), begins.size() * 8, cudaMemcpyHostToDevice));
  MUST(cudaMemcpy(device_sizes, one.sizes.data(), one.sizes.size() * 8, cudaMemcpyHostToDevice));
  const bool large = bytes > 4e9;
  const Times copy = time_of(
      [&] { MUST(cudaMemcpyAsync(copied, copied + bytes / 512 * 256, bytes / 2, cudaMemcpyDeviceToDevice, stream)); },
      large);

  const auto report = [&](const char* variant, const Call& call) {
    fill<<<kGrid, 256, 0, stream>>>(shadow, room), fill<<<kGrid, 256, 0, stream>>>(live, room);
    MUST(cudaMemsetAsync(wrong, 0, 8, stream));
    call();
    const dim3 grid(static_cast<unsigned>(one.sizes.size()), one.sizes.size() > 1 ? 16 : kGrid);
    count_wrong<<<grid, 256, 0, stream>>>(shadow, live, device_begins, device_sizes, wrong);
    unsigned long long found = 0;
    MUST(cudaMemcpyAsync(&found, wrong, 8, cudaMemcpyDeviceToHost, stream)), MUST(cudaStreamSynchronize(stream));
    if (found != 0) std::printf("WRONG: %llu values of %s, %s\n", found, one.name, variant), all_right = false;
    const Times times = time_of(call, large);
    std::printf("%s\t%s\t%.2f\t%.2f\t%.2f\t%.2f\n", one.name, variant, times.alone, copy.alone, times.chained,
                copy.chained);
    std::fflush(stdout);
  };

  std::vector<Segment> segments;
  for (size_t i = 0; i < one.sizes.size(); ++i) {
    Segment segment{};
    segment.shadow = static_cast<char*>(shadow.at) + begins[i] * shadow_size;
    segment.shadow_low = planes ? shadow.low + begins[i] : nullptr;
    segment.live = static_cast<char*>(live.at) + begins[i] * live_size;
    segment.count = one.sizes[i];
    segment.kind = static_cast<Kind>(kAverage + dtype_pair(one.shadow, one.live));
    segments.push_back(segment);
  }
  UpdateArgs args{};
  args.shadows = 1, args.weights[0] = kWeight;
  const auto with_table = [&](std::vector<Chunk> table, const std::function<void(const Chunk*, int64_t)>& use) {
    Chunk* chunks;
    MUST(cudaMalloc(&chunks, table.size() * sizeof(Chunk)));
    MUST(cudaMemcpy(chunks, table.data(), table.size() * sizeof(Chunk), cudaMemcpyHostToDevice));
    use(chunks, static_cast<int64_t>(table.size()));
    MUST(cudaFree(chunks));
  };
  const auto launched = [&](const char* variant) {
    return [&, variant](const Chunk* chunks, int64_t count) {
      report(variant, [&] {
        const char* error = launch_update(chunks, count, args, bad, 0, stream);
        if (error != nullptr) std::printf("%s\n", error), std::_Exit(2);
      });
    };
  };
  const int64_t own = chunk_elements_for(elements, blocks);
  const std::vector<Chunk> table = cut(segments, own);
  args.skip_nonfinite = true;
  with_table(table, launched("plan"));
#ifdef ALL
  for (const int64_t size : one.chunk_sizes) {
    char name[32];
    std::snprintf(name, sizeof name, "chunks of %lld", static_cast<long long>(size));
    if (size != own) with_table(cut(segments, size), launched(name));
  }
  if (one.sizes.size() > 1) {
    std::vector<Chunk> sorted = table;
    const auto is_larger = [](const Chunk& a, const Chunk& b) { return a.count > b.count; };
    std::stable_sort(sorted.begin(), sorted.end(), is_larger);
    with_table(sorted, launched("largest first"));
  }
  if (is_float) {
    with_table(table, [&](const Chunk* chunks, int64_t count) {
      const unsigned grid = static_cast<unsigned>(std::min(count, blocks));
      report("persistent", [&] {
        persistent<<<grid, kThreads, 0, stream>>>(chunks, count, args, bad);
        MUST(cudaGetLastError());
      });
    });
  }
  int major = 0;
  MUST(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
  if (is_float && one.sizes.size() == 1 && major >= 9) {
    const int memory = kPlaces * sizeof(Place);
    MUST(cudaFuncSetAttribute(bulk, cudaFuncAttributeMaxDynamicSharedMemorySize, memory));
    const unsigned grid = static_cast<unsigned>(blocks / kResidentBlocksPerMultiprocessor * kBulkBlocks);
    report("bulk copies", [&] {
      bulk<<<grid, kThreads, memory, stream>>>(static_cast<float*>(shadow.at), static_cast<const float*>(live.at),
                                               elements, kWeight);
      MUST(cudaGetLastError());
    });
  }
  args.skip_nonfinite = false;
  with_table(table, launched("unguarded"));
#endif
  for (void* at : {shadow.at, live.at, static_cast<void*>(shadow.low), static_cast<void*>(copied),
                   static_cast<void*>(device_begins), static_cast<void*>(device_sizes)}) {
    MUST(cudaFree(at));
  }
}

}  // namespace lab

int main(int argc, char** argv) {
  using namespace lab;
  const double scale = argc > 1 ? std::atof(argv[1]) : 1.0;
  Lab here{};
  MUST(cudaSetDevice(0));
  MUST(cudaStreamCreate(&stream));
  MUST(cudaMalloc(&here.bad, 8)), MUST(cudaMalloc(&here.wrong, 8)), MUST(cudaMemset(here.bad, 0, 8));
  if (resident_blocks(0, here.blocks) != nullptr) return 2;
  const auto millions = [&](double count) {
    return std::vector<int64_t>{static_cast<int64_t>(count * 1e6 * scale) & ~63ll};
  };
  constexpr Dtype kF32 = Dtype::kFloat32, kBF16 = Dtype::kBFloat16;
  const Case cases[] = {
      {"f32 25 M", millions(25), kF32, kF32, {4096, 8192, 16384}},
      {"f32 100 M", millions(100), kF32, kF32, {}},
      {"f32 1 B", millions(1000), kF32, kF32, {8192, 32768}},
      {"f32 746 tensors", sizes_of_a_net(), kF32, kF32, {4096, 8192, 16384}},
      {"f32 <- bf16 100 M", millions(100), kF32, kBF16, {}},
      {"planes <- bf16 100 M", millions(100), Dtype::kPlanes, kBF16, {}},
      {"bf16 100 M", millions(100), kBF16, kBF16, {}},
  };
  for (const Case& one : cases) {
    if (argc < 3 || std::strstr(one.name, argv[2]) != nullptr) here.run(one);
  }
  return here.all_right ? 0 : 1;
}
