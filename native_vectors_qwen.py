"""The C++ text of what all kernels for a CPU have in common: numbers, vectors of them, and their sums.

It is text in a Python file because transformers takes along nothing else with the code of a model; `translating_qwen`
has the machine's own compiler translate it. It uses vectors as long as the processor's registers, in the notation that
GCC and Clang share: longer ones would lie in memory.
"""

VECTORS = r"""
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <omp.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
const int LANES = 16;
#elif defined(__AVX2__)
const int LANES = 8;
#else
const int LANES = 4;
#endif
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint8_t octets __attribute__((vector_size(LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
// Rows whose codes lie together, and numbers that are added up side by side, so that sums are the same to the last bit
// on every processor that multiplies and adds at once; and the vectors that hold so many.
const int BLOCK = 16, PIECES = BLOCK / LANES;

struct bf16 { uint16_t bits; };

inline float up(float value) { return value; }
inline float up(bf16 value) {
    uint32_t word = (uint32_t)value.bits << 16;
    float result;
    std::memcpy(&result, &word, 4);
    return result;
}
inline void put(float *place, float value) { *place = value; }
inline void put(bf16 *place, float value) {  // to the nearest, of two the even one
    uint32_t word;
    std::memcpy(&word, &value, 4);
    bool nan = (word & 0x7fffffff) > 0x7f800000;
    place->bits = nan ? 0x7fc0 : (uint16_t)((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}
template <class T> inline float rounded(float value) {
    T result;
    put(&result, value);
    return up(result);
}
inline vec load(const float *place) {
    vec result;
    std::memcpy(&result, place, sizeof result);
    return result;
}
inline vec load(const bf16 *place) {
    halves bits;
    std::memcpy(&bits, place, sizeof bits);
    ints words = __builtin_convertvector(bits, ints) << 16;
    vec result;
    std::memcpy(&result, &words, sizeof result);
    return result;
}
inline void store(float *place, vec value) { std::memcpy(place, &value, sizeof value); }
inline void store(bf16 *place, vec value) {
    words bits, odd;
    std::memcpy(&bits, &value, sizeof bits);
    odd = (bits >> 16) & 1;
    bits = (bits & 0x7fffffffu) > 0x7f800000u ? words{} + 0x7fc0u : (bits + 0x7fffu + odd) >> 16;
    const halves result = __builtin_convertvector(bits, halves);
    std::memcpy(place, &result, sizeof result);
}
// The lanes added up, half of them onto the other half, and so on.
inline float fold(vec value) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)value);
#elif defined(__AVX2__)
    __m128 half = _mm_add_ps(_mm256_castps256_ps128((__m256)value), _mm256_extractf128_ps((__m256)value, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
#else
    return (value[0] + value[2]) + (value[1] + value[3]);
#endif
}
inline float sum(const vec (&value)[PIECES]) {
    vec part[PIECES];
    std::memcpy(part, value, sizeof part);
    for (int half = PIECES / 2; half; half /= 2)
        for (int p = 0; p < half; p++) part[p] += part[p + half];
    return fold(part[0]);
}
#ifndef __AVX512BF16__
// The numbers of a block as vectors: with 8 lanes even and odd ones apart, which takes one instruction a vector, where
// those that lie side by side take two. A sum over such vectors adds the same pairs all the same.
const bool APART = LANES == 8;
inline void load_block(const bf16 *place, vec (&block)[PIECES]) {
    if (APART) {
        words pairs, even, odd;
        std::memcpy(&pairs, place, sizeof pairs);
        even = pairs << 16;
        odd = pairs & 0xffff0000u;
        std::memcpy(&block[0], &even, sizeof even);
        std::memcpy(&block[PIECES - 1], &odd, sizeof odd);
    } else {
        for (int p = 0; p < PIECES; p++) block[p] = load(place + p * LANES);
    }
}
inline float sum_block(const bf16 *, const vec (&value)[PIECES]) {  // of products with such numbers
    return APART ? fold(value[0]) + fold(value[PIECES - 1]) : sum(value);
}
#endif
inline void load_block(const float *place, vec (&block)[PIECES]) {
    for (int p = 0; p < PIECES; p++) block[p] = load(place + p * LANES);
}
inline float sum_block(const float *, const vec (&value)[PIECES]) { return sum(value); }
inline vec exponential(vec x) {  // to 2 units in the last place; 0 and infinity become the least and the greatest
    x = x < -87.0f ? vec{} - 87.0f : x;
    x = x > 88.0f ? vec{} + 88.0f : x;
    const float magic = 12582912.0f;  // adding it rounds to a whole number
    vec whole = (x * 1.44269504f + magic) - magic;
    vec rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    vec series = vec{} + 1.9875691500e-4f;
    series = series * rest + 1.3981999507e-3f;
    series = series * rest + 8.3334519073e-3f;
    series = series * rest + 4.1665795894e-2f;
    series = series * rest + 1.6666665459e-1f;
    series = series * rest + 5.0000001201e-1f;
    series = series * rest * rest + rest + 1.0f;
    ints power = (__builtin_convertvector(whole, ints) + 127) << 23;
    vec scale;
    std::memcpy(&scale, &power, sizeof scale);
    return series * scale;
}

}  // namespace
"""
