"""The C++ text of what the attention of a prompt passes back on a CPU, behind that of `native_prompt_qwen`.

Scores aren't kept: they are computed again, a square of queries and keys at a time, of which the logarithm of each
query's sum makes shares (Dao and others, FlashAttention, 2022). Squares in which nothing is seen are passed over.
"""

GRADIENTS = r"""
namespace {

struct Gradients {  // as `gradients_qwen.Gradients`
    const void *queries, *keys, *values, *result, *given;
    void *to_queries, *to_keys, *to_values;
    const float *logsums;  // (batch, heads, count)
    const uint8_t *seen;
    int64_t batch, heads, kv_heads, count, length, size, causal, strides[8][3];  // row, head and token of the first 8
    int64_t seen_row, seen_head, seen_query, threads;
    double scale;

    template <class T> T *at(void *place, int which, int64_t row, int64_t head) const {
        return (T *)place + row * strides[which][0] + head * strides[which][1];
    }
    template <class T> const T *at(const void *place, int which, int64_t row, int64_t head) const {
        return at<T>((void *)place, which, row, head);
    }
};

// The sides of a square: queries, in whole rows of a product, and keys, in whole vectors of one.
const int DOWN = LANES == 8 ? 60 : 64, ACROSS = 64;
static_assert(DOWN % Singles::ROWS == 0 && ACROSS % (Singles::WIDE * LANES) == 0, "no whole products");

inline int64_t whole(int64_t count, int64_t parts) { return (count + parts - 1) / parts * parts; }

// Two rows of a square to the pairs of its columns.
inline const float *paired(const float *rows, float *) { return rows; }
#ifdef __AVX512BF16__
inline const uint32_t *paired(const uint32_t *rows, uint32_t *room) {
    const uint16_t *from = (const uint16_t *)rows;
    for (int64_t q = 0; q < DOWN; q += 2)
        for (int64_t k = 0; k < ACROSS; k++)
            room[q / 2 * ACROSS + k] = from[q * ACROSS + k] | (uint32_t)from[(q + 1) * ACROSS + k] << 16;
    return room;
}
#endif

template <class W, int N, bool ADD>
void some_columns(const typename W::item *weights, int64_t step, int64_t next, const typename W::item *x, int64_t x_row,
                  int64_t depth, int64_t rows, float *to, int64_t to_row) {
    for (int64_t r = 0; r < rows; r += W::ROWS) {
        vec acc[W::ROWS][N] = {};
        tile<W, N>(weights, step, next, x + r * x_row, x_row, depth, acc);
        for (int n = 0; n < W::ROWS; n++)
            for (int v = 0; v < N; v++) {
                float *place = to + (r + n) * to_row + v * LANES;
                store(place, ADD ? acc[n][v] + load(place) : acc[n][v]);
            }
    }
}

// to (rows, vectors) = x (rows, depth) times weights, as `tile` has them, or what is there already and that.
template <class W, bool ADD>
void multiply(const typename W::item *weights, int64_t step, int64_t next, const typename W::item *x, int64_t x_row,
              int64_t depth, int64_t rows, int64_t vectors, float *to, int64_t to_row) {
    for (int64_t v = 0; v < vectors;) {
        const int64_t left = vectors - v, taken = left >= W::WIDE ? W::WIDE : left >= 2 ? 2 : 1;
        auto some = taken == 1 ? some_columns<W, 1, ADD> : taken == 2 ? some_columns<W, 2, ADD>
                                                                      : some_columns<W, W::WIDE, ADD>;
        some(weights + v * next, step, next, x, x_row, depth, rows, to + v * LANES, to_row);
        v += taken;
    }
}

enum Seen { NOTHING, SOME, ALL };

// Which keys of a square its queries see; `seen` are those of the head.
inline Seen look(const Gradients &a, const uint8_t *seen, int64_t query, int64_t key,
                 uint8_t (&visible)[DOWN][ACROSS]) {
    const int64_t rows = std::min<int64_t>(DOWN, a.count - query), columns = std::min<int64_t>(ACROSS, a.length - key);
    if (a.causal && query + rows - 1 < key) return NOTHING;
    if (!seen && columns == ACROSS && (!a.causal || query >= key + columns - 1)) return ALL;
    uint8_t any = 0;
    std::memset(visible, 0, sizeof visible);
    for (int64_t q = 0; q < rows; q++) {
        const int64_t open = a.causal ? std::min(columns, std::max<int64_t>(0, query + q + 1 - key)) : columns;
        if (seen) {
            std::memcpy(visible[q], seen + (query + q) * a.seen_query + key, open);
            for (int64_t k = 0; k < open; k++) any |= visible[q][k];
        } else {
            std::memset(visible[q], 1, open);
            any |= open > 0;
        }
    }
    return any ? SOME : NOTHING;
}

// Scores of a square and the products of values and what was given, both (DOWN, ACROSS), to shares and to what goes
// back to the scores, as rows of items in the same places.
template <class W>
void turn_back(float *scores, float *given, Seen sight, const uint8_t (&visible)[DOWN][ACROSS], const float *logsums,
               const float *sums, float scale) {
    typename W::item *shares = (typename W::item *)scores, *back = (typename W::item *)given;
    for (int64_t q = 0; q < DOWN; q++, shares += ACROSS / W::EACH, back += ACROSS / W::EACH)
        for (int64_t k = 0; k < ACROSS; k += LANES) {
            vec share = exponential(load(scores + q * ACROSS + k) * scale - logsums[q]);
            if (sight == SOME) {
                octets some;
                std::memcpy(&some, visible[q] + k, sizeof some);
                share = __builtin_convertvector(some, ints) != 0 ? share : vec{};
            }
            const vec passed = share * (load(given + q * ACROSS + k) - sums[q]) * scale;
            W::keep(shares, k, share);
            W::keep(back, k, passed);
        }
}

// A head's memory: queries and what was given as rows and as columns of items; sums of products of result and what was
// given; what goes back, in float32, keys and values by channels; keys and values of a square; and the square itself.
template <class T> struct Memory {
    typedef typename Form<T>::way W;
    typedef typename W::item item;
    // Queries; items, vectors and rows of a head; from channel to channel of columns and of keys, which is no power of
    // two, for places that are one apart share the room of a cache.
    int64_t down, depth, wide, tall, columns, across;
    item *queries, *given, *query_columns, *given_columns, *keys, *values, *key_rows, *pairs;
    float *logsums, *sums, *to_queries, *to_keys, *to_values, *scores, *passed;
    Room room;

    explicit Memory(const Gradients &a)
        : down(whole(a.count, DOWN)), depth(whole(a.size, W::EACH) / W::EACH), wide(whole(a.size, LANES) / LANES),
          tall(whole(a.size, W::ROWS)), columns(down / W::EACH + LANES), across(whole(a.length, ACROSS) + LANES),
          room(bytes()) {
        if (!room.there()) return;
        queries = room.take<item>(down * depth), given = room.take<item>(down * depth);
        query_columns = room.take<item>(tall * columns), given_columns = room.take<item>(tall * columns);
        keys = room.take<item>(ACROSS * depth), values = room.take<item>(ACROSS * depth);
        key_rows = room.take<item>(ACROSS / W::EACH * wide * LANES);
        pairs = room.take<item>(DOWN * ACROSS / W::EACH);
        logsums = room.take<float>(down), sums = room.take<float>(down);
        to_queries = room.take<float>(down * wide * LANES);
        to_keys = room.take<float>(tall * across), to_values = room.take<float>(tall * across);
        scores = room.take<float>(DOWN * ACROSS), passed = room.take<float>(DOWN * ACROSS);
    }

    size_t bytes() const {
        const int64_t items = 2 * down * depth + 2 * tall * columns + 2 * ACROSS * depth +
                              (ACROSS * wide * LANES + DOWN * ACROSS) / W::EACH;
        const int64_t floats = 2 * down + down * wide * LANES + 2 * tall * across + 2 * DOWN * ACROSS;
        return items * sizeof(item) + floats * sizeof(float) + 16 * 64;
    }
};

template <class T> inline float dot(const T *x, const T *y, int64_t size) {
    vec acc[PIECES] = {};
    int64_t c = 0;
    for (; c + BLOCK <= size; c += BLOCK)
        for (int p = 0; p < PIECES; p++) acc[p] += load(x + c + p * LANES) * load(y + c + p * LANES);
    float result = sum(acc);
    for (; c < size; c++) result += up(x[c]) * up(y[c]);
    return result;
}

// What all squares of a query head need of it.
template <class T> void read_head(const Gradients &a, Memory<T> &m, int64_t row, int64_t head) {
    typedef typename Memory<T>::W W;
    const T *queries = a.at<T>(a.queries, 0, row, head), *result = a.at<T>(a.result, 3, row, head);
    const T *given = a.at<T>(a.given, 4, row, head);
    const int64_t pairs = m.down / W::EACH;
    lay<W, false>(queries, a.strides[0][2], a.count, a.size, m.queries, m.down, m.depth, m.depth, 1);
    lay<W, false>(given, a.strides[4][2], a.count, a.size, m.given, m.down, m.depth, m.depth, 1);
    lay<W, true>(queries, a.strides[0][2], a.count, a.size, m.query_columns, pairs, m.tall, 1, m.columns);
    lay<W, true>(given, a.strides[4][2], a.count, a.size, m.given_columns, pairs, m.tall, 1, m.columns);
    for (int64_t n = 0; n < m.down; n++) {
        m.logsums[n] = n < a.count ? a.logsums[(row * a.heads + head) * a.count + n] : 0;
        m.sums[n] = n < a.count ? dot(result + n * a.strides[3][2], given + n * a.strides[4][2], a.size) : 0;
    }
    std::memset(m.to_queries, 0, m.down * m.wide * LANES * sizeof(float));
}

template <class T>
void add_square(const Gradients &a, Memory<T> &m, const uint8_t *seen, int64_t query, int64_t key) {
    typedef typename Memory<T>::W W;
    uint8_t visible[DOWN][ACROSS];
    const Seen sight = look(a, seen, query, key, visible);
    if (sight == NOTHING) return;
    const int64_t vectors = ACROSS / LANES;
    const auto *queries = m.queries + query * m.depth, *given = m.given + query * m.depth;
    multiply<W, false>(m.keys, LANES, m.depth * LANES, queries, m.depth, m.depth, DOWN, vectors, m.scores, ACROSS);
    multiply<W, false>(m.values, LANES, m.depth * LANES, given, m.depth, m.depth, DOWN, vectors, m.passed, ACROSS);
    turn_back<W>(m.scores, m.passed, sight, visible, m.logsums + query, m.sums + query, (float)a.scale);
    const auto *shares = (const typename W::item *)m.scores, *back = (const typename W::item *)m.passed;
    multiply<W, true>(paired(shares, m.pairs), ACROSS, LANES, m.given_columns + query / W::EACH, m.columns,
                      DOWN / W::EACH, m.tall, vectors, m.to_values + key, m.across);
    multiply<W, true>(paired(back, m.pairs), ACROSS, LANES, m.query_columns + query / W::EACH, m.columns,
                      DOWN / W::EACH, m.tall, vectors, m.to_keys + key, m.across);
    multiply<W, true>(m.key_rows, m.wide * LANES, LANES, back, ACROSS / W::EACH, ACROSS / W::EACH, DOWN, m.wide,
                      m.to_queries + query * m.wide * LANES, m.wide * LANES);
}

template <class T> void pass_back(const Gradients &a, Memory<T> &m, int64_t row, int64_t kv) {
    typedef typename Memory<T>::W W;
    const T *keys = a.at<T>(a.keys, 1, row, kv), *values = a.at<T>(a.values, 2, row, kv);
    const int64_t group = a.heads / a.kv_heads, key_step = a.strides[1][2], value_step = a.strides[2][2];
    std::memset(m.to_keys, 0, m.tall * m.across * sizeof(float));
    std::memset(m.to_values, 0, m.tall * m.across * sizeof(float));
    for (int64_t head = kv * group; head < (kv + 1) * group; head++) {
        const uint8_t *seen = a.seen ? a.seen + row * a.seen_row + head * a.seen_head : nullptr;
        read_head(a, m, row, head);
        for (int64_t key = 0; key < a.length; key += ACROSS) {
            const int64_t left = a.length - key;
            const T *some = keys + key * key_step;
            lay_lanes<W>(some, key_step, left, a.size, m.keys, ACROSS, m.depth);
            lay_lanes<W>(values + key * value_step, value_step, left, a.size, m.values, ACROSS, m.depth);
            lay<W, true>(some, key_step, left, a.size, m.key_rows, ACROSS / W::EACH, m.wide * LANES, m.wide * LANES, 1);
            for (int64_t query = 0; query < a.count; query += DOWN) add_square(a, m, seen, query, key);
        }
        T *to = a.at<T>(a.to_queries, 5, row, head);
        for (int64_t n = 0; n < a.count; n++)
            for (int64_t c = 0; c < a.size; c++)
                put(to + n * a.strides[5][2] + c, m.to_queries[n * m.wide * LANES + c]);
    }
    T *to_keys = a.at<T>(a.to_keys, 6, row, kv), *to_values = a.at<T>(a.to_values, 7, row, kv);
    for (int64_t key = 0; key < a.length; key++)
        for (int64_t c = 0; c < a.size; c++) {
            put(to_keys + key * a.strides[6][2] + c, m.to_keys[c * m.across + key]);
            put(to_values + key * a.strides[7][2] + c, m.to_values[c * m.across + key]);
        }
}

// A head of keys and values is one thread's, so that sums are the same whoever computes them.
template <class T> int gradients(const Gradients &a) {
    bool short_of_memory = false;
    const int64_t heads = a.batch * a.kv_heads, threads = std::max<int64_t>(1, std::min(a.threads, heads));
    #pragma omp parallel num_threads(threads)
    {
        Memory<T> mine(a);
        if (!mine.room.there()) {
            #pragma omp atomic write
            short_of_memory = true;
        }
        #pragma omp barrier
        #pragma omp for schedule(dynamic, 1)
        for (int64_t n = 0; n < heads; n++)
            if (!short_of_memory) pass_back(a, mine, n / a.kv_heads, n % a.kv_heads);
    }
    return short_of_memory;
}

}  // namespace

extern "C" int qwen_gradients_float32(const Gradients *a) { return gradients<float>(*a); }
extern "C" int qwen_gradients_bfloat16(const Gradients *a) { return gradients<bf16>(*a); }
extern "C" int qwen_gradients_float16(const Gradients *a) { return gradients<f16>(*a); }
"""
