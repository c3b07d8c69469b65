// A float32 in two planes, over all 2^32 bit patterns: `planes`; with a stride as argument, over every so many.
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>

#include "ema_math.h"

using namespace fastema;

namespace {

bool is_right(uint32_t bits) {
  const float value = bits_float(bits);
  const BFloat16 high = high_plane(value);
  const int16_t low = low_plane(value);
  const uint32_t joined = float_bits(join_planes(high, low));
  if (is_nan(bits)) return joined == (0x7fc00000u | (bits & 0x80000000u)) && low == 0;
  // The nearest bfloat16; a tie is the one place where ties away from zero differ from a cast.
  const bool is_tie = (bits & 0xffffu) == 0x8000u;
  const uint32_t away = (bits >> 16) + 1;
  const bool is_nearest = is_tie ? static_cast<uint32_t>(high) == away : high == narrow_to_bfloat16(value);
  return joined == bits && is_nearest;
}

// What may be written to `high` while `low` is of another value: a NaN comes only from a NaN.
bool stale_low_is_right(uint32_t upper, int32_t low) {
  const uint32_t joined = float_bits(join_planes(static_cast<BFloat16>(upper), static_cast<int16_t>(low)));
  if (is_nan(upper << 16)) return is_nan(joined);
  const uint32_t sum = (upper << 16) + static_cast<uint32_t>(low);
  return joined == (is_nan(sum) ? upper << 16 : sum);
}

}  // namespace

int main(int count, char** arguments) {
  const uint64_t stride = count > 1 ? std::strtoull(arguments[1], nullptr, 10) : 1;
  uint64_t checked = 0, wrong = 0;
  for (uint64_t bits = 0; bits < uint64_t{1} << 32; bits += stride) {
    wrong += !is_right(static_cast<uint32_t>(bits));
    ++checked;
  }
  for (uint32_t upper = 0; upper < 65536; ++upper) {
    for (int32_t low : {-32768, -32767, -1, 0, 1, 32767}) wrong += !stale_low_is_right(upper, low);
  }
  std::printf("%" PRIu64 " patterns, %" PRIu64 " wrong\n", checked, wrong);
  return wrong == 0 && checked > 0 ? 0 : 1;
}
