// One element of every averaging rule, for host and device: the only place with the arithmetic.
//
//   shadow <- shadow + weight * (live - shadow)        weight = 1 - decay
//
// in the two-branch form of torch.lerp (aten/src/ATen/native/Lerp.h): from 0.5 on it is computed from the live end.
// Weight 1 copies, whatever the shadow is (lerp would keep its NaN), and weight 0 keeps. Always one fused multiply-add,
// so that every backend and every instruction set gives the same bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define EMA_FN __host__ __device__ __forceinline__
#else
#define EMA_FN inline __attribute__((always_inline))
#endif

namespace fastema {

// Storage formats only: all arithmetic happens in the opmath type. Enumerations, because a compiler knows them as
// numbers: it does not vectorise a loop that stores structs.
enum class BFloat16 : uint16_t {};
enum class Float16 : uint16_t {};

// The type an average is computed in, chosen by the shadow: double for double, else float.
template <class Shadow>
using Opmath = std::conditional_t<std::is_same_v<Shadow, double>, double, float>;

EMA_FN uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

EMA_FN float bits_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// ---- 16-bit formats. Widening is exact; narrowing rounds to nearest even. Branch-free, so that loops vectorise. ----

EMA_FN float widen(BFloat16 value) { return bits_float(static_cast<uint32_t>(value) << 16); }

// A NaN becomes 0x7fc0; by a GPU's own conversion 0x7fff.
EMA_FN BFloat16 narrow_to_bfloat16(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint16_t half;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(half) : "f"(value));
  return static_cast<BFloat16>(half);
#else
  const uint32_t bits = float_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return static_cast<BFloat16>(is_nan ? 0x7fc0u : rounded);
#endif
}

EMA_FN float widen(Float16 value) {
#if defined(__CUDA_ARCH__)  // the instruction itself: cuda_fp16.h takes longer to parse than all of this
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(static_cast<uint16_t>(value)));
  return wide;
#elif defined(__HIP_DEVICE_COMPILE__)
  return static_cast<float>(__builtin_bit_cast(_Float16, static_cast<uint16_t>(value)));
#else
  const uint32_t sign = (static_cast<uint32_t>(value) & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(value) & 0x7fffu;
  const uint32_t rebias = 112u << 23;  // 127 - 15
  const uint32_t normal = (magnitude << 13) + rebias + (magnitude >= 0x7c00u ? rebias : 0u);
  // A subnormal is magnitude * 2^-24, the spacing of floats in [0.5, 1): exact, and safe with denormals flushed.
  const uint32_t subnormal = float_bits(bits_float(0x3f000000u | magnitude) - 0.5f);
  return bits_float(sign | (magnitude < 0x400u ? subnormal : normal));
#endif
}

EMA_FN Float16 narrow_to_float16(float value) {
#if defined(__CUDA_ARCH__)
  uint16_t half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
  return static_cast<Float16>(half);
#elif defined(__HIP_DEVICE_COMPILE__)
  return static_cast<Float16>(__builtin_bit_cast(uint16_t, static_cast<_Float16>(value)));
#else
  const uint32_t bits = float_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= 0x47800000u ? 0x7c00u : half;  // 65536 and above; rounding carries the rest up to it
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return static_cast<Float16>(sign | half);
#endif
}

// Two at once in a word, `first` in its lower half: one instruction of a GPU.
template <class Stored>
EMA_FN uint32_t narrow_two(float first, float second) {
  constexpr bool kIsBFloat16 = std::is_same_v<Stored, BFloat16>;
  static_assert(kIsBFloat16 || std::is_same_v<Stored, Float16>, "a 16-bit format");
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t word;
  if constexpr (kIsBFloat16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  }
  return word;
#else
  if constexpr (kIsBFloat16) {
    return static_cast<uint32_t>(narrow_to_bfloat16(first)) | static_cast<uint32_t>(narrow_to_bfloat16(second)) << 16;
  } else {
    return static_cast<uint32_t>(narrow_to_float16(first)) | static_cast<uint32_t>(narrow_to_float16(second)) << 16;
  }
#endif
}

// ---- a float32 in two planes: `high` a bfloat16, `low` the rest, bits = (high << 16) + low ----
//
// `high` is the nearest bfloat16, ties away from zero. Every value joins to the bits that were split, but for a NaN,
// which becomes 0x7fc00000 or 0xffc00000. A value that rounds to infinity has an infinity in `high`, and joins exactly.

// `upper` is `high` in the upper half of a word, `low` has its sign extended. A user may have written a zero or an
// infinity to `high`: where that and a stale `low` make a NaN, `high` counts. A mask rather than a choice: gcc merges
// choices with those around them, and takes twice as long.
EMA_FN float join_planes(uint32_t upper, uint32_t low) {
  const float value = bits_float(upper + low);
  const uint32_t is_number = value == value;
  return bits_float(upper + (low & (0u - is_number)));
}

EMA_FN float join_planes(BFloat16 high, int16_t low) {
  return join_planes(static_cast<uint32_t>(high) << 16, static_cast<uint32_t>(static_cast<int32_t>(low)));
}

EMA_FN bool is_nan(uint32_t bits) { return static_cast<int32_t>(bits & 0x7fffffffu) > 0x7f800000; }

EMA_FN BFloat16 high_plane(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t quiet_nan = 0x7fc0u | ((bits >> 16) & 0x8000u);
  return static_cast<BFloat16>(is_nan(bits) ? quiet_nan : (bits + 0x8000u) >> 16);
}

EMA_FN int16_t low_plane(float value) {
  const uint32_t bits = float_bits(value);
  return static_cast<int16_t>(is_nan(bits) ? 0u : bits);  // bits - (high << 16) modulo 2^16
}

// Two at once, whose halves are words' halves: the planes of `first` in the lower ones. `first` and `second` are
// results of arithmetic, or bfloat16 values: no NaN but a GPU's own, 0x7fffffff, has bits in its lower half.
EMA_FN void split_two(float first, float second, uint32_t& highs, uint32_t& lows) {
  const auto quiet = [](float value) {
    const int32_t bits = static_cast<int32_t>(float_bits(value)), quiet_nan = 0x7fc00000;
    return static_cast<uint32_t>(bits < quiet_nan ? bits : quiet_nan);
  };
  const uint32_t lower = quiet(first), upper = quiet(second);
  highs = (lower + 0x8000u) >> 16 | ((upper + 0x8000u) & 0xffff0000u);
  lows = (lower & 0xffffu) | upper << 16;
}

// ---- between storage and opmath ----

template <class Op, class Stored>
EMA_FN Op load_as(Stored value) {
  if constexpr (std::is_same_v<Stored, BFloat16> || std::is_same_v<Stored, Float16>) {
    return static_cast<Op>(widen(value));
  } else {
    return static_cast<Op>(value);
  }
}

template <class Stored, class Op>
EMA_FN Stored store_as(Op value) {
  if constexpr (std::is_same_v<Stored, BFloat16>) {
    return narrow_to_bfloat16(static_cast<float>(value));
  } else if constexpr (std::is_same_v<Stored, Float16>) {
    return narrow_to_float16(static_cast<float>(value));
  } else {
    return static_cast<Stored>(value);
  }
}

EMA_FN bool is_finite(float value) { return (float_bits(value) & 0x7f800000u) != 0x7f800000u; }

EMA_FN bool is_finite(double value) {
  uint64_t bits;
  memcpy(&bits, &value, sizeof bits);
  return (bits & 0x7ff0000000000000ull) != 0x7ff0000000000000ull;
}

EMA_FN float fused_multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
EMA_FN double fused_multiply_add(double a, double b, double c) { return fma(a, b, c); }

// ---- the rule ----

// The weight of one update, split once per launch into what every element needs.
template <class Op>
struct Weight {
  Op coefficient;  // multiplies live - shadow
  bool from_live;  // what it is added to
  bool copies;     // weight 1: the live value itself, also over NaN, and a zero with its sign

  Weight() = default;
  EMA_FN explicit Weight(double weight_of_live) {
    const Op weight = static_cast<Op>(weight_of_live);
    from_live = !(weight < Op(0.5));
    coefficient = from_live ? weight - Op(1) : weight;
    copies = weight == Op(1);
  }
};

template <class Op>
EMA_FN Op averaged(Op shadow, Op live, Weight<Op> weight) {
  return fused_multiply_add(weight.coefficient, live - shadow, weight.from_live ? live : shadow);
}

// Under skip_nonfinite an average that is not finite is not stored; `averaged` is not, if the shadow or the live value
// is not. The element is counted, and keeps its shadow, unless that is what is not finite: then it takes the live
// value.
template <class Op>
EMA_FN bool takes_live(Op shadow, Op live, bool copies) {
  return is_finite(live) && (copies || !is_finite(shadow));
}

// A tensor that is copied into a shadow of another dtype.
template <class Shadow, class Live>
EMA_FN Shadow converted_element(Live live) {
  using Op = std::conditional_t<std::is_same_v<Shadow, double> || std::is_same_v<Live, double>, double, float>;
  return store_as<Shadow>(load_as<Op>(live));
}

}  // namespace fastema
