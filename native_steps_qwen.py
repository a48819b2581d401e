"""The C++ text of the way of a few tokens through all blocks on a CPU, behind that of `native_products_qwen`."""

STEPS = r"""
#ifdef __clang__  // no product and sum in one, which would leave out a rounding
#define EACH_ROUNDED
#define CLANG_EACH_ROUNDED _Pragma("clang fp contract(off)")
#else
#define EACH_ROUNDED __attribute__((optimize("fp-contract=off")))
#define CLANG_EACH_ROUNDED
#endif

namespace {

template <class T> void norm(const T *x, const T *weight, T *y, int64_t width, double eps) {
    vec squares[PIECES] = {};
    int64_t column = 0;
    for (; column + BLOCK <= width; column += BLOCK)
        for (int p = 0; p < PIECES; p++) squares[p] += load(x + column + p * LANES) * load(x + column + p * LANES);
    float total = sum(squares);
    for (; column < width; column++) total += up(x[column]) * up(x[column]);
    float factor = 1.0f / std::sqrt(total / width + (float)eps);
    for (column = 0; column + LANES <= width; column += LANES) {
        store(y + column, load(x + column) * factor);
        store(y + column, load(y + column) * load(weight + column));
    }
    for (; column < width; column++) put(y + column, rounded<T>(up(x[column]) * factor) * up(weight[column]));
}

// Rotates the first channels of a head and rounds them, as they go to `to`; products are rounded too, as by torch.
template <class T> EACH_ROUNDED
void rotate(const T *head, T *to, const float *cosine, const float *sine, int64_t rotated, int64_t size) {
    CLANG_EACH_ROUNDED
    const int64_t half = rotated / 2;
    for (int64_t c = 0; c < half; c++) {
        const float first = up(head[c]), second = up(head[c + half]);
        put(to + c, first * cosine[c] - second * sine[c]);
        put(to + c + half, second * cosine[c + half] + first * sine[c + half]);
    }
    for (int64_t c = rotated; c < size; c++) to[c] = head[c];
}

template <class T, int N>
inline void weigh(const T *values, int64_t stride, const float *share, int64_t length, float factor, T *y) {
    vec acc[N] = {};
    for (int64_t token = 0; token < length; token++)
        for (int n = 0; n < N; n++) acc[n] += load(values + token * stride + n * LANES) * share[token];
    for (int n = 0; n < N; n++) store(y + n * LANES, acc[n] * factor);
}

// One query attends to all keys: y (size).
template <class T>
void attend(const T *query, const T *keys, int64_t key_stride, const T *values, int64_t value_stride,
            const uint8_t *seen, int64_t length, int64_t size, float scale, float *scores, T *y) {
    float greatest = -3.4028234e38f;
    for (int64_t token = 0; token < length; token++) {
        const T *key = keys + token * key_stride;
        vec acc[PIECES] = {};
        int64_t c = 0;
        for (; c + BLOCK <= size; c += BLOCK)
            for (int p = 0; p < PIECES; p++) acc[p] += load(key + c + p * LANES) * load(query + c + p * LANES);
        float score = sum(acc);
        for (; c < size; c++) score += up(key[c]) * up(query[c]);
        scores[token] = seen && !seen[token] ? -3.4028234e38f : score * scale;
        greatest = std::max(greatest, scores[token]);
    }
    vec totals[PIECES] = {};
    int64_t token = 0;
    for (; token + BLOCK <= length; token += BLOCK)
        for (int p = 0; p < PIECES; p++) {
            const vec shares = exponential(load(scores + token + p * LANES) - greatest);
            store(scores + token + p * LANES, shares);
            totals[p] += shares;
        }
    float total = sum(totals);
    for (; token < length; token++) total += scores[token] = std::exp(scores[token] - greatest);
    const bool blind = seen && !std::memchr(seen, 1, length);  // what sees nothing is given nothing, as torch has it
    const float factor = blind ? 0.0f : 1.0f / total;
    int64_t c = 0;
    for (; c + 8 * LANES <= size; c += 8 * LANES) weigh<T, 8>(values + c, value_stride, scores, length, factor, y + c);
    for (; c + LANES <= size; c += LANES) weigh<T, 1>(values + c, value_stride, scores, length, factor, y + c);
    for (; c < size; c++) {
        float acc = 0;
        for (token = 0; token < length; token++) acc += scores[token] * up(values[token * value_stride + c]);
        put(y + c, acc * factor);
    }
}

struct Layer {  // as `steps_qwen.Layer`
    Matrix c_attn, c_proj, w1, w2, down;
    const void *ln_1, *ln_2;
    void *keys, *values;
    int64_t key_row, key_head, key_token, value_row, value_head, value_token;
    double eps_1, eps_2, scale;
};
struct Call {  // as `steps_qwen.Call`
    const Layer *layers;
    void *states;
    const float *cosine, *sine, *logn;
    const uint8_t *seen;
    int64_t count, rows, tokens, width, inner, heads, kv_heads, size, rotated, length;
    int64_t angle_row, angle_token, logn_row, logn_token, seen_row, seen_token, threads;
    int64_t vectors() const { return rows * tokens; }
};

// What threads write for one another: queries, keys and values; what attention gives; the MLP's inside; changes; what
// adapters make of states, and add to a product.
template <class T> struct Shared {
    T *parts, *attended, *inner, *gate, *change;
    float *low, *added;
};

// A thread's own: the residual stream, which all compute alike, so that none waits for another; inputs of products, and
// of adapters that are wider than the states.
template <class T> struct Own {
    T *states, *x, *query;
    float *scores, *wide;
    Inputs inputs;
};

template <class T> const T *given(const T *x, T *, int64_t) { return x; }
template <class T> const float *widened(const T *x, float *wide, int64_t count) {
    int64_t n = 0;
    for (; n + LANES <= count; n += LANES) store(wide + n, load(x + n));
    for (; n < count; n++) wide[n] = up(x[n]);
    return wide;
}
inline const float *given(const bf16 *x, float *wide, int64_t count) { return widened(x, wide, count); }
inline const float *given(const f16 *x, float *wide, int64_t count) { return widened(x, wide, count); }

// A product with what its adapter adds, which is computed and rounded in W.
template <class W, class T>
Part adapted(const Matrix &m, const T *x, const Shared<T> &shared, const Own<T> &own, T *y, int64_t vectors) {
    W *low = (W *)shared.low, *added = (W *)shared.added;
    product(m.adapter->down, given(x, (W *)own.wide, vectors * m.columns), own.inputs, low, vectors);
    #pragma omp barrier
    product(m.adapter->up, (const W *)low, own.inputs, added, vectors);
    const Part mine = product(m, x, own.inputs, y, vectors);
    #pragma omp barrier  // products of another kind may be shared out in another way
    for (int64_t row = 0; row < vectors; row++)
        for (int64_t n = row * m.rows + mine.first; n < row * m.rows + mine.end; n++)
            put(y + n, up(y[n]) + rounded<W>(up(added[n]) * (float)m.adapter->scale));
    return mine;
}
template <class T>
Part project(const Matrix &m, const T *x, const Shared<T> &shared, const Own<T> &own, T *y, int64_t vectors) {
    if (!m.adapter) return product(m, x, own.inputs, y, vectors);
    return m.adapter->wide ? adapted<float>(m, x, shared, own, y, vectors) : adapted<T>(m, x, shared, own, y, vectors);
}

// New keys and values of head `kv` of a row, rotated, where they belong; then, of each token, the queries of the heads
// that share it, and what they find. Without a mask a token sees the keys up to its own.
template <class T>
void attention(const Call &a, const Layer &l, const Shared<T> &shared, const Own<T> &own, int64_t row, int64_t kv) {
    const int64_t group = a.heads / a.kv_heads, all = (a.heads + 2 * a.kv_heads) * a.size, held = a.length - a.tokens;
    const T *parts = shared.parts + row * a.tokens * all;
    T *keys = (T *)l.keys + row * l.key_row + kv * l.key_head;
    T *values = (T *)l.values + row * l.value_row + kv * l.value_head;
    const float *cosine = a.cosine + row * a.angle_row, *sine = a.sine + row * a.angle_row;
    for (int64_t token = 0; token < a.tokens; token++) {
        const T *part = parts + token * all + (a.heads + kv) * a.size;
        rotate(part, keys + (held + token) * l.key_token, cosine + token * a.angle_token, sine + token * a.angle_token,
               a.rotated, a.size);
        std::memcpy(values + (held + token) * l.value_token, part + a.kv_heads * a.size, a.size * sizeof(T));
    }
    for (int64_t head = kv * group; head < (kv + 1) * group; head++)
        for (int64_t token = 0; token < a.tokens; token++) {
            rotate(parts + token * all + head * a.size, own.query, cosine + token * a.angle_token,
                   sine + token * a.angle_token, a.rotated, a.size);
            if (a.logn) {
                const float factor = rounded<T>(a.logn[row * a.logn_row + token * a.logn_token]);
                for (int64_t c = 0; c < a.size; c++) put(own.query + c, up(own.query[c]) * factor);
            }
            const uint8_t *seen = a.seen ? a.seen + row * a.seen_row + token * a.seen_token : nullptr;
            const int64_t length = seen ? a.length : held + token + 1;
            attend(own.query, keys, l.key_token, values, l.value_token, seen, length, a.size, (float)l.scale,
                   own.scores, shared.attended + ((row * a.tokens + token) * a.heads + head) * a.size);
        }
}

template <class T> void add(T *states, const T *change, int64_t count) {
    int64_t n = 0;
    for (; n + LANES <= count; n += LANES) store(states + n, load(states + n) + load(change + n));
    for (; n < count; n++) put(states + n, up(states[n]) + up(change[n]));
}

template <class T> void activate(T *inner, const T *gate, int64_t count) {
    int64_t n = 0;
    for (; n + LANES <= count; n += LANES) {
        const vec g = load(gate + n), other = load(inner + n);
        store(inner + n, g / (exponential(-g) + 1.0f));
        store(inner + n, load(inner + n) * other);
    }
    for (; n < count; n++) {
        const float g = up(gate[n]);
        put(inner + n, rounded<T>(g / (1.0f + std::exp(-g))) * up(inner[n]));
    }
}

template <class T> void layer(const Call &a, const Layer &l, const Shared<T> &shared, const Own<T> &own) {
    const int64_t vectors = a.vectors(), count = vectors * a.width;
    for (int64_t row = 0; row < vectors; row++)
        norm(own.states + row * a.width, (const T *)l.ln_1, own.x + row * a.width, a.width, l.eps_1);
    project(l.c_attn, own.x, shared, own, shared.parts, vectors);
    #pragma omp barrier
    const Part heads = share(a.rows * a.kv_heads, 1);
    for (int64_t n = heads.first; n < heads.end; n++) attention(a, l, shared, own, n / a.kv_heads, n % a.kv_heads);
    #pragma omp barrier
    project(l.c_proj, shared.attended, shared, own, shared.change, vectors);
    #pragma omp barrier
    add(own.states, shared.change, count);
    for (int64_t row = 0; row < vectors; row++)
        norm(own.states + row * a.width, (const T *)l.ln_2, own.x + row * a.width, a.width, l.eps_2);
    const Part mine = project(l.w1, own.x, shared, own, shared.inner, vectors);
    project(l.w2, own.x, shared, own, shared.gate, vectors);  // the same rows
    for (int64_t row = 0; row < vectors; row++)
        activate(shared.inner + row * a.inner + mine.first, shared.gate + row * a.inner + mine.first,
                 mine.end - mine.first);
    #pragma omp barrier
    project(l.down, shared.inner, shared, own, shared.change, vectors);
    #pragma omp barrier
    add(own.states, shared.change, count);
}

// Of all adapters' ranks the greatest, 0 without any.
inline int64_t greatest_rank(const Call &a) {
    int64_t greatest = 0;
    for (int64_t n = 0; n < a.count; n++) {
        const Layer &l = a.layers[n];
        for (const Matrix *m : {&l.c_attn, &l.c_proj, &l.w1, &l.w2, &l.down})
            if (m->adapter) greatest = std::max(greatest, m->adapter->down.rows);
    }
    return greatest;
}

template <class T> int steps(const Call &a) {
    const int64_t q_width = a.heads * a.size, all = q_width + 2 * a.kv_heads * a.size, rank = greatest_rank(a);
    const int64_t widest = std::max({a.width, q_width, a.inner, rank}), vectors = a.vectors();
    const int64_t count = vectors * a.width, low = vectors * rank, added = rank ? vectors * std::max(widest, all) : 0;
    Room room(sizeof(T) * vectors * (all + q_width + 2 * a.inner + a.width) + sizeof(float) * (low + added) + 7 * 64);
    const Shared<T> shared = {room.take<T>(vectors * all), room.take<T>(vectors * q_width),
                              room.take<T>(vectors * a.inner), room.take<T>(vectors * a.inner),
                              room.take<T>(count), room.take<float>(low), room.take<float>(added)};
    bool short_of_memory = !room.there();
    #pragma omp parallel num_threads(a.threads)
    {
        const int64_t wide = rank ? vectors * widest : 0;
        Room mine(sizeof(T) * (2 * count + a.size) + sizeof(float) * (a.length + wide) + inputs_room(vectors, widest) +
                  5 * 64);
        const Own<T> own = {mine.take<T>(count), mine.take<T>(count), mine.take<T>(a.size),
                            mine.take<float>(a.length), mine.take<float>(wide), inputs_in(mine, vectors, widest)};
        if (!mine.there()) {
            #pragma omp atomic write
            short_of_memory = true;
        }
        #pragma omp barrier
        if (!short_of_memory) {
            std::memcpy(own.states, a.states, count * sizeof(T));
            for (int64_t n = 0; n < a.count; n++) layer(a, a.layers[n], shared, own);
            if (omp_get_thread_num() == 0) std::memcpy(a.states, own.states, count * sizeof(T));
        }
    }
    return short_of_memory;
}

}  // namespace

#define STEPS(NAME, T) extern "C" int qwen_steps_##NAME(const Call *a) { return steps<T>(*a); }
STEPS(float32, float)
STEPS(bfloat16, bf16)
STEPS(float16, f16)
"""
