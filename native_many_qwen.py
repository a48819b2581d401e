"""The C++ text of products for many tokens on a CPU, behind that of `native_products_qwen`.

torch's product brings a matrix into an order of its own before it multiplies, and so reads it twice; with few tokens
that takes most of the time. Here a part that the caches hold is brought into order while the next one comes from
memory. In float32 torch's products leave half of what an AVX-512 of AMD's can do.
"""

MANY = r"""
#ifdef __AVX2__
namespace {

// A panel is two vectors of rows of a matrix and some of its columns, so laid out that what is multiplied at one time
// lies together: of each step, which is one column or a pair of them, all rows. It is made of weights or codes as they
// come from memory, and stays in the caches while it is multiplied with all vectors, a tile of them at a time.
const int TOGETHER = LANES == 16 ? 12 : 6;  // vectors whose sums the registers hold
const int64_t RUN = 128;                // steps in one sum of float32, so that roundings add up less
const int64_t CHUNK = 1 << 22;          // bytes of vectors for which a panel is made once, which the caches hold

// One column a step.
template <class T> struct Steps {
    typedef float Number;  // of the vectors
    static const int COLUMNS = 1;
    static vec each(const float *x) { return *x - vec{}; }  // which, other than a sum, is no operation
    static vec last(const float *x) { return each(x); }
    static void add(vec &total, vec weights, vec x) { total += weights * x; }
    static vec row(const T *place) { return load(place); }
    template <class F> static vec step(F column, int64_t first) { return column(first); }
};
#ifdef __AVX512BF16__
// A pair of columns.
template <> struct Steps<bf16> {
    typedef bf16 Number;
    static const int COLUMNS = 2;
    static vec of(__m512i bits) { return (vec)_mm512_castsi512_ps(bits); }
    static vec each(const bf16 *x) {
        int32_t pair;
        std::memcpy(&pair, x, sizeof pair);
        return of(_mm512_set1_epi32(pair));
    }
    static vec last(const bf16 *x) { return of(_mm512_set1_epi32(x->bits)); }
    static void add(vec &total, vec weights, vec x) {
        total = (vec)_mm512_dpbf16_ps((__m512)total, (__m512bh)weights, (__m512bh)x);
    }
    static vec row(const bf16 *place) { return of(_mm512_loadu_si512(place)); }
    template <class F> static vec step(F column, int64_t first) {
        words sides[2];
        for (int side = 0; side < 2; side++) {
            bf16 rounded[LANES];
            halves bits;
            store(rounded, column(first + side));
            std::memcpy(&bits, rounded, sizeof bits);
            sides[side] = __builtin_convertvector(bits, words);
        }
        return (vec)(sides[0] | sides[1] << 16);
    }
};
#endif
template <class T> inline int64_t steps_of(int64_t columns) {
    return (columns + Steps<T>::COLUMNS - 1) / Steps<T>::COLUMNS;
}

// The numbers of two vectors in turn.
inline void interleave(vec a, vec b, vec &low, vec &high) {
#ifdef __AVX512F__
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    low = (vec)_mm512_permutex2var_ps((__m512)a, first, (__m512)b);
    high = (vec)_mm512_permutex2var_ps((__m512)a, _mm512_add_epi32(first, _mm512_set1_epi32(8)), (__m512)b);
#else
    const __m256 even = _mm256_unpacklo_ps((__m256)a, (__m256)b), odd = _mm256_unpackhi_ps((__m256)a, (__m256)b);
    low = (vec)_mm256_permute2f128_ps(even, odd, 0x20);
    high = (vec)_mm256_permute2f128_ps(even, odd, 0x31);
#endif
}
template <int ROUNDS = LANES> inline void transpose(vec (&square)[LANES]) {  // a round halves what is left
    if constexpr (ROUNDS > 1) {
        vec next[LANES];
        for (int n = 0; n < LANES / 2; n++) interleave(square[n], square[n + LANES / 2], next[2 * n], next[2 * n + 1]);
        transpose<ROUNDS / 2>(next);
        std::memcpy(square, next, sizeof square);
    }
}

// Of rows that lie `stride` numbers apart LANES steps: each step's numbers of all rows, zeros for what isn't there.
template <class T>
inline void lay_square(const T *place, int64_t stride, int64_t rows, int64_t columns, vec (&square)[LANES]) {
    const int64_t most = LANES * Steps<T>::COLUMNS;
    if (rows >= LANES && columns >= most) {
        for (int n = 0; n < LANES; n++) square[n] = Steps<T>::row(place + n * stride);
    } else {
        for (int n = 0; n < LANES; n++) {
            T some[most] = {};
            if (n < rows) std::memcpy(some, place + n * stride, std::min(most, columns) * sizeof(T));
            square[n] = Steps<T>::row(some);
        }
    }
    transpose(square);
}

// Weights of a panel from row and column on, as they are written.
template <class T> void lay(const Matrix &m, int64_t row, int64_t column, int64_t count, vec *panel) {
    const int64_t steps = steps_of<T>(count);
    const T *weights = (const T *)m.codes + column;
    for (int half = 0; half < 2; half++)
        for (int64_t first = 0; first < steps; first += LANES) {
            const int64_t at = row + half * LANES, done = first * Steps<T>::COLUMNS;
            vec square[LANES];
            lay_square(weights + at * m.columns + done, m.columns, m.rows - at, count - done, square);
            for (int64_t n = 0; n < LANES && first + n < steps; n++) panel[2 * (first + n) + half] = square[n];
        }
}

// The same of codes, which become numbers.
template <int BITS, class T> void lay_codes(const Matrix &m, int64_t row, int64_t column, int64_t count, vec *panel) {
    typedef Steps<T> S;
    const int64_t units = m.columns / UNIT, groups = m.columns / m.group, bytes = UNIT * BLOCK * BITS / 8;
    for (int half = 0; half < 2; half++) {
        const int64_t at = row + half * LANES, block = at / BLOCK, lane = at % BLOCK;
        if (at >= (m.rows + BLOCK - 1) / BLOCK * BLOCK) {
            for (int64_t n = 0; n < count / S::COLUMNS; n++) panel[2 * n + half] = vec{};
            continue;
        }
        for (int64_t first = column; first < column + count; first += UNIT) {
            const uint8_t *codes = (const uint8_t *)m.codes + (block * units + first / UNIT) * bytes + 4 * lane;
            const int64_t place = (block * groups + first / m.group) * BLOCK + lane;
            const vec scale = load_halves(m.scales + place);
            const ints zero = m.zeros ? zeros_of(m.zeros + place) : ints{} + (BITS == 8 ? 128 : 8);
            auto of_column = [&](int64_t n) {
                const int64_t byte = BITS == 4 ? n % 16 : n;
                words four;  // columns of each row
                std::memcpy(&four, codes + 64 * (byte / 4), sizeof four);
                const words code = four >> (uint32_t)(8 * (byte % 4) + (BITS == 4 ? n / 16 * 4 : 0));
                return __builtin_convertvector((ints)(code & (BITS == 4 ? 15u : 255u)) - zero, vec) * scale;
            };
            for (int64_t n = 0; n < UNIT; n += S::COLUMNS)
                panel[2 * ((first - column + n) / S::COLUMNS) + half] = S::step(of_column, n);
        }
    }
}
template <class T> void lay_panel(const Matrix &m, int64_t row, int64_t column, int64_t count, vec *panel) {
    if (m.kind == 0)
        lay<T>(m, row, column, count, panel);
    else if (m.kind == 8)
        lay_codes<8, T>(m, row, column, count, panel);
    else
        lay_codes<4, T>(m, row, column, count, panel);
}

// What the next panel is made of, which the cache reads while this one is multiplied.
class Ahead {
public:
    // steps, tiles: of the panel that is multiplied meanwhile.
    Ahead(const Matrix &m, size_t size, int64_t row, int64_t column, int64_t count, int64_t steps, int64_t tiles)
        : every(tiles > 8 ? 64 : 16), parts(tiles * std::max<int64_t>(1, steps / every)) {
        if (row >= m.rows) return;
        const bool whole = m.kind == 0;
        const int64_t unit = UNIT * BLOCK * m.kind / 8, rows = whole ? m.rows : (m.rows + BLOCK - 1) / BLOCK;
        const int64_t width = whole ? m.columns * size : m.columns / UNIT * unit;
        const int64_t first = whole ? row : row / BLOCK, most = whole ? PANEL : PANEL / BLOCK;
        const int64_t some = std::min(most, rows - first);
        length = whole ? count * size : count / UNIT * unit;
        skip = width - length;
        at = (const char *)m.codes + first * width + (whole ? column * size : column / UNIT * unit);
        end = at + (some - 1) * width + length;
        stop = at + length;
        lines = some * ((length + 63) / 64);
    }
    inline __attribute__((always_inline)) void part() {
        for (due += lines; due >= parts; due -= parts) {
            if (at >= end) return;
            fetch(at);
            if ((at += 64) >= stop) {
                at = stop + skip;
                stop = at + length;
            }
        }
    }
    const int64_t every;  // steps to the next part: short loops cost, and so do many lines at a time
private:
    const int64_t parts;
    const char *at = nullptr, *end = nullptr, *stop = nullptr;  // of all; of a row
    int64_t length = 0, skip = 0, lines = 0, due = 0;
};

// Where a tile's sums go: between panels to totals (tiles' vectors, PANEL), at the end to the product.
template <class T> struct Sums {
    const Matrix &m;
    T *y;  // of the tile's first vector
    float *totals;
    int64_t row;
    bool begun;
    template <int B> void keep(vec (&sums)[B][2]) {
        for (int b = 0; b < B; b++)
            for (int half = 0; half < 2; half++) {
                float *place = totals + b * PANEL + half * LANES;
                store(place, begun ? load(place) + sums[b][half] : sums[b][half]);
                sums[b][half] = vec{};
            }
        begun = true;
    }
    template <int B> void finish(const vec (&sums)[B][2]) const {
        const int64_t left = m.rows - row;
        const T *bias = m.bias ? (const T *)m.bias + row : nullptr;
        for (int b = 0; b < B; b++)
            for (int half = 0; half < 2; half++) {
                const float *before = totals + b * PANEL + half * LANES;
                const vec sum = begun ? load(before) + sums[b][half] : sums[b][half];
                T *to = y + b * m.rows + row;
                if (left >= PANEL)
                    store(to + half * LANES, bias ? sum + load(bias + half * LANES) : sum);
                else
                    for (int64_t r = half * LANES; r < std::min<int64_t>(left, (half + 1) * LANES); r++)
                        put(to + r, bias ? sum[r % LANES] + up(bias[r]) : sum[r % LANES]);
            }
    }
};

// Multiplies a panel with the B vectors of a tile, which lie `width` numbers apart.
template <int B, class T>
void add_tile(const vec *panel, const typename Steps<T>::Number *x, int64_t width, int64_t count, bool finishes,
              Sums<T> out, Ahead &ahead) {
    typedef Steps<T> S;
    const int64_t steps = count / S::COLUMNS, run = S::COLUMNS == 1 ? RUN : steps;
    const typename S::Number *vectors[(B + 2) / 3];  // each third one: the processor adds the width or two of them
    for (int b = 0; b < B; b += 3) vectors[b / 3] = x + b * width;
    vec sums[B][2] = {};
    int64_t step = 0;
    auto take = [&](int64_t end) {
        for (; step < end; step++) {
            for (int b = 0; b < B; b++) {
                const vec value = S::each(vectors[b / 3] + b % 3 * width);
                for (int half = 0; half < 2; half++) S::add(sums[b][half], panel[half], value);
            }
            for (int b = 0; b < B; b += 3) vectors[b / 3] += S::COLUMNS;
            panel += 2;
        }
    };
    for (int64_t end = 0; end < steps;) {
        if (end) out.keep(sums);
        end = std::min(steps, end + run);
        while (step + ahead.every <= end) {
            ahead.part();
            take(step + ahead.every);
        }
        take(end);
    }
    for (int b = 0; b < B && steps * S::COLUMNS < count; b++)
        for (int half = 0; half < 2; half++)
            S::add(sums[b][half], panel[half], S::last(vectors[b / 3] + b % 3 * width));
    if (finishes)
        out.finish(sums);
    else
        out.keep(sums);
}
template <int B, class T, class... Rest> void add_tile_of(int64_t count, Rest &&...rest) {
    if constexpr (B > 1)
        if (count < B) return add_tile_of<B - 1, T>(count, rest...);
    add_tile<B, T>(rest...);
}

// A panel's rows of the product for so many vectors; the panel behind it begins at `next_row`.
template <class T>
void panel_product(const Matrix &m, const typename Steps<T>::Number *x, T *y, int64_t row, int64_t vectors,
                   int64_t next_row, vec *panel, float *totals) {
    const int64_t tiles = (vectors + TOGETHER - 1) / TOGETHER, depth = DEPTH * Steps<T>::COLUMNS;
    for (int64_t column = 0; column < m.columns; column += depth) {
        const int64_t some = std::min(depth, m.columns - column), behind = column + depth;
        lay_panel<T>(m, row, column, some, panel);
        const bool ends = behind >= m.columns;
        const int64_t next = ends ? 0 : behind, count = std::min(depth, m.columns - next);
        Ahead ahead(m, sizeof(T), ends ? next_row : row, next, count, some / Steps<T>::COLUMNS, tiles);
        for (int64_t tile = 0; tile < tiles; tile++) {
            const int64_t first = vectors * tile / tiles, end = vectors * (tile + 1) / tiles;
            const Sums<T> out = {m, y + first * m.rows, totals + first * PANEL, row, column > 0};
            const auto *at = x + first * m.columns + column;
            add_tile_of<TOGETHER, T>(end - first, panel, at, m.columns, some, ends, out, ahead);
        }
    }
}

template <class T> inline const float *numbers_of(const T *, const float *wide) { return wide; }
inline const float *numbers_of(const float *x, const float *) { return x; }
#ifdef __AVX512BF16__
inline const bf16 *numbers_of(const bf16 *x, const float *) { return x; }
#endif

// As `product`.
template <class T> Part product_of_many(const Matrix &m, const T *x, const Inputs &made, T *y, int64_t batch) {
    for (int64_t n = 0; WIDENED<T> && n < batch * m.columns; n++) made.wide[n] = up(x[n]);
    const Part part = share(m.rows, PANEL);
    for (int64_t row = part.first; row < part.end; row += PANEL)
        panel_product(m, numbers_of(x, made.wide), y, row, batch, row + PANEL < part.end ? row + PANEL : m.rows,
                      made.panel, made.totals);
    return part;
}

// The same by all threads, for so many that each may have some of the vectors.
template <class T> int many(const Matrix &m, const T *x, T *y, int64_t batch, int64_t threads) {
    const int64_t panels = (m.rows + PANEL - 1) / PANEL;
    const int64_t fit = std::max<int64_t>(192, CHUNK / (m.columns * (int64_t)sizeof(typename Steps<T>::Number)));
    int64_t chunks = (batch + fit - 1) / fit;
    while (panels * chunks < 8 * threads && batch / (chunks + 1) >= 48) chunks++;  // something to do for each
    const int64_t most = (batch + chunks - 1) / chunks;
    Room shared(WIDENED<T> ? batch * m.columns * sizeof(float) : 0);
    float *wide = shared.take<float>(0);
    bool short_of_memory = !shared.there();
    #pragma omp parallel num_threads(threads)
    {
        Room room(2 * DEPTH * sizeof(vec) + most * PANEL * sizeof(float) + 2 * 64);
        vec *panel = room.take<vec>(2 * DEPTH);
        float *totals = room.take<float>(most * PANEL);
        if (!room.there()) {
            #pragma omp atomic write
            short_of_memory = true;
        }
        #pragma omp barrier
        if (!short_of_memory) {
            const Part numbers = share(WIDENED<T> ? batch * m.columns : 0, LANES);
            for (int64_t n = numbers.first; n < numbers.end; n++) wide[n] = up(x[n]);
            #pragma omp barrier
            const Part mine = share(panels * chunks, 1);
            for (int64_t task = mine.first; task < mine.end; task++) {
                const int64_t chunk = task % chunks, first = batch * chunk / chunks, end = batch * (chunk + 1) / chunks;
                const int64_t next = task + 1 < mine.end ? (task + 1) / chunks * PANEL : m.rows;
                panel_product(m, numbers_of(x, wide) + first * m.columns, y + first * m.rows, task / chunks * PANEL,
                              end - first, next, panel, totals);
            }
        }
    }
    return short_of_memory;
}

}  // namespace

#define MANY_OF(NAME, T)                                                                                        \
    extern "C" int qwen_many_##NAME(const Matrix *m, const void *x, void *y, int64_t batch, int64_t threads) {  \
        return many<T>(*m, (const T *)x, (T *)y, batch, threads);                                               \
    }
MANY_OF(float32, float)
#ifndef __AMX_BF16__  // whose products torch knows, and which are several times as fast as those of vectors
MANY_OF(bfloat16, bf16)
#endif
#ifndef __AVX512FP16__  // likewise
MANY_OF(float16, f16)
#endif
#endif
"""
