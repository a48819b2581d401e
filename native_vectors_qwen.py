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
#include <type_traits>
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
struct f16 { uint16_t bits; };

inline float up(float value) { return value; }
inline float up(bf16 value) {
    uint32_t word = (uint32_t)value.bits << 16;
    float result;
    std::memcpy(&result, &word, 4);
    return result;
}
inline float up(f16 value) {
#ifdef __F16C__
    return _cvtsh_ss(value.bits);
#else
    uint32_t sign = (uint32_t)(value.bits & 0x8000) << 16, rest = value.bits & 0x7fff, word;
    float result;
    if (rest < 0x400) {  // below the normal numbers, exact in float
        result = rest * 5.9604645e-8f;
        return sign ? -result : result;
    }
    word = sign | (rest < 0x7c00 ? (rest << 13) + 0x38000000u : (rest << 13) | 0x7f800000u);
    std::memcpy(&result, &word, 4);
    return result;
#endif
}
inline void put(float *place, float value) { *place = value; }
inline void put(f16 *place, float value) {  // to the nearest, of two the even one
#ifdef __F16C__
    place->bits = _cvtss_sh(value, 0);
#else
    uint32_t word;
    std::memcpy(&word, &value, 4);
    const uint32_t sign = word >> 16 & 0x8000, size = word & 0x7fffffff;
    if (size > 0x7f800000)
        place->bits = 0x7e00;  // no number
    else if (size >= 0x477ff000)  // halfway from the greatest to the next
        place->bits = sign | 0x7c00;
    else if (size >= 0x38800000)
        place->bits = sign | (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13;
    else {  // below the normal numbers: adding a half leaves their bits at the end, rounded
        float small;
        std::memcpy(&small, &size, 4);
        small += 0.5f;
        std::memcpy(&word, &small, 4);
        place->bits = sign | (word - 0x3f000000);
    }
#endif
}
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
inline vec load(const f16 *place) {
    vec result;
#if defined(__AVX512F__)
    const __m512 values = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)place));
    std::memcpy(&result, &values, sizeof result);
#elif defined(__AVX2__) && defined(__F16C__)
    const __m256 values = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)place));
    std::memcpy(&result, &values, sizeof result);
#else
    for (int lane = 0; lane < LANES; lane++) result[lane] = up(place[lane]);
#endif
    return result;
}
inline void store(float *place, vec value) { std::memcpy(place, &value, sizeof value); }
inline void store(f16 *place, vec value) {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i *)place, _mm512_cvtps_ph((__m512)value, 0));
#elif defined(__AVX2__) && defined(__F16C__)
    _mm_storeu_si128((__m128i *)place, _mm256_cvtps_ph((__m256)value, 0));
#else
    for (int lane = 0; lane < LANES; lane++) put(place + lane, value[lane]);
#endif
}
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
template <class T> inline void load_block(const T *place, vec (&block)[PIECES]) {
    for (int p = 0; p < PIECES; p++) block[p] = load(place + p * LANES);
}
template <class T> inline float sum_block(const T *, const vec (&value)[PIECES]) { return sum(value); }
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
