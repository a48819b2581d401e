"""The C++ text of products for a few tokens on a CPU, behind that of `native_vectors_qwen`.

A matrix is read from its first byte to its last, by each thread a part of its own: a core that reads several rows side
by side gets half of what the memory gives to one that reads on and on. Four rows times four vectors are the exception:
there the core's own work would take longer than reading, if each number were loaded for one product only.
"""

PRODUCTS = r"""
namespace {

// Has the cache read what is wanted soon: rows that lie side by side are too many places for the processor to foresee.
inline void fetch(const void *place) { __builtin_prefetch(place, 0, 2); }

// R rows of a matrix times B vectors, each of `columns` numbers. Several rows fetch those that come a block later.
template <int N> const int CHAINS_OF = N == 1 ? 4 : N == 2 ? 2 : 1;  // sums that don't wait for one another
template <int R, int B, class W>
inline void dots(const W *rows, const float *x, int64_t columns, float (&result)[R][B]) {
    const int CHAINS = CHAINS_OF<R * B>;
    vec acc[R][B][CHAINS][PIECES] = {};
    auto take = [&](int64_t at, int chain) {
        vec weights[R][PIECES];
        for (int r = 0; r < R; r++) {
            load_block(rows + r * columns + at, weights[r]);
            if (R > 1) fetch(rows + (r + BLOCK) * columns + at);
        }
        for (int p = 0; p < PIECES; p++)
            for (int b = 0; b < B; b++) {
                const vec values = load(x + b * columns + at + p * LANES);
                for (int r = 0; r < R; r++) acc[r][b][chain][p] += weights[r][p] * values;
            }
    };
    int64_t column = 0;
    for (; column + CHAINS * BLOCK <= columns; column += CHAINS * BLOCK)
        for (int chain = 0; chain < CHAINS; chain++) take(column + chain * BLOCK, chain);
    for (; column + BLOCK <= columns; column += BLOCK) take(column, 0);
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) {
            for (int chain = 1; chain < CHAINS; chain++)
                for (int p = 0; p < PIECES; p++) acc[r][b][0][p] += acc[r][b][chain][p];
            result[r][b] = sum_block(rows, acc[r][b][0]);
            for (int64_t n = column; n < columns; n++) result[r][b] += up(rows[r * columns + n]) * x[b * columns + n];
        }
}
// What `dots` takes of a product's vectors, and how it is made: once, and not for every row of the matrix.
template <class T> inline void prepare(const T *x, int64_t columns, float *wide) {
    int64_t column = 0;
    for (; column + BLOCK <= columns; column += BLOCK) {
        vec block[PIECES];
        load_block(x + column, block);
        for (int p = 0; p < PIECES; p++) store(wide + column + p * LANES, block[p]);
    }
    for (; column < columns; column++) wide[column] = up(x[column]);
}
template <class T> inline const float *prepared(const T *, const float *wide) { return wide; }
inline void prepare(const float *, int64_t, float *) {}
inline const float *prepared(const float *x, const float *) { return x; }
#ifdef __AVX512BF16__
inline void prepare(const bf16 *, int64_t, float *) {}
inline const bf16 *prepared(const bf16 *x, const float *) { return x; }
const __mmask32 WHOLE = 0xffffffffu;
inline __m512bh load_pairs(const bf16 *place, __mmask32 there) {
    return (__m512bh)(there == WHOLE ? _mm512_loadu_si512(place) : _mm512_maskz_loadu_epi16(there, place));
}
template <int R, int B> inline void dots(const bf16 *rows, const bf16 *x, int64_t columns, float (&result)[R][B]) {
    const int CHAINS = CHAINS_OF<R * B>, STEP = 2 * LANES;
    __m512 acc[R][B][CHAINS];
    for (int n = 0; n < R * B * CHAINS; n++) acc[n / CHAINS / B][n / CHAINS % B][n % CHAINS] = _mm512_setzero_ps();
    auto take = [&](int64_t at, int chain, __mmask32 there) {
        __m512bh weights[R];
        for (int r = 0; r < R; r++) {
            weights[r] = load_pairs(rows + r * columns + at, there);
            if (R > 1) fetch(rows + (r + BLOCK) * columns + at);
        }
        for (int b = 0; b < B; b++) {
            const __m512bh values = load_pairs(x + b * columns + at, there);
            for (int r = 0; r < R; r++) acc[r][b][chain] = _mm512_dpbf16_ps(acc[r][b][chain], weights[r], values);
        }
    };
    int64_t column = 0;
    for (; column + CHAINS * STEP <= columns; column += CHAINS * STEP)
        for (int chain = 0; chain < CHAINS; chain++) take(column + chain * STEP, chain, WHOLE);
    for (; column < columns; column += STEP) {
        const int64_t left = columns - column;
        take(column, 0, left >= STEP ? WHOLE : (1u << left) - 1);
    }
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) {
            for (int chain = 1; chain < CHAINS; chain++)
                acc[r][b][0] = _mm512_add_ps(acc[r][b][0], acc[r][b][chain]);
            result[r][b] = _mm512_reduce_add_ps(acc[r][b][0]);
        }
}
#endif

// Whether vectors become float before they are multiplied.
#ifdef __AVX512BF16__
template <class T> const bool WIDENED = std::is_same<T, f16>::value;
#else
template <class T> const bool WIDENED = sizeof(T) != sizeof(float);
#endif

struct Part { int64_t first, end; };

// The share of this thread in so many things, whole blocks of them.
inline Part share(int64_t count, int64_t block) {
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads(), blocks = (count + block - 1) / block;
    const int64_t first = blocks * thread / threads * block, end = blocks * (thread + 1) / threads * block;
    return {std::min(count, first), std::min(count, end)};
}

// As `products_qwen.Matrix`: of kind 0, (rows, columns) in the dtype of the states; of 8 or 4 as `bits_qwen` tells.
struct Adapter;
struct Matrix {
    const void *codes;
    const uint16_t *scales;
    const uint8_t *zeros;
    const void *bias;
    int64_t rows, columns, kind, group;
    const Adapter *adapter;  // for `native_steps_qwen` alone
};
// As `products_qwen.Adapter`: matrices of float, where it is wide, else of the dtype of the states.
struct Adapter {
    Matrix down, up;
    int64_t wide;
    double scale;
};

const int UNIT = 32;  // columns whose activations share a scale

// From so many vectors on they are many: a matrix of this kind is laid out anew for them, as `native_many_qwen` tells,
// in panels of so many rows and steps. Not below AVX2, where nobody has measured it.
const int64_t PANEL = 2 * LANES, DEPTH = 1024, LEAST_MANY = 8;
template <class T> inline int64_t least_many(int64_t kind) {
#if !defined(__AVX2__)
    return INT64_MAX;
#elif defined(__AVX512VNNI__)  // which multiplies codes as they are
    if (kind) return kind == 8 ? 12 : 16;
#endif
    if (kind == 0 && WIDENED<T>) return 12;
    return LEAST_MANY;
}

// What is made of a product's vectors before it. For a matrix of whole numbers they are rounded to 15 bits, as 128 high
// + low, for the products of bytes; for one of bfloat16 they may be wanted as float. And room for `native_many_qwen`.
struct Inputs {
    int8_t *high, *low;  // (batch, columns)
    float *scale;        // (batch, columns / UNIT)
    int32_t *sum;        // of 128 high + low in a unit
    float *wide;         // (batch, columns)
    vec *panel;          // (DEPTH, 2)
    float *totals;       // (batch, PANEL)
};
template <class T> Part product_of_many(const Matrix &m, const T *x, const Inputs &made, T *y, int64_t batch);

inline vec load_halves(const uint16_t *place) { return load((const f16 *)place); }

template <class T> void encode(const T *x, int64_t count, const Inputs &to) {
    for (int64_t unit = 0; unit < count / UNIT; unit++) {
        const T *part = x + unit * UNIT;
        vec size = {}, nothing[PIECES] = {};
        for (int column = 0; column < UNIT; column += LANES) {
            const vec some = load(part + column), other = some < 0 ? -some : some;
            size = size < other ? other : size;
            nothing[0] += some * 0.0f;
        }
        float greatest = 0, poison = sum(nothing);  // NaN where there is one, or an infinity
        for (int lane = 0; lane < LANES; lane++) greatest = std::max(greatest, size[lane]);
        float inverse = greatest > 0 && poison == 0 ? 16256.0f / greatest : 0.0f;
        int32_t total = 0;
        for (int column = 0; column < UNIT; column += LANES) {
            const float magic = 12582912.0f;
            ints whole = __builtin_convertvector((load(part + column) * inverse + magic) - magic, ints);
            ints high = (whole + 64) >> 7, low = whole - (high << 7);
            for (int lane = 0; lane < LANES; lane++) {
                to.high[unit * UNIT + column + lane] = (int8_t)high[lane];
                to.low[unit * UNIT + column + lane] = (int8_t)low[lane];
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
                      ints (&sums)[B][PIECES]) {
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
#elif defined(__AVX2__)
// The same by products of 16 bits: four columns of four rows at a time, of which a row's first and second two are added
// up apart.
template <int BITS, int B>
inline void unit_sums(const uint8_t *codes, const int8_t *const (&high)[B], const int8_t *const (&low)[B],
                      ints (&sums)[B][PIECES]) {
    int16_t values[B][UNIT];
    for (int b = 0; b < B; b++)
        for (int n = 0; n < UNIT; n += 16) {
            const __m256i upper = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(high[b] + n)));
            const __m256i lower = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(low[b] + n)));
            const __m256i both = _mm256_add_epi16(_mm256_slli_epi16(upper, 7), lower);
            _mm256_storeu_si256((__m256i *)(values[b] + n), both);
        }
    for (int quarters = 0; quarters < 2; quarters++) {  // 8 rows, whose sums the registers hold
        __m256i acc[B][2];
        for (int b = 0; b < B; b++) acc[b][0] = acc[b][1] = _mm256_setzero_si256();
        auto take = [&](__m128i weights, int quarter, int column) {
            const __m256i wide = _mm256_cvtepu8_epi16(weights);
            for (int b = 0; b < B; b++) {
                int64_t four;
                std::memcpy(&four, values[b] + column, sizeof four);
                const __m256i products = _mm256_madd_epi16(wide, _mm256_set1_epi64x(four));
                acc[b][quarter] = _mm256_add_epi32(acc[b][quarter], products);
            }
        };
        for (int n = 0; n < (BITS == 8 ? 8 : 4); n++)
            for (int quarter = 0; quarter < 2; quarter++) {
                const uint8_t *place = codes + 64 * n + 32 * quarters + 16 * quarter;
                const __m128i some = _mm_loadu_si128((const __m128i *)place), nibble = _mm_set1_epi8(15);
                take(BITS == 8 ? some : _mm_and_si128(some, nibble), quarter, 4 * n);
                if (BITS == 4) take(_mm_and_si128(_mm_srli_epi16(some, 4), nibble), quarter, 16 + 4 * n);
            }
        for (int b = 0; b < B; b++) {  // rows 0 1 4 5 2 3 6 7 of the pairs
            const __m256i mixed = _mm256_hadd_epi32(acc[b][0], acc[b][1]);
            const __m256i total = _mm256_permute4x64_epi64(mixed, 0xd8);
            std::memcpy((int32_t *)&sums[b] + 8 * quarters, &total, sizeof total);
        }
    }
}
#else
template <int BITS, int B>
inline void unit_sums(const uint8_t *codes, const int8_t *const (&high)[B], const int8_t *const (&low)[B],
                      ints (&sums)[B][PIECES]) {
    std::memset(sums, 0, sizeof sums);
    for (int n = 0; n < (BITS == 8 ? 8 : 4); n++)
        for (int j = 0; j < 4; j++)
            for (int lane = 0; lane < BLOCK; lane++) {
                const uint8_t code = codes[64 * n + 4 * lane + j];
                const int column = 4 * n + j, first = BITS == 8 ? code : code & 15, second = code >> 4;
                for (int b = 0; b < B; b++) {
                    int32_t total = first * (128 * high[b][column] + low[b][column]);
                    if (BITS == 4) total += second * (128 * high[b][column + 16] + low[b][column + 16]);
                    sums[b][lane / LANES][lane % LANES] += total;
                }
            }
}
#endif

inline ints zeros_of(const uint8_t *zeros) {
    octets codes;
    std::memcpy(&codes, zeros, sizeof codes);
    return __builtin_convertvector(codes, ints);
}

// The rows of a block of a matrix of whole numbers times B vectors.
template <int BITS, int B>
inline void block_dots(const Matrix &m, int64_t block, const Inputs &x, int64_t first, vec (&result)[B][PIECES]) {
    const int64_t units = m.columns / UNIT, per_group = m.group / UNIT, groups = m.columns / m.group;
    const int64_t bytes = UNIT * BLOCK * BITS / 8;
    const uint8_t *codes = (const uint8_t *)m.codes + block * units * bytes;
    std::memset(result, 0, sizeof result);
    for (int64_t group = 0; group < groups; group++) {
        const int64_t place = (block * groups + group) * BLOCK;
        ints zeros[PIECES];
        for (int p = 0; p < PIECES; p++)
            zeros[p] = m.zeros ? zeros_of(m.zeros + place + p * LANES) : ints{} + (BITS == 8 ? 128 : 8);
        vec part[B][PIECES] = {};
        for (int64_t unit = group * per_group; unit < (group + 1) * per_group; unit++) {
            const int8_t *high[B], *low[B];
            for (int b = 0; b < B; b++) {
                high[b] = x.high + (first + b) * m.columns + unit * UNIT;
                low[b] = x.low + (first + b) * m.columns + unit * UNIT;
            }
            ints sums[B][PIECES];
            unit_sums<BITS, B>(codes + unit * bytes, high, low, sums);
            for (int b = 0; b < B; b++) {
                const int64_t number = (first + b) * units + unit;
                for (int p = 0; p < PIECES; p++) {
                    const ints total = sums[b][p] - zeros[p] * x.sum[number];
                    part[b][p] += __builtin_convertvector(total, vec) * x.scale[number];
                }
            }
        }
        for (int p = 0; p < PIECES; p++) {
            const vec scales = load_halves(m.scales + place + p * LANES);
            for (int b = 0; b < B; b++) result[b][p] += part[b][p] * scales;
        }
    }
}

template <class T> inline void put_row(const Matrix &m, T *y, int64_t b, int64_t row, float value) {
    put(y + b * m.rows + row, m.bias ? value + up(((const T *)m.bias)[row]) : value);
}

template <int R, int B, class T, class X>
inline void put_dots(const Matrix &m, const X *vectors, T *y, int64_t first, int64_t row) {
    float result[R][B];
    dots<R, B>((const T *)m.codes + row * m.columns, vectors, m.columns, result);
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) put_row(m, y, first + b, row + r, result[r][b]);
}

// Rows `row` to `end` of the product for B vectors from the one of number `first`.
template <int B, class T>
void some_rows(const Matrix &m, const T *x, const Inputs &made, T *y, int64_t first, int64_t row, int64_t end) {
    if (m.kind == 0) {
        const auto *vectors = prepared(x, made.wide) + first * m.columns;
        const int TILE = PIECES == 1 && B == 4 ? 4 : 1;  // sums that 32 registers hold
        for (; row + TILE <= end; row += TILE) put_dots<TILE, B>(m, vectors, y, first, row);
        for (; row < end; row++) put_dots<1, B>(m, vectors, y, first, row);
        return;
    }
    for (; row < end; row += BLOCK) {
        vec result[B][PIECES];
        if (m.kind == 8)
            block_dots<8, B>(m, row / BLOCK, made, first, result);
        else
            block_dots<4, B>(m, row / BLOCK, made, first, result);
        for (int b = 0; b < B; b++)
            for (int lane = 0; lane < BLOCK && row + lane < end; lane++)
                put_row(m, y, first + b, row + lane, result[b][lane / LANES][lane % LANES]);
    }
}

// y (batch, rows) = x (batch, columns) times a matrix (rows, columns): the rows of this thread's share. A piece of the
// matrix that the core keeps is multiplied with all vectors before the next is read.
template <class T> Part product(const Matrix &m, const T *x, const Inputs &made, T *y, int64_t batch) {
#ifdef __AVX2__
    if (batch >= least_many<T>(m.kind)) return product_of_many(m, x, made, y, batch);
#endif
    for (int64_t b = 0; b < batch; b++) {
        const int64_t place = b * m.columns, unit = b * (m.columns / UNIT);
        if (m.kind) {
            Inputs one = made;
            one.high += place, one.low += place, one.scale += unit, one.sum += unit;
            encode(x + place, m.columns, one);
        } else
            prepare(x + place, m.columns, made.wide + place);
    }
    const Part part = share(m.rows, BLOCK);
    for (int64_t row = part.first; row < part.end; row += BLOCK) {
        const int64_t end = std::min(part.end, row + BLOCK);
        int64_t b = 0;
        // Of whole numbers, 32 registers hold the sums of eight.
        for (; PIECES == 1 && m.kind && b + 8 <= batch; b += 8) some_rows<8>(m, x, made, y, b, row, end);
        for (; b + 4 <= batch; b += 4) some_rows<4>(m, x, made, y, b, row, end);
        for (; b + 2 <= batch; b += 2) some_rows<2>(m, x, made, y, b, row, end);
        if (b < batch) some_rows<1>(m, x, made, y, b, row, end);
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

inline size_t inputs_room(int64_t batch, int64_t columns) {
    const size_t panels = batch < LEAST_MANY ? 0 : 2 * DEPTH * sizeof(vec) + batch * PANEL * sizeof(float);
    return batch * columns * (3 + sizeof(float)) + panels + 7 * 64;
}
inline Inputs inputs_in(Room &room, int64_t batch, int64_t columns) {
    const int64_t units = batch * (columns / UNIT), many = batch < LEAST_MANY ? 0 : batch;
    int8_t *high = room.take<int8_t>(batch * columns), *low = room.take<int8_t>(batch * columns);
    float *scale = room.take<float>(units);
    int32_t *sum = room.take<int32_t>(units);
    float *wide = room.take<float>(batch * columns);
    vec *panel = room.take<vec>(many ? 2 * DEPTH : 0);
    return {high, low, scale, sum, wide, panel, room.take<float>(many * PANEL)};
}

template <class T> int linear(const Matrix &m, const T *x, T *y, int64_t batch, int64_t threads) {
    bool short_of_memory = false;
    #pragma omp parallel num_threads(threads)
    {
        Room room(inputs_room(batch, m.columns));
        if (room.there())
            product(m, x, inputs_in(room, batch, m.columns), y, batch);
        else {
            #pragma omp atomic write
            short_of_memory = true;
        }
    }
    return short_of_memory;
}

template <class T> void put_codes(const uint8_t *codes, float zero, float scale, T *y) {  // of 16 columns
    for (int column = 0; column < 16; column += LANES) {
        octets some;
        std::memcpy(&some, codes + column, sizeof some);
        store(y + column, (__builtin_convertvector(some, vec) - zero) * scale);
    }
}

// One row, `lane` of a block, of a matrix of whole numbers as numbers again.
template <int BITS, class T> void decode_row(const Matrix &m, int64_t block, int64_t lane, T *y) {
    const int64_t units = m.columns / UNIT, unit_bytes = UNIT * BLOCK * BITS / 8, groups = m.columns / m.group;
    const uint8_t *codes = (const uint8_t *)m.codes + block * units * unit_bytes + 4 * lane;
    float scale = 0, zero = BITS == 8 ? 128 : 8;
    for (int64_t unit = 0; unit < units; unit++, codes += unit_bytes, y += UNIT) {
        if (unit * UNIT % m.group == 0) {
            const int64_t place = (block * groups + unit * UNIT / m.group) * BLOCK + lane;
            scale = up(f16{m.scales[place]});
            if (m.zeros) zero = m.zeros[place];
        }
        uint8_t some[UNIT];  // four columns of the row in every 64 bytes
        for (int n = 0; n < BITS; n++) std::memcpy(some + 4 * n, codes + 64 * n, 4);
        for (int n = 0; BITS == 4 && n < 16; n++) {
            some[16 + n] = some[n] >> 4;
            some[n] &= 15;
        }
        put_codes(some, zero, scale, y);
        put_codes(some + 16, zero, scale, y + 16);
    }
}

// Rows of a matrix of whole numbers as numbers again, 16 at a time from block `first`: (16 blocks, columns).
template <class T> void decode(const Matrix &m, T *y, int64_t first, int64_t blocks, int64_t threads) {
    #pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < blocks * BLOCK; n++) {
        if (m.kind == 8)
            decode_row<8>(m, first + n / BLOCK, n % BLOCK, y + n * m.columns);
        else
            decode_row<4>(m, first + n / BLOCK, n % BLOCK, y + n * m.columns);
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
PRODUCTS(float16, f16)

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
