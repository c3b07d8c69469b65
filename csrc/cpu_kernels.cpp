// One flat chunk list, shared out among threads, each chunk a vectorised loop.
//
// The loops are written once, always inlined, and compiled three times (baseline, AVX2, AVX-512) through the `target`
// attribute: the wheel runs everywhere and no -march is needed. Explicit functions rather than `target_clones`, so
// that a test can call each one and compare the bits.
#include "cpu_kernels.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>

#include "ema_math.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define FASTEMA_X86_VARIANTS 1
#else
#define FASTEMA_X86_VARIANTS 0
#endif

namespace fastema {
namespace {

constexpr int32_t kBlock = 256;  // elements; what is worked on while the next as many are on their way
constexpr int32_t kCacheLine = 64;

EMA_FN void prefetch(const void* begin, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kCacheLine) __builtin_prefetch(static_cast<const char*>(begin) + i);
}

// Asks for the block at element `begin`, or where the chunk ends before it, for the first block of the next chunk. The
// processor's own prefetchers stop at every page, and do not know which tensor comes next: this saves a sixth on large
// tensors (bench/NOTES.md).
template <class Shadow, class Live>
EMA_FN void prefetch_block(const Chunk& chunk, int32_t begin, const Chunk& next) {
  const int32_t left = static_cast<int32_t>(chunk.count) - begin;
  if (left > 0) {
    const int64_t count = std::min(left, kBlock);
    prefetch(static_cast<const Shadow*>(chunk.shadow) + begin, count * sizeof(Shadow));
    prefetch(static_cast<const Live*>(chunk.live) + begin, count * sizeof(Live));
  } else {
    const int64_t count = std::min<int64_t>(next.count, kBlock);
    prefetch(next.shadow, count * shadow_bytes(next.kind));
    prefetch(next.live, count * live_bytes(next.kind));
  }
}

// Returns how many averages are not finite; under kSkipNonfinite those elements keep their shadow.
template <bool kSkipNonfinite, class Shadow, class Live>
EMA_FN int32_t average_block(Shadow* __restrict shadow, const Live* __restrict live, int32_t count,
                             Weight<Opmath<Shadow>> weight) {
  static_assert(std::is_scalar_v<Shadow> && std::is_scalar_v<Live>, "loops over structs are not vectorised");
  using Op = Opmath<Shadow>;
  int32_t nonfinite = 0;
  for (int32_t i = 0; i < count; ++i) {
    const Op average = averaged(load_as<Op>(shadow[i]), load_as<Op>(live[i]), weight);
    const bool keep = kSkipNonfinite && !is_finite(average);
    const Shadow result = store_as<Shadow>(average);
    shadow[i] = keep ? shadow[i] : result;
    nonfinite += keep;
  }
  return nonfinite;
}

// The second pass over a block where averages are not finite, or all elements are copied. Returns how many live values
// are not finite. A function of its own: rare, and there is no arithmetic in it to vectorise.
template <class Shadow, class Live>
__attribute__((noinline)) int32_t settle_block(Shadow* shadow, const Live* live, int32_t count, bool copies) {
  using Op = Opmath<Shadow>;
  int32_t nonfinite = 0;
  for (int32_t i = 0; i < count; ++i) {
    const Op live_value = load_as<Op>(live[i]);
    if (takes_live(load_as<Op>(shadow[i]), live_value, copies)) shadow[i] = store_as<Shadow>(live_value);
    nonfinite += !is_finite(live_value);
  }
  return nonfinite;
}

__attribute__((noinline)) int32_t settle_planes_block(BFloat16* high, int16_t* low, const BFloat16* live, int32_t count,
                                                      bool copies) {
  int32_t nonfinite = 0;
  for (int32_t i = 0; i < count; ++i) {
    const float live_value = widen(live[i]);
    if (takes_live(join_planes(high[i], low[i]), live_value, copies)) high[i] = live[i], low[i] = 0;
    nonfinite += !is_finite(live_value);
  }
  return nonfinite;
}

// The bits of one new average in two planes; `upper` and `low` as join_planes() takes them. A NaN
// needs no care: a processor gives it the payload of an operand or none, and NaN operands have a lower half of 0 here.
template <bool kSkipNonfinite>
EMA_FN uint32_t average_planes(uint32_t upper, uint32_t low, uint32_t live_bits, Weight<float> weight,
                               int32_t& nonfinite) {
  const float old = join_planes(upper, low), live = bits_float(live_bits);
  const float result = averaged(old, live, weight);
  const bool keep = kSkipNonfinite && !is_finite(result);
  nonfinite += keep;
  return float_bits(keep ? old : result);
}

EMA_FN uint32_t load_word(const void* from) {
  uint32_t word;
  std::memcpy(&word, from, sizeof word);
  return word;
}

// Two elements in a word: halves are taken and put together by shifts and masks, where a loop over elements would have
// to widen, narrow and shuffle vectors.
template <bool kSkipNonfinite>
EMA_FN int32_t average_planes_block(BFloat16* __restrict high, int16_t* __restrict low, const BFloat16* __restrict live,
                                    int32_t count, Weight<float> weight) {
  int32_t nonfinite = 0;
  for (int32_t i = 0; i < count / 2; ++i) {
    const uint32_t highs = load_word(high + 2 * i), lows = load_word(low + 2 * i), lives = load_word(live + 2 * i);
    const uint32_t lower = average_planes<kSkipNonfinite>(highs << 16, ((lows & 0xffffu) ^ 0x8000u) - 0x8000u,
                                                          lives << 16, weight, nonfinite);
    const uint32_t upper =
        average_planes<kSkipNonfinite>(highs & 0xffff0000u, static_cast<uint32_t>(static_cast<int32_t>(lows) >> 16),
                                       lives & 0xffff0000u, weight, nonfinite);
    const uint32_t new_highs = (lower + 0x8000u) >> 16 | ((upper + 0x8000u) & 0xffff0000u);
    const uint32_t new_lows = (lower & 0xffffu) | upper << 16;
    std::memcpy(high + 2 * i, &new_highs, sizeof new_highs);
    std::memcpy(low + 2 * i, &new_lows, sizeof new_lows);
  }
  if (count % 2 != 0) {
    const int32_t i = count - 1;
    const uint32_t bits = average_planes<kSkipNonfinite>(static_cast<uint32_t>(high[i]) << 16,
                                                         static_cast<uint32_t>(static_cast<int32_t>(low[i])),
                                                         static_cast<uint32_t>(live[i]) << 16, weight, nonfinite);
    high[i] = static_cast<BFloat16>((bits + 0x8000u) >> 16);
    low[i] = static_cast<int16_t>(bits);
  }
  return nonfinite;
}

template <bool kSkipNonfinite, class Shadow, class Live>
EMA_FN int64_t average_chunk(const Chunk& chunk, const Chunk& next, double weight_of_live, bool count_live) {
  Shadow* shadow = static_cast<Shadow*>(chunk.shadow);
  const Live* live = static_cast<const Live*>(chunk.live);
  const Weight<Opmath<Shadow>> weight(weight_of_live);
  const int32_t count = static_cast<int32_t>(chunk.count);
  int64_t nonfinite = 0;
  for (int32_t begin = 0; begin < count; begin += kBlock) {
    const int32_t here = std::min(kBlock, count - begin);
    prefetch_block<Shadow, Live>(chunk, begin + here, next);
    const int32_t found = average_block<kSkipNonfinite>(shadow + begin, live + begin, here, weight);
    if (kSkipNonfinite && (found != 0 || weight.copies)) {
      const int32_t of_live = settle_block(shadow + begin, live + begin, here, weight.copies);
      nonfinite += found - (count_live ? 0 : of_live);
    }
  }
  return nonfinite;
}

template <bool kSkipNonfinite>
EMA_FN int64_t average_planes_chunk(const Chunk& chunk, const Chunk& next, double weight_of_live, bool count_live) {
  BFloat16* high = static_cast<BFloat16*>(chunk.shadow);
  int16_t* low = static_cast<int16_t*>(chunk.shadow_low);
  const BFloat16* live = static_cast<const BFloat16*>(chunk.live);
  const Weight<float> weight(weight_of_live);
  const int32_t count = static_cast<int32_t>(chunk.count);
  int64_t nonfinite = 0;
  for (int32_t begin = 0; begin < count; begin += kBlock) {
    const int32_t here = std::min(kBlock, count - begin), after = begin + here;
    prefetch_block<BFloat16, BFloat16>(chunk, after, next);
    if (after < count) {
      prefetch(low + after, std::min(kBlock, count - after) * sizeof(int16_t));
    } else {
      prefetch(next.shadow_low, std::min<int64_t>(next.count, kBlock) * low_bytes(next.kind));
    }
    const int32_t found = average_planes_block<kSkipNonfinite>(high + begin, low + begin, live + begin, here, weight);
    if (kSkipNonfinite && (found != 0 || weight.copies)) {
      const int32_t of_live = settle_planes_block(high + begin, low + begin, live + begin, here, weight.copies);
      nonfinite += found - (count_live ? 0 : of_live);
    }
  }
  return nonfinite;
}

EMA_FN void convert_planes_chunk(const Chunk& chunk) {
  BFloat16* __restrict high = static_cast<BFloat16*>(chunk.shadow);
  int16_t* __restrict low = static_cast<int16_t*>(chunk.shadow_low);
  const BFloat16* __restrict live = static_cast<const BFloat16*>(chunk.live);
  const int32_t count = static_cast<int32_t>(chunk.count);
  for (int32_t i = 0; i < count; ++i) {
    high[i] = high_plane(widen(live[i]));
    low[i] = 0;
  }
}

// What every shadow of a chunk is updated with.
struct Rule {
  double weight;
  bool skip_nonfinite;
  bool count_live;

  // A copy that lets everything through needs no shadow.
  template <class Op>
  EMA_FN bool converts(Kind kind) const {
    return kind >= kConvert || (!skip_nonfinite && Weight<Op>(weight).copies);
  }
};

EMA_FN int64_t run_planes_chunk(const Chunk& chunk, const Chunk& next, const Rule& rule) {
  if (rule.converts<float>(chunk.kind)) {
    convert_planes_chunk(chunk);
    return 0;
  }
  return rule.skip_nonfinite ? average_planes_chunk<true>(chunk, next, rule.weight, rule.count_live)
                             : average_planes_chunk<false>(chunk, next, rule.weight, false);
}

template <class Shadow, class Live>
EMA_FN void convert_chunk(const Chunk& chunk) {
  Shadow* __restrict shadow = static_cast<Shadow*>(chunk.shadow);
  const Live* __restrict live = static_cast<const Live*>(chunk.live);
  const int32_t count = static_cast<int32_t>(chunk.count);
  for (int32_t i = 0; i < count; ++i) {
    shadow[i] = converted_element<Shadow>(live[i]);
  }
}

template <class Shadow, class Live>
EMA_FN int64_t run_chunk(const Chunk& chunk, const Chunk& next, const Rule& rule) {
  if (rule.converts<Opmath<Shadow>>(chunk.kind)) {
    convert_chunk<Shadow, Live>(chunk);
    return 0;
  }
  return rule.skip_nonfinite ? average_chunk<true, Shadow, Live>(chunk, next, rule.weight, rule.count_live)
                             : average_chunk<false, Shadow, Live>(chunk, next, rule.weight, false);
}

template <class Shadow>
EMA_FN int64_t run_chunk_into(const Chunk& chunk, const Chunk& next, const Rule& rule) {
  switch (static_cast<Dtype>(chunk.kind % 4)) {
    case Dtype::kFloat32:
      return run_chunk<Shadow, float>(chunk, next, rule);
    case Dtype::kFloat64:
      return run_chunk<Shadow, double>(chunk, next, rule);
    case Dtype::kBFloat16:
      return run_chunk<Shadow, BFloat16>(chunk, next, rule);
    default:
      return run_chunk<Shadow, Float16>(chunk, next, rule);
  }
}

EMA_FN int64_t run_any_chunk(const Chunk& chunk, const Chunk& next, const Rule& rule) {
  if (chunk.kind == kCopyBytes) {
    std::memcpy(chunk.shadow, chunk.live, chunk.count);
    return 0;
  }
  switch (static_cast<Dtype>(chunk.kind % 32 / 4)) {
    case Dtype::kPlanes:
      return run_planes_chunk(chunk, next, rule);
    case Dtype::kFloat32:
      return run_chunk_into<float>(chunk, next, rule);
    case Dtype::kFloat64:
      return run_chunk_into<double>(chunk, next, rule);
    case Dtype::kBFloat16:
      return run_chunk_into<BFloat16>(chunk, next, rule);
    default:
      return run_chunk_into<Float16>(chunk, next, rule);
  }
}

// Chunks [begin, end) of args.shadows shadows, whose lists lie `count` apart. All shadows of a chunk in a row: its live
// values are read from memory once and then from the cache.
EMA_FN int64_t run_chunks(const Chunk* chunks, int64_t count, int64_t begin, int64_t end, const UpdateArgs& args) {
  int64_t nonfinite = 0;
  for (int64_t i = begin; i < end; ++i) {
    for (int k = 0; k < args.shadows; ++k) {
      // Behind the last shadow comes the next chunk of the first; behind the last of all nothing, so itself.
      const Chunk& next = k + 1 < args.shadows ? chunks[(k + 1) * count + i] : chunks[std::min(i + 1, count - 1)];
      const Rule rule{args.weights[k], args.skip_nonfinite, args.count_live && k == 0};
      nonfinite += run_any_chunk(chunks[k * count + i], next, rule);
    }
  }
  return nonfinite;
}

using RunChunks = int64_t (*)(const Chunk*, int64_t, int64_t, int64_t, const UpdateArgs&);

int64_t run_chunks_baseline(const Chunk* chunks, int64_t count, int64_t begin, int64_t end, const UpdateArgs& args) {
  return run_chunks(chunks, count, begin, end, args);
}

#if FASTEMA_X86_VARIANTS
__attribute__((target("avx2,fma,bmi2"))) int64_t run_chunks_avx2(const Chunk* chunks, int64_t count, int64_t begin,
                                                                 int64_t end, const UpdateArgs& args) {
  return run_chunks(chunks, count, begin, end, args);
}

__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2"))) int64_t
run_chunks_avx512(const Chunk* chunks, int64_t count, int64_t begin, int64_t end, const UpdateArgs& args) {
  return run_chunks(chunks, count, begin, end, args);
}
#endif

RunChunks run_chunks_for(Isa isa) {
#if FASTEMA_X86_VARIANTS
  if (isa == Isa::kAvx512) return run_chunks_avx512;
  if (isa == Isa::kAvx2) return run_chunks_avx2;
#endif
  (void)isa;
  return run_chunks_baseline;
}

Isa supported_isa() {
#if FASTEMA_X86_VARIANTS
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx2 && avx512 ? Isa::kAvx512 : avx2 ? Isa::kAvx2 : Isa::kBaseline;
#else
  return Isa::kBaseline;
#endif
}

void exchange_chunk(const Chunk& chunk) {
  constexpr size_t kBlock = 4096;  // stays in the first-level cache
  char buffer[kBlock];
  char* shadow = static_cast<char*>(chunk.shadow);
  char* live = static_cast<char*>(const_cast<void*>(chunk.live));
  const size_t bytes = static_cast<size_t>(chunk.count) * chunk.shadow_element_bytes;
  for (size_t begin = 0; begin < bytes; begin += kBlock) {
    const size_t size = std::min(kBlock, bytes - begin);
    std::memcpy(buffer, shadow + begin, size);
    std::memcpy(shadow + begin, live + begin, size);
    std::memcpy(live + begin, buffer, size);
  }
}

// A grain is what one thread takes at a time: 3 us from the cache, 13 us from memory.
constexpr int64_t kGrainBytes = 128 << 10;
// Below this, one thread: 32,768 floats, from where on torch's own operations share their work out as well.
constexpr int64_t kSerialGrains = 3;

// Calls run(begin, end) on all grains, ranges of chunks, and sums what it returns.
template <class Run>
int64_t share_out(const CpuChunks& work, int threads, Run run) {
  const int64_t grains = static_cast<int64_t>(work.grains.size()) - 1;
  if (threads <= 1 || grains < kSerialGrains) return run(int64_t{0}, work.count);
  const auto run_grain = [&](int64_t grain) { return run(work.grains[grain], work.grains[grain + 1]); };
  return work.sharing.sum(grains, threads, free_cores(), run_grain);
}

}  // namespace

CpuChunks::CpuChunks(std::vector<Chunk> list, int shadows)
    : chunks(std::move(list)), count(static_cast<int64_t>(chunks.size()) / shadows) {
  grains.push_back(0);
  int64_t bytes = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Chunk& chunk = chunks[i];
    // Every shadow is read and written, the live tensor read once.
    const int64_t shadow = shadow_bytes(chunk.kind) + low_bytes(chunk.kind);
    bytes += chunk.count * (2 * shadows * shadow + live_bytes(chunk.kind));
    if (bytes >= kGrainBytes || i + 1 == count) {
      grains.push_back(i + 1);
      bytes = 0;
    }
  }
}

Isa best_isa() {
  static const Isa best = [] {
    Isa isa = supported_isa();
    if (const char* wanted = std::getenv("FASTEMA_CPU_ISA")) {
      for (Isa lower : {Isa::kBaseline, Isa::kAvx2}) {
        if (std::strcmp(wanted, isa_name(lower)) == 0) isa = std::min(isa, lower);
      }
    }
    return isa;
  }();
  return best;
}

const char* isa_name(Isa isa) { return isa == Isa::kAvx512 ? "avx512" : isa == Isa::kAvx2 ? "avx2" : "baseline"; }

int64_t update_on_cpu(const CpuChunks& work, int first, const UpdateArgs& args, int threads, Isa isa) {
  const RunChunks run = run_chunks_for(std::min(isa, supported_isa()));
  const Chunk* chunks = work.chunks.data() + first * work.count;
  return share_out(work, threads,
                   [&](int64_t begin, int64_t end) { return run(chunks, work.count, begin, end, args); });
}

void exchange_on_cpu(const CpuChunks& work, int shadow, int threads) {
  const Chunk* chunks = work.chunks.data() + shadow * work.count;
  share_out(work, threads, [&](int64_t begin, int64_t end) {
    std::for_each(chunks + begin, chunks + end, exchange_chunk);
    return int64_t{0};
  });
}

}  // namespace fastema
