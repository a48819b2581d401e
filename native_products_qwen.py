"""The C++ text of products for a few tokens on a CPU, which `native_qwen` has the machine's own compiler translate.

It is text in a Python file because transformers takes along nothing else with the code of a model. It uses vectors of
16 floats, in the notation that GCC and Clang share, which become whatever registers the processor has.

A matrix is read from its first byte to its last, by each thread a part of its own: a core that reads several rows side
by side gets half of what the memory gives to one that reads on and on.
"""

PRODUCTS = r"""
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <omp.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

typedef float vec __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef uint32_t fours __attribute__((vector_size(16)));
typedef uint8_t octets __attribute__((vector_size(16)));
typedef uint16_t halves __attribute__((vector_size(32)));
const int LANES = 16;

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
inline float sum(vec value) {
    float result = 0;
    for (int lane = 0; lane < LANES; lane++) result += value[lane];
    return result;
}
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

// A row of a matrix times B vectors, each of `columns` numbers.
template <int B, class T> inline void dots(const T *row, const T *x, int64_t columns, float (&result)[B]) {
    const int CHAINS = B == 1 ? 4 : B == 2 ? 2 : 1;  // sums that don't wait for one another
    vec acc[B][CHAINS] = {};
    int64_t column = 0;
    for (; column + CHAINS * LANES <= columns; column += CHAINS * LANES)
        for (int chain = 0; chain < CHAINS; chain++) {
            vec weights = load(row + column + chain * LANES);
            for (int b = 0; b < B; b++) acc[b][chain] += weights * load(x + b * columns + column + chain * LANES);
        }
    for (; column + LANES <= columns; column += LANES)
        for (int b = 0; b < B; b++) acc[b][0] += load(row + column) * load(x + b * columns + column);
    for (int b = 0; b < B; b++) {
        for (int chain = 1; chain < CHAINS; chain++) acc[b][0] += acc[b][chain];
        result[b] = sum(acc[b][0]);
        for (int64_t rest = column; rest < columns; rest++) result[b] += up(row[rest]) * up(x[b * columns + rest]);
    }
}
#ifdef __AVX512BF16__
template <int B> inline void dots(const bf16 *row, const bf16 *x, int64_t columns, float (&result)[B]) {
    const int CHAINS = B == 1 ? 4 : B == 2 ? 2 : 1, STEP = 2 * LANES;
    __m512 acc[B][CHAINS];
    for (int b = 0; b < B; b++)
        for (int chain = 0; chain < CHAINS; chain++) acc[b][chain] = _mm512_setzero_ps();
    int64_t column = 0;
    for (; column + CHAINS * STEP <= columns; column += CHAINS * STEP)
        for (int chain = 0; chain < CHAINS; chain++) {
            __m512bh weights = (__m512bh)_mm512_loadu_si512(row + column + chain * STEP);
            for (int b = 0; b < B; b++) {
                __m512bh values = (__m512bh)_mm512_loadu_si512(x + b * columns + column + chain * STEP);
                acc[b][chain] = _mm512_dpbf16_ps(acc[b][chain], weights, values);
            }
        }
    for (; column < columns; column += STEP) {
        int64_t left = columns - column;
        __mmask32 there = left >= STEP ? 0xffffffffu : (1u << left) - 1;
        __m512bh weights = (__m512bh)_mm512_maskz_loadu_epi16(there, row + column);
        for (int b = 0; b < B; b++) {
            __m512bh values = (__m512bh)_mm512_maskz_loadu_epi16(there, x + b * columns + column);
            acc[b][0] = _mm512_dpbf16_ps(acc[b][0], weights, values);
        }
    }
    for (int b = 0; b < B; b++) {
        for (int chain = 1; chain < CHAINS; chain++) acc[b][0] = _mm512_add_ps(acc[b][0], acc[b][chain]);
        result[b] = _mm512_reduce_add_ps(acc[b][0]);
    }
}
#endif

// As `products_qwen.Matrix`: of kind 0, (rows, columns) in the dtype of the states; of 8 or 4 as `bits_qwen` tells.
struct Matrix {
    const void *codes;
    const uint16_t *scales;
    const uint8_t *zeros;
    const void *bias;
    int64_t rows, columns, kind, group;
};

const int UNIT = 32;  // columns whose activations share a scale

// Activations for a matrix of whole numbers: to 15 bits, as 128 high + low, for the products of bytes.
struct Codes {
    int8_t *high, *low;  // (batch, columns)
    float *scale;        // (batch, columns / UNIT)
    int32_t *sum;        // of 128 high + low in a unit
};

inline float half(uint16_t bits) {
    uint32_t sign = (uint32_t)(bits & 0x8000) << 16, rest = bits & 0x7fff, word;
    float result;
    if (rest < 0x400) {  // below the normal numbers, exact in float
        result = rest * 5.9604645e-8f;
        return sign ? -result : result;
    }
    word = sign | (rest < 0x7c00 ? (rest << 13) + 0x38000000u : (rest << 13) | 0x7f800000u);
    std::memcpy(&result, &word, 4);
    return result;
}
inline vec load_halves(const uint16_t *place) {
    vec result;
#ifdef __AVX512F__
    __m512 values = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)place));
    std::memcpy(&result, &values, sizeof result);
#else
    for (int lane = 0; lane < LANES; lane++) result[lane] = half(place[lane]);
#endif
    return result;
}

template <class T> void encode(const T *x, int64_t count, const Codes &to) {
    for (int64_t unit = 0; unit < count / UNIT; unit++) {
        const T *part = x + unit * UNIT;
        vec first = load(part), second = load(part + LANES), size = first < 0 ? -first : first;
        vec other = second < 0 ? -second : second;
        size = size < other ? other : size;
        float greatest = 0, poison = sum((first + second) * 0.0f);  // NaN where there is one, or an infinity
        for (int lane = 0; lane < LANES; lane++) greatest = std::max(greatest, size[lane]);
        float inverse = greatest > 0 && poison == 0 ? 16256.0f / greatest : 0.0f;
        int32_t total = 0;
        for (int half = 0; half < 2; half++) {
            const float magic = 12582912.0f;
            ints whole = __builtin_convertvector(((half ? second : first) * inverse + magic) - magic, ints);
            ints high = (whole + 64) >> 7, low = whole - (high << 7);
            for (int lane = 0; lane < LANES; lane++) {
                to.high[unit * UNIT + half * LANES + lane] = (int8_t)high[lane];
                to.low[unit * UNIT + half * LANES + lane] = (int8_t)low[lane];
                total += whole[lane];
            }
        }
        to.scale[unit] = greatest * (1.0f / 16256.0f) + poison;
        to.sum[unit] = total;
    }
}

#ifdef __AVX512VNNI__
inline __m512i bytes_of(const int8_t *place) {  // four, in each lane
    int32_t word;
    std::memcpy(&word, place, 4);
    return _mm512_set1_epi32(word);
}
// Of a unit of 32 columns and 16 rows, the sums of codes times activations: high and low parts are added up apart.
template <int BITS, int B>
inline void unit_sums(const uint8_t *codes, const int8_t *const (&high)[B], const int8_t *const (&low)[B],
                      ints (&sums)[B]) {
    __m512i acc[B][2];
    for (int b = 0; b < B; b++) acc[b][0] = acc[b][1] = _mm512_setzero_si512();
    auto take = [&](__m512i weights, int column) {
        for (int b = 0; b < B; b++) {
            acc[b][0] = _mm512_dpbusd_epi32(acc[b][0], weights, bytes_of(high[b] + column));
            acc[b][1] = _mm512_dpbusd_epi32(acc[b][1], weights, bytes_of(low[b] + column));
        }
    };
    if (BITS == 8) {
        for (int n = 0; n < 8; n++) take(_mm512_loadu_si512(codes + 64 * n), 4 * n);
    } else {
        const __m512i nibble = _mm512_set1_epi8(15);
        for (int n = 0; n < 4; n++) {
            __m512i both = _mm512_loadu_si512(codes + 64 * n);
            take(_mm512_and_si512(both, nibble), 4 * n);
            take(_mm512_and_si512(_mm512_srli_epi16(both, 4), nibble), 16 + 4 * n);
        }
    }
    for (int b = 0; b < B; b++) {
        __m512i total = _mm512_add_epi32(_mm512_slli_epi32(acc[b][0], 7), acc[b][1]);
        std::memcpy(&sums[b], &total, sizeof total);
    }
}
#else
template <int BITS, int B>
inline void unit_sums(const uint8_t *codes, const int8_t *const (&high)[B], const int8_t *const (&low)[B],
                      ints (&sums)[B]) {
    for (int b = 0; b < B; b++) sums[b] = ints{};
    for (int n = 0; n < (BITS == 8 ? 8 : 4); n++)
        for (int j = 0; j < 4; j++) {
            ints first, second;
            for (int lane = 0; lane < LANES; lane++) {
                uint8_t code = codes[64 * n + 4 * lane + j];
                first[lane] = BITS == 8 ? code : code & 15;
                second[lane] = code >> 4;
            }
            for (int b = 0; b < B; b++) {
                int column = 4 * n + j;
                sums[b] += first * (128 * high[b][column] + low[b][column]);
                if (BITS == 4) sums[b] += second * (128 * high[b][column + 16] + low[b][column + 16]);
            }
        }
}
#endif

inline ints zeros_of(const uint8_t *zeros) {
    octets codes;
    std::memcpy(&codes, zeros, sizeof codes);
    return __builtin_convertvector(codes, ints);
}

// 16 rows of a matrix of whole numbers times B vectors.
template <int BITS, int B>
inline void block_dots(const Matrix &m, int64_t block, const Codes &x, int64_t first, vec (&result)[B]) {
    const int64_t units = m.columns / UNIT, per_group = m.group / UNIT, groups = m.columns / m.group;
    const int64_t bytes = UNIT * LANES * BITS / 8;
    const uint8_t *codes = (const uint8_t *)m.codes + block * units * bytes;
    for (int b = 0; b < B; b++) result[b] = vec{};
    for (int64_t group = 0; group < groups; group++) {
        const int64_t place = (block * groups + group) * LANES;
        const ints zeros = m.zeros ? zeros_of(m.zeros + place) : ints{} + (BITS == 8 ? 128 : 8);
        vec part[B] = {};
        for (int64_t unit = group * per_group; unit < (group + 1) * per_group; unit++) {
            const int8_t *high[B], *low[B];
            for (int b = 0; b < B; b++) {
                high[b] = x.high + (first + b) * m.columns + unit * UNIT;
                low[b] = x.low + (first + b) * m.columns + unit * UNIT;
            }
            ints sums[B];
            unit_sums<BITS, B>(codes + unit * bytes, high, low, sums);
            for (int b = 0; b < B; b++) {
                const int64_t number = (first + b) * units + unit;
                part[b] += __builtin_convertvector(sums[b] - zeros * x.sum[number], vec) * x.scale[number];
            }
        }
        const vec scales = load_halves(m.scales + place);
        for (int b = 0; b < B; b++) result[b] += part[b] * scales;
    }
}

template <class T> inline void put_row(const Matrix &m, T *y, int64_t b, int64_t row, float value) {
    put(y + b * m.rows + row, m.bias ? value + up(((const T *)m.bias)[row]) : value);
}

// Rows `row` to `end` of the product for B vectors from the one of number `first`.
template <int B, class T>
void some_rows(const Matrix &m, const T *x, const Codes &codes, T *y, int64_t first, int64_t row, int64_t end) {
    if (m.kind == 0) {
        for (; row < end; row++) {
            float result[B];
            dots<B>((const T *)m.codes + row * m.columns, x + first * m.columns, m.columns, result);
            for (int b = 0; b < B; b++) put_row(m, y, first + b, row, result[b]);
        }
        return;
    }
    for (; row < end; row += LANES) {
        vec result[B];
        if (m.kind == 8)
            block_dots<8, B>(m, row / LANES, codes, first, result);
        else
            block_dots<4, B>(m, row / LANES, codes, first, result);
        for (int b = 0; b < B; b++)
            for (int lane = 0; lane < LANES && row + lane < end; lane++)
                put_row(m, y, first + b, row + lane, result[b][lane]);
    }
}

struct Part { int64_t first, end; };

// The share of this thread in so many things, whole blocks of them.
inline Part share(int64_t count, int64_t block) {
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads(), blocks = (count + block - 1) / block;
    const int64_t first = blocks * thread / threads * block, end = blocks * (thread + 1) / threads * block;
    return {std::min(count, first), std::min(count, end)};
}

// y (batch, rows) = x (batch, columns) times a matrix (rows, columns): the rows of this thread's share. A piece of the
// matrix that the core keeps is multiplied with all vectors before the next is read.
template <class T> Part product(const Matrix &m, const T *x, const Codes &codes, T *y, int64_t batch) {
    if (m.kind)
        for (int64_t b = 0; b < batch; b++)
            encode(x + b * m.columns, m.columns,
                   {codes.high + b * m.columns, codes.low + b * m.columns, codes.scale + b * (m.columns / UNIT),
                    codes.sum + b * (m.columns / UNIT)});
    const Part part = share(m.rows, LANES);
    for (int64_t row = part.first; row < part.end; row += LANES) {
        const int64_t end = std::min(part.end, row + LANES);
        int64_t b = 0;
        for (; b + 8 <= batch; b += 8) some_rows<8>(m, x, codes, y, b, row, end);
        for (; b + 4 <= batch; b += 4) some_rows<4>(m, x, codes, y, b, row, end);
        for (; b + 2 <= batch; b += 2) some_rows<2>(m, x, codes, y, b, row, end);
        if (b < batch) some_rows<1>(m, x, codes, y, b, row, end);
    }
    return part;
}

// Memory in one piece, handed out in parts that begin on a cache line of their own.
class Room {
public:
    explicit Room(size_t bytes) : start((char *)std::malloc(bytes + 64)), at(start) {}
    ~Room() { std::free(start); }
    bool there() const { return start; }
    template <class T> T *take(int64_t count) {
        at = (char *)(((uintptr_t)at + 63) & ~(uintptr_t)63);
        T *place = (T *)at;
        at += count * sizeof(T);
        return place;
    }
private:
    char *start, *at;
};

inline size_t codes_room(int64_t batch, int64_t columns) { return batch * columns * 3 + 4 * 64; }
inline Codes codes_in(Room &room, int64_t batch, int64_t columns) {
    const int64_t units = batch * (columns / UNIT);
    int8_t *high = room.take<int8_t>(batch * columns), *low = room.take<int8_t>(batch * columns);
    float *scale = room.take<float>(units);
    return {high, low, scale, room.take<int32_t>(units)};
}

template <class T> int linear(const Matrix &m, const T *x, T *y, int64_t batch, int64_t threads) {
    bool short_of_memory = false;
    #pragma omp parallel num_threads(threads)
    {
        Room room(m.kind ? codes_room(batch, m.columns) : 0);
        if (room.there())
            product(m, x, m.kind ? codes_in(room, batch, m.columns) : Codes{}, y, batch);
        else {
            #pragma omp atomic write
            short_of_memory = true;
        }
    }
    return short_of_memory;
}

inline fours words_at(const uint8_t *place) {  // of one row in four vectors of 16
    uint32_t word[4];
    for (int n = 0; n < 4; n++) std::memcpy(word + n, place + 64 * n, 4);
    return fours{word[0], word[1], word[2], word[3]};
}

// One row, `lane` of a block, of a matrix of whole numbers as numbers again.
template <int BITS, class T> void decode_row(const Matrix &m, int64_t block, int64_t lane, T *y) {
    const int64_t units = m.columns / UNIT, unit_bytes = UNIT * LANES * BITS / 8, groups = m.columns / m.group;
    const uint8_t *codes = (const uint8_t *)m.codes + block * units * unit_bytes + 4 * lane;
    float scale = 0, zero = BITS == 8 ? 128 : 8;
    for (int64_t unit = 0; unit < units; unit++, codes += unit_bytes, y += UNIT) {
        if (unit * UNIT % m.group == 0) {
            const int64_t place = (block * groups + unit * UNIT / m.group) * LANES + lane;
            scale = half(m.scales[place]);
            if (m.zeros) zero = m.zeros[place];
        }
        octets low = (octets)words_at(codes), high = BITS == 8 ? (octets)words_at(codes + 4 * 64) : low >> 4;
        if (BITS == 4) low &= 15;
        store(y, (__builtin_convertvector(low, vec) - zero) * scale);
        store(y + LANES, (__builtin_convertvector(high, vec) - zero) * scale);
    }
}

// Rows of a matrix of whole numbers as numbers again, 16 at a time from block `first`: (16 blocks, columns).
template <class T> void decode(const Matrix &m, T *y, int64_t first, int64_t blocks, int64_t threads) {
    #pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < blocks * LANES; n++) {
        if (m.kind == 8)
            decode_row<8>(m, first + n / LANES, n % LANES, y + n * m.columns);
        else
            decode_row<4>(m, first + n / LANES, n % LANES, y + n * m.columns);
    }
}

}  // namespace

#define PRODUCTS(NAME, T)                                                                                          \
    extern "C" int qwen_linear_##NAME(const Matrix *m, const void *x, void *y, int64_t batch, int64_t threads) {   \
        return linear<T>(*m, (const T *)x, (T *)y, batch, threads);                                                \
    }                                                                                                              \
    extern "C" void qwen_decode_##NAME(const Matrix *m, void *y, int64_t first, int64_t blocks, int64_t threads) { \
        decode<T>(*m, (T *)y, first, blocks, threads);                                                             \
    }
PRODUCTS(float32, float)
PRODUCTS(bfloat16, bf16)

// Of pieces of memory, each a whole number of words and less than one more: the sum of their words, each brought down
// onto itself and times an odd number of its own. All are read once, from one end to the other, by each thread a part.
extern "C" void qwen_checksums(const uint8_t *const *pieces, const int64_t *lengths, int64_t count, uint64_t *sums,
                               int64_t threads) {
    std::memset(sums, 0, count * sizeof *sums);
    #pragma omp parallel num_threads(threads)
    for (int64_t piece = 0; piece < count; piece++) {
        const int64_t words = lengths[piece] / 8;
        const Part mine = share(words, 512);
        uint64_t total = 0, last = 0;
        for (int64_t n = mine.first; n < mine.end; n++) {
            int64_t word;
            std::memcpy(&word, pieces[piece] + 8 * n, sizeof word);
            total += (uint64_t)(word ^ (word >> 29)) * (uint64_t)(2 * n + 1);
        }
        if (omp_get_thread_num() == 0) {
            std::memcpy(&last, pieces[piece] + 8 * words, lengths[piece] % 8);
            total += last * (uint64_t)(2 * words + 1);
        }
        #pragma omp atomic
        sums[piece] += total;
    }
}
"""
