"""The C++ text of the attention and the rotation of a prompt on a CPU, behind that of `native_steps_qwen`."""

PROMPT = r"""
namespace {

struct Prompt {  // as `prompt_qwen.Prompt`
    const void *queries, *keys, *values;
    void *result;
    const uint8_t *seen;
    int64_t batch, heads, kv_heads, count, length, size, causal;
    int64_t query_row, query_head, query_token, key_row, key_head, key_token, value_row, value_head, value_token;
    int64_t result_row, result_head, result_token, seen_row, seen_head, seen_query, threads;
    double scale;
};

// How numbers lie for a product: one by one in float32, or two by two in bfloat16; and rows times vectors of what
// registers hold, of which there are 32 or 16, so that what is read again and again stays in the nearest cache.
struct Singles {
    typedef float item;
    static const int EACH = 1, ROWS = LANES == 16 ? 8 : LANES == 8 ? 6 : 4, WIDE = 2;
    static inline vec add(vec acc, const item *weights, item x) { return acc + load(weights) * x; }
    template <class T> static void copy(const T *from, item *to, int64_t stride) { *to = up(*from); }
    static inline void keep(item *place, int64_t n, vec shares) { store(place + n, shares); }
};
#ifdef __AVX512BF16__
struct Pairs {
    typedef uint32_t item;
    static const int EACH = 2, ROWS = 4, WIDE = 4;
    static inline vec add(vec acc, const item *weights, item x) {
        const __m512bh two = (__m512bh)_mm512_loadu_si512(weights), same = (__m512bh)_mm512_set1_epi32(x);
        return (vec)_mm512_dpbf16_ps((__m512)acc, two, same);
    }
    static void copy(const bf16 *from, item *to, int64_t stride) { *to = from->bits | (item)from[stride].bits << 16; }
    static inline void keep(item *place, int64_t n, vec shares) { store((bf16 *)place + n, shares); }
};
template <class T> struct Form { typedef Singles way; };
template <> struct Form<bf16> { typedef Pairs way; };
#else
template <class T> struct Form { typedef Singles way; };
#endif

const int TILE = 64, QUERIES = LANES == 8 ? 36 : 32;  // keys that are multiplied together, and queries of a block

// acc (W::ROWS, N vectors) += x (ROWS, depth) times weights, of which a step of depth lies `step` items from the last.
template <class W, int N>
inline void tile(const typename W::item *weights, int64_t step, int64_t next, const typename W::item *x, int64_t x_row,
                 int64_t depth, vec (&acc)[W::ROWS][N]) {
    for (int64_t d = 0; d < depth; d++, weights += step)
        for (int n = 0; n < N; n++)
            for (int r = 0; r < W::ROWS; r++) acc[r][n] = W::add(acc[r][n], weights + n * next, x[r * x_row + d]);
}

template <class T> struct Block {
    typedef typename Form<T>::way W;
    typedef typename W::item item;
    int64_t depth, padded, wide, steps;  // items of a head; keys in whole tiles; vectors of a head; items of a key row
    item *keys, *values;                 // (padded / LANES, depth, LANES); (steps, wide, LANES), of a head, for all
    item *queries;                       // (QUERIES, depth)
    float *scores;                       // (QUERIES, padded), whose beginnings the shares take
};

// Part of the keys and values of a head as tiles read them.
template <class T> void pack(const Prompt &a, const Block<T> &b, int64_t row, int64_t kv) {
    typedef typename Block<T>::W W;
    const T *keys = (const T *)a.keys + row * a.key_row + kv * a.key_head;
    const T *values = (const T *)a.values + row * a.value_row + kv * a.value_head;
    const Part mine = share(b.padded, LANES);
    for (int64_t token = mine.first; token < mine.end; token++)
        for (int64_t d = 0; d < b.depth; d++) {
            typename W::item *to = b.keys + (token / LANES * b.depth + d) * LANES + token % LANES;
            T some[2] = {};
            for (int n = 0; n < W::EACH && token < a.length && d * W::EACH + n < a.size; n++)
                some[n] = keys[token * a.key_token + d * W::EACH + n];
            W::copy(some, to, 1);
        }
    for (int64_t step = mine.first / W::EACH; step < mine.end / W::EACH; step++)
        for (int64_t c = 0; c < b.wide * LANES; c++) {
            T some[2] = {};
            for (int n = 0; n < W::EACH && c < a.size && step * W::EACH + n < a.length; n++)
                some[n] = values[(step * W::EACH + n) * a.value_token + c];
            W::copy(some, b.values + step * b.wide * LANES + c, 1);
        }
}

// One more than the last key that a query of a block sees.
inline int64_t limit_of(const Prompt &a, const uint8_t *seen, int64_t first, int64_t count) {
    if (a.causal) return std::min(a.length, first + count);
    int64_t limit = seen ? 1 : a.length;
    for (int64_t n = first; seen && n < first + count; n++)
        for (int64_t key = a.length; key > limit; key--)
            if (seen[n * a.seen_query + key - 1]) limit = key;
    return limit;
}

// Scores of a query to shares of the values, in their place, not divided by what is returned.
template <class W>
float shares_of(float *scores, int64_t limit, int64_t padded, int64_t visible, const uint8_t *seen, float scale) {
    const float least = -3.4028234e38f;
    vec greatest = vec{} + least;
    for (int64_t n = visible; n < padded; n++) scores[n] = least;
    if (seen)
        for (int64_t n = 0; n < visible; n++)
            if (!seen[n]) scores[n] = least / scale;
    for (int64_t n = 0; n < padded; n += LANES) {
        const vec some = load(scores + n) * scale;
        greatest = greatest > some ? greatest : some;
    }
    float top = least;
    for (int lane = 0; lane < LANES; lane++) top = std::max(top, greatest[lane]);
    vec total[PIECES] = {};
    for (int64_t n = 0; n < padded; n += LANES) {
        vec some = exponential(load(scores + n) * scale - top);
        for (int lane = 0; n + LANES > limit && lane < LANES; lane++)
            if (n + lane >= limit) some[lane] = 0;
        total[n / LANES % PIECES] += some;
        W::keep((typename W::item *)scores, n, some);
    }
    return sum(total);
}

template <class T, int N>
void put_values(const Prompt &a, const Block<T> &b, T *to, int64_t rows, int64_t r, int64_t c, int64_t steps,
                const float *totals) {
    typedef typename Block<T>::W W;
    const auto *shares = (typename W::item *)(b.scores + r * b.padded);
    vec acc[W::ROWS][N] = {};
    tile<W, N>(b.values + c * LANES, b.wide * LANES, LANES, shares, b.padded, steps, acc);
    for (int n = 0; n < W::ROWS && r + n < rows; n++)
        for (int v = 0; v < N; v++) {
            const vec some = acc[n][v] * (1.0f / totals[r + n]);
            T *place = to + (r + n) * a.result_token + (c + v) * LANES;
            if ((c + v + 1) * LANES <= a.size)
                store(place, some);
            else
                for (int lane = 0; (c + v) * LANES + lane < a.size; lane++) put(place + lane, some[lane]);
        }
}

// The queries `first` and following of a head.
template <class T> void attend_block(const Prompt &a, const Block<T> &b, int64_t row, int64_t head, int64_t first) {
    typedef typename Block<T>::W W;
    const int64_t rows = std::min((int64_t)QUERIES, a.count - first);
    const T *queries = (const T *)a.queries + row * a.query_row + head * a.query_head + first * a.query_token;
    const uint8_t *seen = a.seen ? a.seen + row * a.seen_row + head * a.seen_head : nullptr;
    for (int64_t r = 0; r < QUERIES; r++)
        for (int64_t d = 0; d < b.depth; d++) {
            T some[2] = {};
            for (int n = 0; n < W::EACH && r < rows && d * W::EACH + n < a.size; n++)
                some[n] = queries[r * a.query_token + d * W::EACH + n];
            W::copy(some, b.queries + r * b.depth + d, 1);
        }
    const int64_t limit = limit_of(a, seen, first, rows), padded = (limit + TILE - 1) / TILE * TILE;
    for (int64_t key = 0; key < padded; key += W::WIDE * LANES)
        for (int64_t r = 0; r < rows; r += W::ROWS) {
            const auto *keys = b.keys + key * b.depth, *some = b.queries + r * b.depth;
            vec acc[W::ROWS][W::WIDE] = {};
            tile<W, W::WIDE>(keys, LANES, b.depth * LANES, some, b.depth, b.depth, acc);
            for (int n = 0; n < W::ROWS; n++)
                for (int v = 0; v < W::WIDE; v++) store(b.scores + (r + n) * b.padded + key + v * LANES, acc[n][v]);
        }
    float totals[QUERIES];
    for (int64_t r = 0; r < rows; r++) {
        const int64_t visible = a.causal ? std::min(limit, first + r + 1) : limit;
        totals[r] = shares_of<W>(b.scores + r * b.padded, limit, padded, visible,
                                 seen ? seen + (first + r) * a.seen_query : nullptr, (float)a.scale);
    }
    T *to = (T *)a.result + row * a.result_row + head * a.result_head + first * a.result_token;
    const int64_t steps = (limit + W::EACH - 1) / W::EACH;
    for (int64_t c = 0; c < b.wide;) {
        const bool many = b.wide - c >= W::WIDE;
        for (int64_t r = 0; r < rows; r += W::ROWS) {
            if (many)
                put_values<T, W::WIDE>(a, b, to, rows, r, c, steps, totals);
            else
                put_values<T, 1>(a, b, to, rows, r, c, steps, totals);
        }
        c += many ? W::WIDE : 1;
    }
}

template <class T> int attend_prompt(const Prompt &a) {
    typedef typename Block<T>::item item;
    Block<T> all = {};
    const int each = Block<T>::W::EACH;
    all.depth = (a.size + each - 1) / each;
    all.padded = (a.length + TILE - 1) / TILE * TILE;
    all.wide = (a.size + LANES - 1) / LANES;
    all.steps = all.padded / each;
    Room room(sizeof(item) * (all.padded * all.depth + all.steps * all.wide * LANES) + 2 * 64);
    all.keys = room.take<item>(all.padded * all.depth);
    all.values = room.take<item>(all.steps * all.wide * LANES);
    bool short_of_memory = !room.there();
    const int64_t blocks = (a.count + QUERIES - 1) / QUERIES, group = a.heads / a.kv_heads;
    #pragma omp parallel num_threads(a.threads)
    {
        Block<T> b = all;
        Room mine(sizeof(item) * QUERIES * b.depth + sizeof(float) * QUERIES * b.padded + 2 * 64);
        b.queries = mine.take<item>(QUERIES * b.depth);
        b.scores = mine.take<float>(QUERIES * b.padded);
        if (!mine.there()) {
            #pragma omp atomic write
            short_of_memory = true;
        }
        #pragma omp barrier
        for (int64_t n = 0; n < a.batch * a.kv_heads && !short_of_memory; n++) {
            const int64_t row = n / a.kv_heads, kv = n % a.kv_heads;
            pack(a, b, row, kv);
            #pragma omp barrier
            #pragma omp for schedule(dynamic, 1)
            for (int64_t part = 0; part < blocks * group; part++)  // the longest first
                attend_block(a, b, row, kv * group + part % group, (blocks - 1 - part / group) * QUERIES);
        }
    }
    return short_of_memory;
}

struct Turn {  // as `turning_qwen.Turn`
    const void *heads;
    void *result;
    const float *cosine, *sine;
    int64_t batch, count, number, size, rotated, row, token, head, angle_row, threads;
};

// Each head of each token by the angles of the token's place: (batch, count, number, size).
template <class T> void turn(const Turn &a) {
    #pragma omp parallel for num_threads(a.threads)
    for (int64_t place = 0; place < a.batch * a.count; place++) {
        const int64_t row = place / a.count, token = place % a.count, angles = row * a.angle_row + token * a.rotated;
        for (int64_t n = 0; n < a.number; n++)
            rotate((const T *)a.heads + row * a.row + token * a.token + n * a.head,
                   (T *)a.result + (place * a.number + n) * a.size, a.cosine + angles, a.sine + angles, a.rotated,
                   a.size);
    }
}

}  // namespace

#define PROMPT(NAME, T) \
    extern "C" int qwen_prompt_##NAME(const Prompt *a) { return attend_prompt<T>(*a); } \
    extern "C" void qwen_turn_##NAME(const Turn *a) { turn<T>(*a); }
PROMPT(float32, float)
PROMPT(bfloat16, bf16)
"""
