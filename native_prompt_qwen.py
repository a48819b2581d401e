"""The C++ text of the attention and the rotation of a prompt on a CPU, behind that of `native_steps_qwen`."""

PROMPT = r"""
namespace {

struct Prompt {  // as `prompt_qwen.Prompt`
    const void *queries, *keys, *values;
    void *result;
    const uint8_t *seen;
    float *logsums;  // (batch, heads, count): logarithms of the sums of shares, or null
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

// Numbers of a head, (count, size) from `from`, as items: an item holds two channels or two tokens, where it holds two.
// Zeros lie beyond. `step` and `next` are from token to token and from channel to channel, of items.
template <class W, bool TOKENS, class T>
void lay(const T *from, int64_t stride, int64_t count, int64_t size, typename W::item *to, int64_t tokens,
         int64_t channels, int64_t step, int64_t next) {
    const int64_t down = TOKENS ? W::EACH : 1, across = TOKENS ? 1 : W::EACH, beside = TOKENS ? stride : 1;
    for (int64_t token = 0; token < tokens; token++) {
        const int64_t n = token * down, inside = n + down <= count ? std::min(channels, size / across) : 0;
        const T *row = from + n * stride;
        typename W::item *place = to + token * step;
        if (next == 1)  // which is said here for vectors
            for (int64_t channel = 0; channel < inside; channel++)
                W::copy(row + channel * across, place + channel, beside);
        else
            for (int64_t channel = 0; channel < inside; channel++)
                W::copy(row + channel * across, place + channel * next, beside);
        for (int64_t channel = inside; channel < channels; channel++) {
            T some[2] = {};
            if (n < count && channel * across < size) some[0] = row[channel * across];
            W::copy(some, place + channel * next, 1);
        }
    }
}

// The same of whole vectors of tokens side by side, which a product of them reads.
template <class W, class T>
void lay_lanes(const T *from, int64_t stride, int64_t count, int64_t size, typename W::item *to, int64_t tokens,
               int64_t depth) {
    for (int64_t first = 0; first < tokens; first += LANES)
        lay<W, false>(from + first * stride, stride, std::max<int64_t>(0, count - first), size, to + first * depth,
                      LANES, depth, 1, LANES);
}

// Part of the keys and values of a head as tiles read them.
template <class T> void pack(const Prompt &a, const Block<T> &b, int64_t row, int64_t kv) {
    typedef typename Block<T>::W W;
    const T *keys = (const T *)a.keys + row * a.key_row + kv * a.key_head;
    const T *values = (const T *)a.values + row * a.value_row + kv * a.value_head;
    const Part mine = share(b.padded, LANES);
    const int64_t tokens = mine.end - mine.first, count = std::max<int64_t>(0, a.length - mine.first);
    lay_lanes<W>(keys + mine.first * a.key_token, a.key_token, count, a.size, b.keys + mine.first * b.depth, tokens,
                 b.depth);
    lay<W, true>(values + mine.first * a.value_token, a.value_token, count, a.size,
                 b.values + mine.first / W::EACH * b.wide * LANES, tokens / W::EACH, b.wide * LANES, b.wide * LANES, 1);
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

// The tile of the first key that a query of a block sees.
inline int64_t start_of(const Prompt &a, const uint8_t *seen, int64_t first, int64_t count, int64_t limit) {
    int64_t start = seen ? limit - 1 : 0;
    for (int64_t n = first; seen && n < first + count; n++)
        for (int64_t key = 0; key < start; key++)
            if (seen[n * a.seen_query + key]) start = key;
    return start / TILE * TILE;
}

// Scores of a query to shares of the values, in their place, not divided by what is returned; `top` becomes the
// greatest of them.
template <class W>
float shares_of(float *scores, int64_t limit, int64_t padded, int64_t visible, const uint8_t *seen, float scale,
                float &top) {
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
    top = least;
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
void put_values(const Prompt &a, const Block<T> &b, T *to, int64_t rows, int64_t r, int64_t c, int64_t start,
                int64_t steps, const float *totals) {
    typedef typename Block<T>::W W;
    const auto *shares = (typename W::item *)(b.scores + r * b.padded);
    vec acc[W::ROWS][N] = {};
    const auto *values = b.values + (start / W::EACH * b.wide + c) * LANES;
    tile<W, N>(values, b.wide * LANES, LANES, shares, b.padded, steps, acc);
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
    lay<W, false>(queries, a.query_token, rows, a.size, b.queries, QUERIES, b.depth, b.depth, 1);
    const int64_t limit = limit_of(a, seen, first, rows), start = start_of(a, seen, first, rows, limit);
    const int64_t padded = (limit - start + TILE - 1) / TILE * TILE;
    for (int64_t key = 0; key < padded; key += W::WIDE * LANES)
        for (int64_t r = 0; r < rows; r += W::ROWS) {
            const auto *keys = b.keys + (start + key) * b.depth, *some = b.queries + r * b.depth;
            vec acc[W::ROWS][W::WIDE] = {};
            tile<W, W::WIDE>(keys, LANES, b.depth * LANES, some, b.depth, b.depth, acc);
            for (int n = 0; n < W::ROWS; n++)
                for (int v = 0; v < W::WIDE; v++) store(b.scores + (r + n) * b.padded + key + v * LANES, acc[n][v]);
        }
    float totals[QUERIES];
    for (int64_t r = 0; r < rows; r++) {
        const int64_t visible = a.causal ? std::min(limit, first + r + 1) : limit;
        const uint8_t *its = seen ? seen + (first + r) * a.seen_query + start : nullptr;
        float top;
        totals[r] = shares_of<W>(b.scores + r * b.padded, limit - start, padded, visible - start, its, (float)a.scale,
                                 top);
        // What sees nothing is given nothing, as torch has it, and nothing comes back to it.
        const bool blind = its && !std::memchr(its, 1, visible - start);
        if (a.logsums)
            a.logsums[(row * a.heads + head) * a.count + first + r] = blind ? 3.0e38f : top + std::log(totals[r]);
        if (blind) totals[r] = INFINITY;
    }
    T *to = (T *)a.result + row * a.result_row + head * a.result_head + first * a.result_token;
    const int64_t steps = (limit - start + W::EACH - 1) / W::EACH;
    for (int64_t c = 0; c < b.wide;) {
        const bool many = b.wide - c >= W::WIDE;
        for (int64_t r = 0; r < rows; r += W::ROWS) {
            if (many)
                put_values<T, W::WIDE>(a, b, to, rows, r, c, start, steps, totals);
            else
                put_values<T, 1>(a, b, to, rows, r, c, start, steps, totals);
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
PROMPT(float16, f16)
"""
