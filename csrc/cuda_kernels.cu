// One block a chunk: scalars up to 16-byte alignment -> tiles of vectors -> scalars.
//
// The table holds every dtype mix, so one launch does them all; a block's kind is uniform, so the switch costs one
// branch. All loads of a tile are issued before the first value is used: what saturates the memory is bytes in flight.
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
#if defined(__HIPCC__)  // there the second number means waves a SIMD
#define FASTEMA_LAUNCH_BOUNDS __launch_bounds__(kThreads)
#else
#define FASTEMA_LAUNCH_BOUNDS __launch_bounds__(kThreads, kResidentBlocksPerMultiprocessor)
#endif

// ---- memory: 1, 2, 4, 8 or 16 bytes in one global access ----
//
// In PTX, because the compiler moves arithmetic between plain loads and knows no address space behind the chunk table.
// What is volatile keeps its order.

// 16-bit formats lie in words, two in each: the compiler would take arrays of halves apart, and put them together
// again.
template <class T, int kCount, bool kInWords = sizeof(T) == 2 && kCount % 2 == 0>
struct alignas(sizeof(T) * kCount) Pack {
  T values[kCount];
};

template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Pack<T, kCount, true> {
  uint32_t words[kCount / 2];
};

#if defined(__HIPCC__)
template <int kBytes>
using Word = std::conditional_t<
    kBytes == 1, uint8_t,
    std::conditional_t<kBytes == 2, uint16_t, uint32_t __attribute__((ext_vector_type(kBytes >= 4 ? kBytes / 4 : 1)))>>;
template <int kBytes>
using GlobalWord = __attribute__((address_space(1))) Word<kBytes>;
#endif

// What is at `at` if `wanted`, else 0: were it left undefined, its registers would be kept from one tile to the next.
template <class T>
__device__ __forceinline__ T load_if(bool wanted, const T* at) {
  T value{};
#if defined(__CUDA_ARCH__)
  const uint64_t address = __cvta_generic_to_global(at);
  const int flag = wanted;
  uint32_t words[4];
  uint16_t half;
  if constexpr (sizeof(T) == 16) {
    asm volatile(
        "{ .reg .pred p; setp.ne.s32 p, %4, 0; mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0; @p "
        "ld.global.v4.b32 {%0, %1, %2, %3}, [%5]; }"
        : "=&r"(words[0]), "=&r"(words[1]), "=&r"(words[2]), "=&r"(words[3])
        : "r"(flag), "l"(address));
    memcpy(&value, words, 16);
  } else if constexpr (sizeof(T) == 8) {
    asm volatile(
        "{ .reg .pred p; setp.ne.s32 p, %2, 0; mov.b32 %0, 0; mov.b32 %1, 0; @p ld.global.v2.b32 {%0, %1}, [%3]; }"
        : "=&r"(words[0]), "=&r"(words[1])
        : "r"(flag), "l"(address));
    memcpy(&value, words, 8);
  } else if constexpr (sizeof(T) == 4) {
    asm volatile("{ .reg .pred p; setp.ne.s32 p, %1, 0; mov.b32 %0, 0; @p ld.global.b32 %0, [%2]; }"
                 : "=&r"(words[0])
                 : "r"(flag), "l"(address));
    memcpy(&value, words, 4);
  } else if constexpr (sizeof(T) == 2) {
    asm volatile("{ .reg .pred p; setp.ne.s32 p, %1, 0; mov.b16 %0, 0; @p ld.global.b16 %0, [%2]; }"
                 : "=&h"(half)
                 : "r"(flag), "l"(address));
    memcpy(&value, &half, 2);
  } else {
    static_assert(sizeof(T) == 1, "no access is wider than 16 bytes");
    asm volatile("{ .reg .pred p; setp.ne.s32 p, %1, 0; mov.b16 %0, 0; @p ld.global.u8 %0, [%2]; }"
                 : "=&h"(half)
                 : "r"(flag), "l"(address));
    memcpy(&value, &half, 1);
  }
#elif defined(__HIP_DEVICE_COMPILE__)
  Word<sizeof(T)> word{};
  if (wanted) word = *(const GlobalWord<sizeof(T)>*)at;
  memcpy(&value, &word, sizeof value);
#else
  if (wanted) value = *at;
#endif
  return value;
}

// Stores if `wanted`.
template <class T>
__device__ __forceinline__ void store_if(bool wanted, T* at, const T& value) {
#if defined(__CUDA_ARCH__)
  const uint64_t address = __cvta_generic_to_global(at);
  const int flag = wanted;
  uint32_t words[4];
  uint16_t half = 0;
  if constexpr (sizeof(T) == 16) {
    memcpy(words, &value, 16);
    asm volatile("{ .reg .pred p; setp.ne.s32 p, %0, 0; @p st.global.v4.b32 [%1], {%2, %3, %4, %5}; }" ::"r"(flag),
                 "l"(address), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]));
  } else if constexpr (sizeof(T) == 8) {
    memcpy(words, &value, 8);
    asm volatile("{ .reg .pred p; setp.ne.s32 p, %0, 0; @p st.global.v2.b32 [%1], {%2, %3}; }" ::"r"(flag),
                 "l"(address), "r"(words[0]), "r"(words[1]));
  } else if constexpr (sizeof(T) == 4) {
    memcpy(words, &value, 4);
    asm volatile("{ .reg .pred p; setp.ne.s32 p, %0, 0; @p st.global.b32 [%1], %2; }" ::"r"(flag), "l"(address),
                 "r"(words[0]));
  } else if constexpr (sizeof(T) == 2) {
    memcpy(&half, &value, 2);
    asm volatile("{ .reg .pred p; setp.ne.s32 p, %0, 0; @p st.global.b16 [%1], %2; }" ::"r"(flag), "l"(address),
                 "h"(half));
  } else {
    static_assert(sizeof(T) == 1, "no access is wider than 16 bytes");
    memcpy(&half, &value, 1);
    asm volatile("{ .reg .pred p; setp.ne.s32 p, %0, 0; @p st.global.u8 [%1], %2; }" ::"r"(flag), "l"(address),
                 "h"(half));
  }
#elif defined(__HIP_DEVICE_COMPILE__)
  Word<sizeof(T)> word;
  memcpy(&word, &value, sizeof value);
  if (wanted) *(GlobalWord<sizeof(T)>*)at = word;
#else
  if (wanted) *at = value;
#endif
}

__device__ __forceinline__ Chunk load_chunk(const Chunk* row) {
  struct alignas(16) Half {
    uint64_t words[2];  // no smaller parts: the compiler would put the pointers together byte by byte
  };
  const Half halves[2] = {load_if(true, reinterpret_cast<const Half*>(row)),
                          load_if(true, reinterpret_cast<const Half*>(row) + 1)};
  Chunk chunk;
  memcpy(&chunk, halves, sizeof chunk);
  return chunk;
}

// ---- a shadow: an array, or the two planes of a float32 ----

struct Planes {};

template <int kCount>
struct Pack<Planes, kCount, false> {
  Pack<BFloat16, kCount> high;
  Pack<int16_t, kCount> low;
};

struct PlanePointers {
  BFloat16* high;
  int16_t* low;

  __device__ __forceinline__ PlanePointers operator+(uint32_t offset) const { return {high + offset, low + offset}; }
};

template <class Shadow>
using Pointer = std::conditional_t<std::is_same_v<Shadow, Planes>, PlanePointers, Shadow*>;
template <class Shadow>
constexpr uint32_t kElementBytes = std::is_same_v<Shadow, Planes> ? 2 : sizeof(Shadow);  // of each plane

template <class Shadow>
__device__ __forceinline__ Pointer<Shadow> pointer_of(const Chunk& chunk) {
  if constexpr (std::is_same_v<Shadow, Planes>) {
    return {static_cast<BFloat16*>(chunk.shadow), static_cast<int16_t*>(chunk.shadow_low)};
  } else {
    return static_cast<Shadow*>(chunk.shadow);
  }
}

// ---- a tile: kDepth packs of kCount elements a thread, kThreads packs apart. `left` packs are inside from `at` on
// ----

template <class T, int kCount, int kDepth>
__device__ __forceinline__ void load_tile(Pack<T, kCount> (&tile)[kDepth], const T* at, int left) {
#pragma unroll
  for (int n = 0; n < kDepth; ++n) {
    tile[n] = load_if(n * kThreads < left, reinterpret_cast<const Pack<T, kCount>*>(at) + n * kThreads);
  }
}

template <int kCount, int kDepth>
__device__ __forceinline__ void load_tile(Pack<Planes, kCount> (&tile)[kDepth], PlanePointers at, int left) {
#pragma unroll
  for (int n = 0; n < kDepth; ++n) {
    tile[n].high =
        load_if(n * kThreads < left, reinterpret_cast<const Pack<BFloat16, kCount>*>(at.high) + n * kThreads);
    tile[n].low = load_if(n * kThreads < left, reinterpret_cast<const Pack<int16_t, kCount>*>(at.low) + n * kThreads);
  }
}

template <class T, int kCount>
__device__ __forceinline__ void store_pack_if(bool wanted, const Pack<T, kCount>& pack, T* at, int n) {
  store_if(wanted, reinterpret_cast<Pack<T, kCount>*>(at) + n * kThreads, pack);
}

template <int kCount>
__device__ __forceinline__ void store_pack_if(bool wanted, const Pack<Planes, kCount>& pack, PlanePointers at, int n) {
  store_pack_if(wanted, pack.high, at.high, n);
  store_pack_if(wanted, pack.low, at.low, n);
}

// Elements from `pointer` on until it is a multiple of `bytes`.
template <class T>
__device__ uint32_t elements_to_alignment(const T* pointer, uint32_t bytes) {
  return (0u - static_cast<uint32_t>(reinterpret_cast<uintptr_t>(pointer))) % bytes / static_cast<uint32_t>(sizeof(T));
}

__device__ uint32_t elements_to_alignment(PlanePointers pointers, uint32_t bytes) {
  return elements_to_alignment(pointers.high, bytes);
}

__device__ bool is_aligned(const void* pointer, uint32_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

__device__ bool is_aligned(PlanePointers pointers, uint32_t bytes) {
  return is_aligned(pointers.high, bytes) && is_aligned(pointers.low, bytes);
}

// ---- the rules: what happens to the elements of a tile ----

// ROCm puts an array that is indexed when the kernel runs into scratch memory.
__device__ __forceinline__ double weight_argument(const UpdateArgs& args, int k) {
#if defined(__HIPCC__)
  double weight = args.weights[0];
#pragma unroll
  for (int i = 1; i < kMaxShadows; ++i) weight = i == k ? args.weights[i] : weight;
  return weight;
#else
  return args.weights[k];
#endif
}

// Values of a pack in opmath, and back. Of 16-bit formats two at once, as they lie in a register.

template <class Stored, int kCount, class Op>
__device__ __forceinline__ void unpack(const Pack<Stored, kCount>& pack, Op (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if constexpr (sizeof(Stored) != 2 || kCount % 2 != 0) {
      values[i] = load_as<Op>(pack.values[i]);
    } else if constexpr (std::is_same_v<Stored, BFloat16>) {
      values[i] = bits_float(i % 2 == 0 ? pack.words[i / 2] << 16 : pack.words[i / 2] & 0xffff0000u);
    } else {
      values[i] = load_as<Op>(static_cast<Stored>(static_cast<uint16_t>(pack.words[i / 2] >> i % 2 * 16)));
    }
  }
}

template <int kCount>
__device__ __forceinline__ void unpack(const Pack<Planes, kCount>& pack, float (&values)[kCount]) {
  if constexpr (kCount % 2 == 0) {
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      const uint32_t highs = pack.high.words[i], lows = pack.low.words[i];
      values[2 * i] = join_planes(highs << 16, static_cast<uint32_t>(static_cast<int32_t>(lows << 16) >> 16));
      values[2 * i + 1] = join_planes(highs & 0xffff0000u, static_cast<uint32_t>(static_cast<int32_t>(lows) >> 16));
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = join_planes(pack.high.values[i], pack.low.values[i]);
  }
}

template <class Stored, int kCount, class Op>
__device__ __forceinline__ void pack(const Op (&values)[kCount], Pack<Stored, kCount>& pack) {
  if constexpr (sizeof(Stored) == 2 && kCount % 2 == 0) {
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      pack.words[i] = narrow_two<Stored>(static_cast<float>(values[2 * i]), static_cast<float>(values[2 * i + 1]));
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) pack.values[i] = store_as<Stored>(values[i]);
  }
}

template <int kCount>
__device__ __forceinline__ void pack(const float (&values)[kCount], Pack<Planes, kCount>& pack) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if constexpr (kCount % 2 != 0) {
      pack.high.values[i] = high_plane(values[i]);
      pack.low.values[i] = low_plane(values[i]);
    } else if (i % 2 == 0) {
      split_two(values[i], values[i + 1], pack.high.words[i / 2], pack.low.words[i / 2]);
    }
  }
}

// Whether all of some values are finite: one multiply-add each, which makes a NaN of 0 * NaN and 0 * infinity.
template <class Op>
struct AllFinite {
  Op sum = 0;

  __device__ __forceinline__ void add(Op value) { sum = fused_multiply_add(value, Op(0), sum); }
  __device__ __forceinline__ bool holds() const { return sum == Op(0); }
};

// An average, or a conversion: few tensors are converted, so it has no loop of its own.
template <bool kSkipNonfinite, class Shadow, class Live>
struct Average {
  using Op = std::conditional_t<std::is_same_v<Shadow, Planes>, float, Opmath<Shadow>>;
  using Weight = fastema::Weight<Op>;
  static constexpr bool kReadsShadow = true;
  static constexpr bool kSettles = kSkipNonfinite;

  const UpdateArgs& args;
  bool converts;
  unsigned int nonfinite = 0;

  __device__ __forceinline__ double load_weight(int k) const {
    return load_if(args.device_weights != nullptr, args.device_weights + k);
  }
  __device__ __forceinline__ Weight weight(int k, double loaded) const {
    return Weight(args.device_weights != nullptr ? loaded : weight_argument(args, k));
  }

  // Returns whether the pack may be stored; else settle() does it, in which the shadow is what it was.
  template <int kCount>
  __device__ __forceinline__ bool apply(Pack<Shadow, kCount>& shadows, const Pack<Live, kCount>& lives,
                                        const Weight& weight) {
    AllFinite<Op> finite;  // what lies beyond the chunk is 0
    const bool copies = converts || weight.copies;
    Op values[kCount], live_values[kCount];
    unpack(shadows, values);
    unpack(lives, live_values);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const Op average = averaged(values[i], live_values[i], weight);
      if constexpr (kSkipNonfinite) finite.add(average);
      values[i] = copies ? live_values[i] : average;
    }
    pack(values, shadows);
    return !kSkipNonfinite || converts || finite.holds();
  }

  // The packs of `bad`, a bit each, element by element: rare, so it is small rather than fast.
  template <int kCount>
  __device__ __forceinline__ void settle(uint32_t bad, Pointer<Shadow> shadow, const Live* live, const Weight& weight,
                                         int k) {
    const bool count_live = args.count_live && k == 0;
#pragma unroll 1
    for (uint32_t i = 0; bad >> (i / kCount) != 0; ++i) {
      if ((bad >> (i / kCount) & 1) == 0) continue;
      const uint32_t at = i / kCount * (kThreads * kCount) + i % kCount;
      Pack<Live, 1> lives[1];
      Pack<Shadow, 1> shadows[1];
      load_tile(lives, live + at, 1);
      load_tile(shadows, shadow + at, 1);
      Op live_value[1], value[1];
      unpack(lives[0], live_value);
      unpack(shadows[0], value);
      const Op average = averaged(value[0], live_value[0], weight);
      const bool is_bad = !is_finite(average);
      nonfinite += is_bad && (count_live || is_finite(live_value[0]));
      if (is_bad && !takes_live(value[0], live_value[0], weight.copies)) continue;
      value[0] = is_bad || weight.copies ? live_value[0] : average;
      pack(value, shadows[0]);
      store_pack_if(true, shadows[0], shadow + at, 0);
    }
  }
};

struct CopyBytes {
  static constexpr bool kReadsShadow = false;
  static constexpr bool kSettles = false;
  struct Weight {};

  __device__ double load_weight(int) const { return 0.0; }
  __device__ Weight weight(int, double) const { return {}; }
  template <int kCount>
  __device__ __forceinline__ bool apply(Pack<uint8_t, kCount>& shadows, const Pack<uint8_t, kCount>& lives, Weight) {
    shadows = lives;
    return true;
  }
  template <int kCount>
  __device__ void settle(uint32_t, uint8_t*, const uint8_t*, Weight, int) {}
};

// ---- one chunk ----

// A chunk's row and those of its other shadows, which lie `count` apart in the table.
struct Rows {
  const Chunk* table;
  int64_t count;
  int shadows;

  template <class Shadow>
  __device__ Pointer<Shadow> shadow(int k) const {
    if constexpr (std::is_same_v<Shadow, Planes>) {  // both in one load
      struct alignas(16) Both {
        BFloat16* high;
        int16_t* low;
      };
      const Both both = load_if(k < shadows, reinterpret_cast<const Both*>(&table[k * count].shadow));
      return {both.high, both.low};
    } else {
      return static_cast<Shadow*>(load_if(k < shadows, &table[k * count].shadow));
    }
  }
};

// `packs` of kCount elements, tile by tile, each under all shadows in turn: live comes from memory for the first of
// them and from the cache for the others. The pointer of the next shadow is on its way while the tile of this one is.
template <int kCount, int kDepth, class Shadow, class Live, class Rule>
__device__ __forceinline__ void run_tiles(const Rows& rows, Pointer<Shadow> first, const Live* live, uint32_t begin,
                                          uint32_t packs, Rule& rule) {
  uint32_t offset = begin + threadIdx.x * kCount;
#pragma unroll 1
  for (int all = static_cast<int>(packs); all > 0; all -= kDepth * kThreads) {
    const int left = all - static_cast<int>(threadIdx.x);
    Pointer<Shadow> shadow = first;
#pragma unroll 1
    for (int k = 0; k < rows.shadows; ++k) {
      const double loaded_weight = rule.load_weight(k);
      const Pointer<Shadow> next = rows.template shadow<Shadow>(k + 1);
      Pack<Live, kCount> lives[kDepth];
      Pack<Shadow, kCount> tile[kDepth];
      load_tile(lives, live + offset, left);
      if constexpr (Rule::kReadsShadow) load_tile(tile, shadow + offset, left);
      // Scalars that are not all stored have predicates: of branches in their loops ptxas would share the code with
      // other dtypes, and move loads behind the first use, but for the barrier.
      constexpr bool kPredicates = kCount == 1 && Rule::kSettles;
#if defined(__CUDA_ARCH__)
      if constexpr (kPredicates) __syncwarp();
#endif
      // Branches, which the compiler moves no arithmetic across: all loads stay in front of them, and no pack holds the
      // registers of another. The outer one is for scalars, where the inner ones become predicates.
      if (kCount > 1 || left > 0) {
        typename Rule::Weight weight;
        uint32_t bad = 0;
#pragma unroll
        for (int n = 0; n < kDepth; ++n) {
          const bool is_inside = n * kThreads < left;
          if (kPredicates || is_inside) {
            if (n == 0) weight = rule.weight(k, loaded_weight);
            const bool is_good = rule.apply(tile[n], lives[n], weight);
            store_pack_if(is_inside && is_good, tile[n], shadow + offset, n);
            if (is_inside && !is_good) bad |= 1u << n;
          }
        }
        if (bad != 0) rule.template settle<kCount>(bad, shadow + offset, live + offset, weight, k);
      }
      shadow = next;
    }
    offset += kDepth * kThreads * kCount;
  }
}

// A pack is 16 bytes of the wider operand and as many elements of the narrower, so that every store fills its sectors.
// A tile has 128 bytes or more in flight a thread.
template <class Shadow, class Live, class Rule>
__device__ __forceinline__ void run_chunk(const Rows& rows, const Chunk& chunk, Rule& rule) {
  constexpr uint32_t kShadowBytes = kElementBytes<Shadow>;
  constexpr bool kShadowIsWider = kShadowBytes >= sizeof(Live);
  constexpr uint32_t kCount = 16 / (kShadowIsWider ? kShadowBytes : sizeof(Live));
  // 8 packs of float64 <- float32 would spill on sm_80.
  constexpr int kMixed = std::is_same_v<Shadow, double> && std::is_same_v<Live, float> ? 7 : 8;
  constexpr int kDepth = std::is_same_v<Shadow, Planes> ? 3 : kShadowBytes == sizeof(Live) ? 4 : kMixed;
  constexpr int kScalarDepth = 8;
  const uint32_t elements = chunk.count;
  const Live* live = static_cast<const Live*>(chunk.live);
  const Pointer<Shadow> first = pointer_of<Shadow>(chunk);

  uint32_t head = kShadowIsWider ? elements_to_alignment(first, 16) : elements_to_alignment(live, 16);
  bool aligned = head < elements && is_aligned(live + head, sizeof(Live) * kCount);
  aligned = aligned && is_aligned(first + head, kShadowBytes * kCount);
#pragma unroll 1
  for (int k = 1; k < rows.shadows; ++k) {
    aligned = aligned && is_aligned(rows.template shadow<Shadow>(k) + head, kShadowBytes * kCount);
  }
  if (!aligned) head = elements;  // a chunk of scalars
  const uint32_t packs = (elements - head) / kCount;
  uint32_t begin = 0, end = head;  // the scalars first: then the tiles need not hold the rest of the row in registers
#pragma unroll 1
  for (int part = 0; part < 2; ++part) {
    run_tiles<1, kScalarDepth, Shadow>(rows, first, live, begin, end - begin, rule);
    begin = head + packs * kCount, end = elements;
  }
  run_tiles<kCount, kDepth, Shadow>(rows, first, live, head, packs, rule);
}

// One atomic a warp, so that a model of nothing but NaN does not wait for 2^30 of them. All threads of the block call
// it.
__device__ __forceinline__ void add_nonfinite(unsigned long long* total, unsigned int nonfinite) {
#if defined(__HIPCC__)
  for (int delta = warpSize / 2; delta > 0; delta /= 2) nonfinite += __shfl_xor(nonfinite, delta);
#else
  if (!__any_sync(0xffffffffu, nonfinite != 0)) return;
  for (int delta = warpSize / 2; delta > 0; delta /= 2) nonfinite += __shfl_xor_sync(0xffffffffu, nonfinite, delta);
#endif
  if (nonfinite != 0 && threadIdx.x % warpSize == 0) atomicAdd(total, static_cast<unsigned long long>(nonfinite));
}

template <bool kSkipNonfinite, class Shadow, class Live>
__device__ __forceinline__ void average(const Rows& rows, const Chunk& chunk, const UpdateArgs& args,
                                        unsigned long long* nonfinite) {
  Average<kSkipNonfinite, Shadow, Live> rule{args, chunk.kind >= kConvert};
  run_chunk<Shadow, Live>(rows, chunk, rule);
  if constexpr (kSkipNonfinite) {
    if (!rule.converts) add_nonfinite(nonfinite, rule.nonfinite);
  }
}

template <class T>
constexpr Dtype kDtype = std::is_same_v<T, float>      ? Dtype::kFloat32
                         : std::is_same_v<T, double>   ? Dtype::kFloat64
                         : std::is_same_v<T, BFloat16> ? Dtype::kBFloat16
                         : std::is_same_v<T, Planes>   ? Dtype::kPlanes
                                                       : Dtype::kFloat16;
template <class Shadow, class Live>
constexpr Kind kPair = dtype_pair(kDtype<Shadow>, kDtype<Live>);

template <bool kSkipNonfinite>
__global__ void FASTEMA_LAUNCH_BOUNDS update_kernel(const Chunk* chunks, int64_t count,
                                                    const __grid_constant__ UpdateArgs args,
                                                    unsigned long long* nonfinite) {
  const Rows rows{chunks + blockIdx.x, count, args.shadows};
  const Chunk chunk = load_chunk(rows.table);
  const float skip = load_if(args.skip != nullptr, args.skip);  // beside the row, not before it
  if (args.skip != nullptr && skip != 0.0f) return;
  // A line for each dtype pair, by which tests/csrc/test_cuda_source.py tells their loops apart.
  switch (chunk.kind == kCopyBytes ? kCopyBytes : chunk.kind % 32) {
    case kPair<float, float>:
      return average<kSkipNonfinite, float, float>(rows, chunk, args, nonfinite);
    case kPair<float, double>:
      return average<kSkipNonfinite, float, double>(rows, chunk, args, nonfinite);
    case kPair<float, BFloat16>:
      return average<kSkipNonfinite, float, BFloat16>(rows, chunk, args, nonfinite);
    case kPair<float, Float16>:
      return average<kSkipNonfinite, float, Float16>(rows, chunk, args, nonfinite);
    case kPair<Planes, BFloat16>:
      return average<kSkipNonfinite, Planes, BFloat16>(rows, chunk, args, nonfinite);
    case kPair<double, float>:
      return average<kSkipNonfinite, double, float>(rows, chunk, args, nonfinite);
    case kPair<double, double>:
      return average<kSkipNonfinite, double, double>(rows, chunk, args, nonfinite);
    case kPair<double, BFloat16>:
      return average<kSkipNonfinite, double, BFloat16>(rows, chunk, args, nonfinite);
    case kPair<double, Float16>:
      return average<kSkipNonfinite, double, Float16>(rows, chunk, args, nonfinite);
    case kPair<BFloat16, float>:
      return average<kSkipNonfinite, BFloat16, float>(rows, chunk, args, nonfinite);
    case kPair<BFloat16, double>:
      return average<kSkipNonfinite, BFloat16, double>(rows, chunk, args, nonfinite);
    case kPair<BFloat16, BFloat16>:
      return average<kSkipNonfinite, BFloat16, BFloat16>(rows, chunk, args, nonfinite);
    case kPair<BFloat16, Float16>:
      return average<kSkipNonfinite, BFloat16, Float16>(rows, chunk, args, nonfinite);
    case kPair<Float16, float>:
      return average<kSkipNonfinite, Float16, float>(rows, chunk, args, nonfinite);
    case kPair<Float16, double>:
      return average<kSkipNonfinite, Float16, double>(rows, chunk, args, nonfinite);
    case kPair<Float16, BFloat16>:
      return average<kSkipNonfinite, Float16, BFloat16>(rows, chunk, args, nonfinite);
    case kPair<Float16, Float16>:
      return average<kSkipNonfinite, Float16, Float16>(rows, chunk, args, nonfinite);
    default:
      CopyBytes copy;
      return run_chunk<uint8_t, uint8_t>(rows, chunk, copy);
  }
}

// Pairs of packs change places, all of a tile loaded before the first is stored.
template <int kCount>
__device__ __forceinline__ void exchange_tiles(uint8_t* shadow, uint8_t* live, uint32_t packs) {
  constexpr int kDepth = 4;
  uint32_t offset = threadIdx.x * kCount;
#pragma unroll 1
  for (int left = static_cast<int>(packs - threadIdx.x); left > 0; left -= kDepth * kThreads) {
    Pack<uint8_t, kCount> shadows[kDepth], lives[kDepth];
    load_tile(shadows, shadow + offset, left);
    load_tile(lives, live + offset, left);
#pragma unroll
    for (int n = 0; n < kDepth; ++n) {
      if (n * kThreads < left) {
        store_pack_if(true, lives[n], shadow + offset, n);
        store_pack_if(true, shadows[n], live + offset, n);
      }
    }
    offset += kDepth * kThreads * kCount;
  }
}

__global__ void FASTEMA_LAUNCH_BOUNDS exchange_kernel(const Chunk* chunks) {
  const Chunk chunk = load_chunk(chunks + blockIdx.x);
  uint8_t* shadow = static_cast<uint8_t*>(chunk.shadow);
  uint8_t* live = static_cast<uint8_t*>(const_cast<void*>(chunk.live));
  const uint32_t bytes = chunk.count * chunk.shadow_element_bytes;
  uint32_t head = elements_to_alignment(shadow, 16);
  if (head > bytes || !is_aligned(live + head, 16)) head = bytes;
  const uint32_t packs = (bytes - head) / 16;
  exchange_tiles<16>(shadow + head, live + head, packs);
  uint32_t begin = 0, end = head;
#pragma unroll 1
  for (int part = 0; part < 2; ++part) {
    exchange_tiles<1>(shadow + begin, live + begin, end - begin);
    begin = head + packs * 16, end = bytes;
  }
}

// What fastema/core/counters.py computes in a dozen small operations: the step, its weights, and whether
// anything is averaged.
__global__ void clock_kernel(const ClockArgs args) {
  const bool skipped = args.found_inf != nullptr && *args.found_inf != 0.0f;
  const int64_t step = *args.step + (skipped ? 0 : 1);
  const int64_t update = step / args.update_every;  // from 1
  int64_t row = update < args.rows ? update - 1 : args.rows - 1;
  if (row < 0) row = 0;  // no update yet
#pragma unroll 1
  for (int k = 0; k < args.shadows; ++k) args.weights[k] = args.table[row * args.shadows + k];
  const bool idle = skipped || step % args.update_every != 0;
  *args.step = step;
  *args.skip = idle ? 1.0f : 0.0f;
  if (!idle) ++*args.num_updates;
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

CudaError launch_update(const Chunk* chunks, int64_t count, const UpdateArgs& args, unsigned long long* nonfinite,
                        int device, void* stream) {
  if (count == 0) return nullptr;
  const cudaError_t status = follow_torch_to(device);
  if (status != cudaSuccess) return message(status);
  const auto kernel = args.skip_nonfinite ? update_kernel<true> : update_kernel<false>;
  FASTEMA_LAUNCH(kernel, static_cast<unsigned int>(count), kThreads, static_cast<cudaStream_t>(stream), chunks, count,
                 args, nonfinite);
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

CudaError launch_clock(const ClockArgs& args, int device, void* stream) {
  const cudaError_t status = follow_torch_to(device);
  if (status != cudaSuccess) return message(status);
  FASTEMA_LAUNCH(clock_kernel, 1, 1, static_cast<cudaStream_t>(stream), args);
  return message(cudaGetLastError());
}

CudaError probe(int device) {
  cudaError_t status = follow_torch_to(device);
  const void* kernels[] = {reinterpret_cast<const void*>(update_kernel<false>),
                           reinterpret_cast<const void*>(update_kernel<true>),
                           reinterpret_cast<const void*>(exchange_kernel), reinterpret_cast<const void*>(clock_kernel)};
  for (const void* kernel : kernels) {
    cudaFuncAttributes attributes;
    if (status == cudaSuccess) status = cudaFuncGetAttributes(&attributes, kernel);
  }
  if (status != cudaSuccess) (void)cudaGetLastError();  // else the next launch reports it once more
  return message(status);
}

}  // namespace fastema
