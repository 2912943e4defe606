// Attention of a few query positions to a long context on a CPU: every KV head is read once for all of its query heads.
//
// The R = (H / G) * T query rows of a KV head stand side by side. The context of each KV head is cut into parts, which
// the threads take one after the other; a part is read in blocks of BLOCK keys. Of a block, all rows' scores are made,
// then its share of the softmax (Milakov & Gimelshein 2018, "Online normalizer calculation for softmax"), then the sums
// of values. The last thread to finish a KV head merges its parts by their log-sum-exps, in the order of the parts, so
// that a result does not depend on who did what ("Flash-Decoding", Dao et al. 2023).
//
// While one block is worked on, the lines of the next are fetched, a few in each turn of the inner loops: at few rows
// memory binds, at many arithmetic does, and in between neither may wait for the other.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "vectors.h"

namespace {

constexpr int BLOCK = 128;       // keys, at most
constexpr int PANEL = 2 * WIDTH;  // query rows that `outer` works on at once
constexpr int MOST_KEYS = 8;      // keys that it works on at once, at most
constexpr float NONE = -std::numeric_limits<float>::infinity();

INLINE long up(long n, long to) { return (n + to - 1) / to * to; }

}  // namespace

// Mirrored field by field by `_Call` in decode.py. Strides in elements; type 0 of an absent tensor does not matter.
extern "C" struct RegroupCall {
    const void *query, *key, *value, *mask, *bias;
    void *out, *parallel;
    int64_t batch, heads, groups, queries, context, head_dim, value_dim;
    int64_t type, mask_type, bias_type;
    int64_t query_stride[3], key_stride[3], value_stride[3], mask_stride[4], bias_stride[4];
    int64_t causal, window, threads;
    double scale, softcap;
};

namespace {

// Lines of a block to come, fetched one by one.
struct Ahead {
    const char* line = nullptr;
    long row_lines = 0, gap = 0, left = 0, rows = 0;

    Ahead(const char* start, long row_bytes, long stride_bytes, long rows) : line(start), rows(start ? rows : 0) {
        row_lines = left = (row_bytes + 63) / 64;
        gap = stride_bytes - row_lines * 64;
    }
    INLINE void fetch() {
        if (rows == 0) return;
        __builtin_prefetch(line);
        line += 64;
        if (--left == 0) {
            left = row_lines;
            line += gap;
            rows--;
        }
    }
    // Lines to fetch in each of so many turns.
    long per(long turns) const { return turns > 0 ? (row_lines * rows + turns - 1) / turns : 0; }
};

// Scores of N rows and four keys, vectors along head_dim; `units` of it in floats or pairs.
template <class Op, int N>
INLINE void dots(const float* q, long q_row, const float* const* keys, long units, float* s, long s_row, Ahead& ahead,
                 long fetches) {
    vec sum[N][4];
    UNROLL
    for (int r = 0; r < N; r++)
        UNROLL
        for (int j = 0; j < 4; j++) sum[r][j] = splat(0);
    long d = 0;
    for (; d + WIDTH <= units; d += WIDTH) {
        for (long i = 0; i < fetches; i++) ahead.fetch();
        vec k[4];
        UNROLL
        for (int j = 0; j < 4; j++) {
            k[j] = load(keys[j] + d);
            if (N > 1) IN_REGISTER(k[j]);
        }
        UNROLL
        for (int r = 0; r < N; r++) {
            vec x = load(q + r * q_row + d);
            IN_REGISTER(x);
            UNROLL
            for (int j = 0; j < 4; j++) sum[r][j] = Op::add_product(sum[r][j], x, k[j]);
        }
    }
    if (d < units) {
        UNROLL
        for (int j = 0; j < 4; j++) {
            vec k = load_part(keys[j] + d, (int)(units - d));
            UNROLL
            for (int r = 0; r < N; r++) sum[r][j] = Op::add_product(sum[r][j], load(q + r * q_row + d), k);
        }
    }
    UNROLL
    for (int r = 0; r < N; r++) sum4(sum[r][0], sum[r][1], sum[r][2], sum[r][3], s + r * s_row);
}

// Scores of N vectors of rows and a block of keys, keys spread over the lanes: s[key][row]. The query is (units, rows).
template <class Op, int N>
INLINE void outer(const float* q, long q_row, const float* k, long k_row, long units, float* s, long s_row,
                  Ahead& ahead, long fetches) {
    constexpr int KEYS = keys(N);
    vec sum[KEYS][N];
    UNROLL
    for (int j = 0; j < KEYS; j++)
        UNROLL
        for (int r = 0; r < N; r++) sum[j][r] = splat(0);
    const float* k4 = k + 4 * k_row;
    for (long d = 0; d < units; d++) {
        for (long i = 0; i < fetches; i++) ahead.fetch();
        vec x[N];
        UNROLL
        for (int r = 0; r < N; r++) {
            x[r] = load(q + d * q_row + r * WIDTH);
            IN_REGISTER(x[r]);
        }
        UNROLL
        for (int j = 0; j < KEYS; j++) {
            vec y = splat((j < 4 ? k : k4)[(j & 3) * k_row + d]);
            IN_REGISTER(y);
            UNROLL
            for (int r = 0; r < N; r++) sum[j][r] = Op::add_product(sum[j][r], x[r], y);
        }
    }
    UNROLL
    for (int j = 0; j < KEYS; j++)
        UNROLL
        for (int r = 0; r < N; r++) store(s + j * s_row + r * WIDTH, sum[j][r]);
}

// out[row] = out[row] * shrink[row] + sum over keys of p[row][key] * value[key], for N rows and M vectors of width;
// `part` floats in the last of them where it is not full.
template <class Op, int N, int M, bool WHOLE>
INLINE void weigh(const float* p, long p_row, const float* v, long v_row, long keys, float* out, long out_row,
                  const float* shrink, int part, Ahead& ahead, long fetches) {
    vec sum[N][M];
    UNROLL
    for (int r = 0; r < N; r++)
        UNROLL
        for (int c = 0; c < M; c++) sum[r][c] = load(out + r * out_row + c * WIDTH) * splat(shrink[r]);
    for (long j = 0; j < keys; j++) {
        for (long i = 0; i < fetches; i++) ahead.fetch();
        const float* row = v + j * v_row;
        vec x[M];
        UNROLL
        for (int c = 0; c < M - 1; c++) x[c] = load(row + c * WIDTH);
        x[M - 1] = WHOLE ? load(row + (M - 1) * WIDTH) : load_part(row + (M - 1) * WIDTH, part);
        if (N > 1)
            UNROLL
            for (int c = 0; c < M; c++) IN_REGISTER(x[c]);
        UNROLL
        for (int r = 0; r < N; r++) {
            vec y = splat(p[r * p_row + j]);
            IN_REGISTER(y);
            UNROLL
            for (int c = 0; c < M; c++) sum[r][c] = Op::add_product(sum[r][c], y, x[c]);
        }
    }
    UNROLL
    for (int r = 0; r < N; r++)
        UNROLL
        for (int c = 0; c < M; c++) store(out + r * out_row + c * WIDTH, sum[r][c]);
}

// `weigh` for so many vectors, found by counting down from the most that there may be.
template <class Op, int N, int M = strip(N)>
void weigh_strip(int vectors, const float* p, long p_row, const float* v, long v_row, long keys, float* out,
                 long out_row, const float* shrink, int part, Ahead& ahead, long fetches) {
    if (M > 1 && vectors < M)
        return weigh_strip<Op, N, (M > 1 ? M - 1 : 1)>(vectors, p, p_row, v, v_row, keys, out, out_row, shrink, part,
                                                       ahead, fetches);
    if (part)
        weigh<Op, N, M, false>(p, p_row, v, v_row, keys, out, out_row, shrink, part, ahead, fetches);
    else
        weigh<Op, N, M, true>(p, p_row, v, v_row, keys, out, out_row, shrink, part, ahead, fetches);
}

// exp of x <= 0 (or NaN) by 2^n e^f, |f| <= ln 2 / 2, and Taylor's series to f^7; below 2^-126 it is 0.
INLINE float exponential(float x) {
    const float low = -87.3f, shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    float y = x < low ? low : x;
    float n = (y * 1.44269504f + shift) - shift;
    float f = (y - n * 0.693359375f) + n * 2.12194440e-4f;
    float e = 1 / 5040.0f;
    e = e * f + 1 / 720.0f;
    e = e * f + 1 / 120.0f;
    e = e * f + 1 / 24.0f;
    e = e * f + 1 / 6.0f;
    e = e * f + 0.5f;
    e = e * f + 1.0f;
    e = e * f + 1.0f;
    int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return x < low ? 0.0f : e * power;
}

// tanh by way of expm1, so that it is as exact near 0 as elsewhere: tanh |x| = -m / (m + 2) with m = e^(-2|x|) - 1.
INLINE float hyperbolic(float x) {
    const float shift = 12582912.0f;
    float y = -2 * std::fabs(x);
    y = y < -30.0f ? -30.0f : y;
    float n = (y * 1.44269504f + shift) - shift;
    float f = (y - n * 0.693359375f) + n * 2.12194440e-4f;
    float e = 1 / 5040.0f;
    e = e * f + 1 / 720.0f;
    e = e * f + 1 / 120.0f;
    e = e * f + 1 / 24.0f;
    e = e * f + 1 / 6.0f;
    e = e * f + 0.5f;
    e = e * f + 1.0f;
    e = e * f;
    int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    float m = e * power + (power - 1);
    return std::copysign(-m / (m + 2), x);
}

struct Part {
    long b, g, first, last;
};

template <class Op>
struct Work {
    const RegroupCall& c;
    bool raw;          // keys and values are read as they lie; otherwise a block is converted to floats first
    bool pairs;        // two bfloat16 in the room of a float
    bool wide;         // many rows: scores by `outer`
    long size;         // bytes of an element
    long rows, rows_up, units, units_up, width_up, low, high, parts, part_length, block;
    long share_floats;
    float* shares;
    std::unique_ptr<std::atomic<int>[]> finished;
    std::atomic<long> next{0};

    explicit Work(const RegroupCall& call) : c(call) {
        pairs = !std::is_same<Op, Floats>::value;
        raw = pairs || c.type == FLOAT;
        size = c.type == FLOAT ? 4 : 2;
        rows = c.heads / c.groups * c.queries;
        wide = rows > 3 * WIDTH / 4;
        rows_up = wide ? up(rows, WIDTH) : rows <= 2 ? rows : up(rows, DOTS);
        units = pairs ? c.head_dim / 2 : c.head_dim;
        units_up = up(units, WIDTH);
        width_up = up(c.value_dim, WIDTH);
        // One row is all reading: the next block must fit the first cache beside this one. More rows want longer loops.
        block = rows_up == 1 ? 16 : BLOCK;
        low = 0, high = c.context;
        if (c.window) low = std::max(0L, (long)(c.context - c.queries - c.window + 1));
        if (c.causal) high = c.context;  // the last query sees the last key
        if (low > high) low = high;
        // Enough parts for the threads to share evenly, none so short that merging shows.
        long heads = c.batch * c.groups, wanted = 16 * std::max<long>(2, c.threads);
        long shortest = 256, span = high - low;
        parts = std::max(1L, std::min((wanted + heads - 1) / heads, (span + shortest - 1) / shortest));
        long length = up((span + parts - 1) / parts, BLOCK);
        parts = std::max(1L, length ? (span + length - 1) / length : 1);
        part_length = length;
        share_floats = rows * (width_up + 2);
        finished.reset(new std::atomic<int>[heads]);
        for (long i = 0; i < heads; i++) finished[i] = 0;
        static thread_local Room room;
        shares = parts > 1 ? room.take(heads * parts * share_floats) : nullptr;
    }

    Part part(long index) const {
        long head = index / parts, number = index % parts, first = low + number * part_length;
        Part p{head / c.groups, head % c.groups, first, std::min(first + part_length, high)};
        trim(p);
        return p;
    }

    // Whether a bool mask that is the same for all heads hides keys j to j + n of one batch entry from every query.
    bool hidden(long b, long j, long n) const {
        if (!c.mask || c.mask_type != BOOL || c.mask_stride[1] || c.mask_stride[3] != 1) return false;
        for (long t = 0; t < (c.mask_stride[2] ? c.queries : 1); t++) {
            const uint8_t* m = (const uint8_t*)c.mask + b * c.mask_stride[0] + t * c.mask_stride[2] + j;
            uint8_t any = 0;
            for (long i = 0; i < n; i++) any |= m[i];
            if (any) return false;
        }
        return true;
    }

    // Padding at either end is not read.
    void trim(Part& p) const {
        while (p.first < p.last && hidden(p.b, p.first, std::min(block, p.last - p.first))) p.first += block;
        if (p.first > p.last) p.first = p.last;
        while (p.first < p.last) {
            long start = p.first + (p.last - p.first - 1) / block * block;
            if (!hidden(p.b, start, p.last - start)) break;
            p.last = start;
        }
    }

    const char* key_at(const Part& p, long j) const {
        return (const char*)c.key + size * (p.b * c.key_stride[0] + p.g * c.key_stride[1] + j * c.key_stride[2]);
    }
    const char* value_at(const Part& p, long j) const {
        const int64_t* stride = c.value_stride;
        return (const char*)c.value + size * (p.b * stride[0] + p.g * stride[1] + j * stride[2]);
    }

    // The query rows of a KV head, in the order in which the score loops read them; rows that are none are zero.
    void pack_query(const Part& p, float* q, float* line) const {
        std::memset(q, 0, sizeof(float) * (wide ? rows_up * units : rows_up * units_up));
        for (long r = 0; r < rows; r++) {
            long h = p.g * (c.heads / c.groups) + r / c.queries, t = r % c.queries;
            const char* from = (const char*)c.query +
                               size * (p.b * c.query_stride[0] + h * c.query_stride[1] + t * c.query_stride[2]);
            if (pairs)
                std::memcpy(line, from, 2 * c.head_dim);
            else
                widen(from, c.type, 1, line, (int)c.head_dim);
            if (wide)
                for (long d = 0; d < units; d++) std::memcpy(q + d * rows_up + r, line + d, 4);
            else
                std::memcpy(q + r * units_up, line, 4 * units);
        }
    }

    // scratch (n and a few, PANEL) = products of n keys with N vectors of rows.
    template <int N>
    void score_panel(const float* q, const float* k, long k_row, long n, float* scratch, Ahead& ahead,
                     long fetches) const {
        constexpr long KEYS = keys(N);
        const long whole = n / KEYS * KEYS;
        for (long j = 0; j < whole; j += KEYS)
            outer<Op, N>(q, rows_up, k + j * k_row, k_row, units, scratch + j * PANEL, PANEL, ahead, fetches);
        if (whole == n) return;
        // What is left of the block is copied to a whole group: a row of the cache may end where memory ends.
        float* rest = scratch + (BLOCK + MOST_KEYS) * PANEL;
        for (long j = 0; j < KEYS; j++)
            std::memcpy(rest + j * units_up, k + (whole + j % (n - whole)) * k_row, 4 * units);
        outer<Op, N>(q, rows_up, rest, units_up, units, scratch + whole * PANEL, PANEL, ahead, fetches);
    }

    // s (rows_up, BLOCK) = products of all rows with n keys; beyond n it is undefined.
    void score(const float* q, const float* k, long k_row, long n, float* s, float* scratch, Ahead ahead) const {
        if (wide) {
            long panels = (rows_up + PANEL - 1) / PANEL;
            long fetches = ahead.per(panels * ((n + keys(2) - 1) / keys(2)) * units);
            for (long r = 0; r < rows_up; r += PANEL) {
                const bool two = rows_up - r >= PANEL;
                if (two)
                    score_panel<2>(q + r, k, k_row, n, scratch, ahead, fetches);
                else
                    score_panel<1>(q + r, k, k_row, n, scratch, ahead, fetches);
                for (long x = 0; x < (two ? PANEL : WIDTH); x += WIDTH)
                    for (long j = 0; j < n; j += WIDTH)
                        transpose(scratch + j * PANEL + x, PANEL, s + (r + x) * BLOCK + j, BLOCK);
            }
            return;
        }
        long fetches = ahead.per((n + 3) / 4 * (units / WIDTH));
        for (long j = 0; j < n; j += 4) {
            const float* keys[4];
            for (long i = 0; i < 4; i++) keys[i] = k + std::min(j + i, n - 1) * k_row;
            long r = 0, now = fetches;
            for (; DOTS > 2 && r + DOTS <= rows_up; r += DOTS, now = 0)
                dots<Op, DOTS>(q + r * units_up, units_up, keys, units, s + r * BLOCK + j, BLOCK, ahead, now);
            for (; r + 2 <= rows_up; r += 2, now = 0)
                dots<Op, 2>(q + r * units_up, units_up, keys, units, s + r * BLOCK + j, BLOCK, ahead, now);
            for (; r < rows_up; r++, now = 0)
                dots<Op, 1>(q + r * units_up, units_up, keys, units, s + r * BLOCK + j, BLOCK, ahead, now);
        }
    }

    static void add(float* s, const void* from, long type, const int64_t* stride, long b, long h, long t, long j,
                    int n) {
        long at = b * stride[0] + h * stride[1] + t * stride[2] + j * stride[3];
        if (type == BOOL) {
            const uint8_t* m = (const uint8_t*)from + at;
            if (stride[3] == 1)
                for (int i = 0; i < n; i++) s[i] = m[i] ? s[i] : NONE;
            else
                for (int i = 0; i < n; i++) s[i] = m[i * stride[3]] ? s[i] : NONE;
            return;
        }
        float more[BLOCK];
        widen((const char*)from + at * (type == FLOAT ? 4 : 2), type, stride[3], more, n);
        for (int i = 0; i < n; i++) s[i] += more[i];
    }

    // Row r's scores of keys j to j + n become weights (in place, or as bfloat16), 0 up to whole vectors.
    void soften(const Part& p, long r, long j, int n, float* s, float& top, float& sum, float& shrink) const {
        const float scale = (float)c.scale;
        const int n_up = (int)up(n, 16);
        for (int i = 0; i < n_up; i++) s[i] *= scale;
        if (c.softcap != 0) {
            const float cap = (float)c.softcap, inverse = (float)(1 / c.softcap);
            for (int i = 0; i < n; i++) s[i] = cap * hyperbolic(s[i] * inverse);
        }
        long h = p.g * (c.heads / c.groups) + r / c.queries, t = r % c.queries;
        if (c.bias) add(s, c.bias, c.bias_type, c.bias_stride, p.b, h, t, j, n);
        if (c.mask) add(s, c.mask, c.mask_type, c.mask_stride, p.b, h, t, j, n);
        long self = t + c.context - c.queries;
        if (c.causal && self < j + n - 1)
            for (long i = std::max(0L, self + 1 - j); i < n; i++) s[i] = NONE;
        if (c.window && self - c.window >= j)
            for (long i = 0; i < std::min<long>(n, self - c.window + 1 - j); i++) s[i] = NONE;
        for (int i = n; i < n_up; i++) s[i] = NONE;

        float highest_now = highest(s, n_up);
        float now = highest_now > top ? highest_now : top;
        float from = now == NONE ? 0 : now;  // nothing seen so far: weights of exp(-inf) = 0
        shrink = exponential(top - from);
        top = now;
        for (int i = 0; i < n_up; i++) s[i] = exponential(s[i] - from);
        sum = sum * shrink + total(s, n_up);
        narrow_weights(s, n_up);
    }

    static INLINE void narrow_weights(float* s, int n) {
#if defined(__AVX512BF16__)
        if (!std::is_same<Op, Floats>::value)
            for (int at = 0; at < n; at += 16) narrow(s + at, (uint16_t*)s + at);
#endif
        (void)s, (void)n;
    }

    // Values of n keys as the sums read them: two rows interleaved, or converted to floats.
    void pack_value(const char* v, long stride_bytes, long n, float* to) const {
        if (!pairs) {
            for (long j = 0; j < n; j++) widen(v + j * stride_bytes, c.type, 1, to + j * width_up, (int)c.value_dim);
            return;
        }
        for (long j = 0; j < n; j += 2) {
            const uint16_t* even = (const uint16_t*)(v + j * stride_bytes);
            const uint16_t* odd = j + 1 < n ? (const uint16_t*)(v + (j + 1) * stride_bytes) : nullptr;
            uint32_t* row = (uint32_t*)(to + j / 2 * width_up);
            if (odd)
                for (long d = 0; d < c.value_dim; d++) row[d] = even[d] | (uint32_t)odd[d] << 16;
            else
                for (long d = 0; d < c.value_dim; d++) row[d] = even[d];
        }
    }

    template <int N>
    void sum_rows(long r, const float* s, const float* v, long v_row, int part, long keys, float* out,
                  const float* shrink, Ahead& ahead, long fetches) const {
        const long vectors = width_up / WIDTH;
        for (long x = 0; x < vectors; x += strip(N)) {
            int m = (int)std::min<long>(strip(N), vectors - x);
            weigh_strip<Op, N>(m, s + r * BLOCK, BLOCK, v + x * WIDTH, v_row, keys, out + r * width_up + x * WIDTH,
                               width_up, shrink + r, x + m == vectors ? part : 0, ahead, fetches);
        }
    }

    // out (rows_up, width_up) = out * shrink + weights s (rows_up, BLOCK) times values; `keys` in floats or pairs.
    void sum_values(const float* s, const float* v, long v_row, int part, long keys, float* out, const float* shrink,
                    Ahead ahead) const {
        long passes = 0, vectors = width_up / WIDTH, r = 0;
        auto step = [&] { return rows_up - r >= ROWS ? ROWS : rows_up - r >= 2 ? 2 : 1; };
        for (; r < rows_up; r += step()) passes += (vectors + strip(step()) - 1) / strip(step());
        long fetches = ahead.per(passes * keys);
        for (r = 0; r + ROWS <= rows_up; r += ROWS)
            sum_rows<ROWS>(r, s, v, v_row, part, keys, out, shrink, ahead, fetches);
        for (; r + 2 <= rows_up; r += 2) sum_rows<2>(r, s, v, v_row, part, keys, out, shrink, ahead, fetches);
        for (; r < rows_up; r++) sum_rows<1>(r, s, v, v_row, part, keys, out, shrink, ahead, fetches);
    }

    void write(const Part& p, long r, const float* sums, float total) const {
        long h = p.g * (c.heads / c.groups) + r / c.queries, t = r % c.queries;
        long at = ((p.b * c.heads + h) * c.queries + t) * c.value_dim;
        float by = total == 0 ? 0 : 1 / total;
        if (c.type == FLOAT)
            for (long d = 0; d < c.value_dim; d++) ((float*)c.out)[at + d] = sums[d] * by;
        else if (c.type == BFLOAT16)
            for (long d = 0; d < c.value_dim; d++) ((uint16_t*)c.out)[at + d] = to_bf16(sums[d] * by);
        else
            for (long d = 0; d < c.value_dim; d++) ((uint16_t*)c.out)[at + d] = to_fp16(sums[d] * by);
    }

    void merge(const Part& p, float* sums) const {
        const float* own = shares + (p.b * c.groups + p.g) * parts * share_floats;
        for (long r = 0; r < rows; r++) {
            float top = NONE, total = 0;
            for (long i = 0; i < parts; i++) {
                float m = own[i * share_floats + rows * width_up + 2 * r];
                top = m > top ? m : top;
            }
            for (long d = 0; d < width_up; d++) sums[d] = 0;
            for (long i = 0; i < parts; i++) {
                const float* share = own + i * share_floats;
                const float* state = share + rows * width_up + 2 * r;
                if (state[1] == 0) continue;
                float weight = exponential(state[0] - top);
                total += weight * state[1];
                for (long d = 0; d < c.value_dim; d++) sums[d] += weight * share[r * width_up + d];
            }
            write(p, r, sums, total);
        }
    }

    void run() {
        static thread_local Room room;
        const long q_floats = up(wide ? rows_up * units : rows_up * units_up, 16);
        const long line_floats = units_up + c.head_dim, rest_floats = MOST_KEYS * units_up;
        const long scratch_floats = wide ? (BLOCK + MOST_KEYS) * PANEL + rest_floats : 0;
        const long key_floats = raw ? 0 : BLOCK * units_up, value_floats = raw && !pairs ? 0 : BLOCK * width_up;
        float* q = room.take(q_floats + up(line_floats, 16) + rows_up * (BLOCK + width_up) + up(3 * rows_up, 16) +
                             scratch_floats + key_floats + value_floats);
        float* line = q + q_floats;
        float* s = line + up(line_floats, 16);
        float* out = s + rows_up * BLOCK;
        float *top = out + rows_up * width_up, *total = top + rows_up, *shrink = total + rows_up;
        float* scratch = top + up(3 * rows_up, 16);
        float* k_block = scratch + scratch_floats;
        float* v_block = k_block + key_floats;
        if (value_floats) std::memset(v_block, 0, sizeof(float) * value_floats);
        std::memset(s, 0, sizeof(float) * rows_up * BLOCK);
        for (long r = 0; r < rows_up; r++) shrink[r] = 1;

        const long k_stride = size * c.key_stride[2], v_stride = size * c.value_stride[2];
        const long count = c.batch * c.groups * parts;
        long packed = -1;
        long index = next.fetch_add(1);
        while (index < count) {
            // The next part is taken before this one is done, so that its first block can be fetched in time.
            long after = next.fetch_add(1);
            Part p = part(index), then = after < count ? part(after) : Part{0, 0, 0, 0};
            long head = p.b * c.groups + p.g;
            if (head != packed) pack_query(p, q, line);
            packed = head;
            std::memset(out, 0, sizeof(float) * rows_up * width_up);
            for (long r = 0; r < rows_up; r++) top[r] = NONE, total[r] = 0;
            for (long j = p.first; j < p.last; j += block) {
                const long n = std::min(block, p.last - j);
                if (hidden(p.b, j, n)) continue;
                const bool inside = j + block < p.last;
                const Part& from = inside ? p : then;
                const long at = inside ? j + block : then.first, many = std::min(block, from.last - at);
                Ahead keys(many > 0 ? key_at(from, at) : nullptr, size * c.head_dim, k_stride, many);
                Ahead values(many > 0 ? value_at(from, at) : nullptr, size * c.value_dim, v_stride, many);

                const float* k = (const float*)key_at(p, j);
                long k_row = k_stride / 4;
                if (!raw) {
                    for (long i = 0; i < n; i++)
                        widen(key_at(p, j + i), c.type, 1, k_block + i * units_up, (int)c.head_dim);
                    k = k_block, k_row = units_up;
                }
                score(q, k, k_row, n, s, scratch, keys);
                for (long r = 0; r < rows; r++) soften(p, r, j, (int)n, s + r * BLOCK, top[r], total[r], shrink[r]);
                if (value_floats) {
                    pack_value(value_at(p, j), v_stride, n, v_block);
                    sum_values(s, v_block, width_up, 0, pairs ? (n + 1) / 2 : n, out, shrink, values);
                } else {
                    const int part = (int)(c.value_dim % WIDTH);
                    sum_values(s, (const float*)value_at(p, j), v_stride / 4, part, n, out, shrink, values);
                }
            }
            if (parts == 1) {
                for (long r = 0; r < rows; r++) write(p, r, out + r * width_up, total[r]);
            } else {
                float* share = shares + index * share_floats;
                std::memcpy(share, out, sizeof(float) * rows * width_up);
                for (long r = 0; r < rows; r++) {
                    share[rows * width_up + 2 * r] = top[r];
                    share[rows * width_up + 2 * r + 1] = total[r];
                }
                if (finished[head].fetch_add(1, std::memory_order_acq_rel) == parts - 1) merge(p, out);
            }
            index = after;
        }
    }
};

template <class Op>
void attend(const RegroupCall& call) {
    Work<Op> work(call);
    auto run = [](void* data) { ((Work<Op>*)data)->run(); };
    // The threads are those of the OpenMP runtime that torch brought: a second pool beside it would fight for cores.
    typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);
    long threads = std::min<long>(call.threads, call.batch * call.groups * work.parts);
    if (call.parallel && threads > 1)
        ((Parallel)call.parallel)(run, &work, (unsigned)threads, 0);
    else
        run(&work);
}

}  // namespace

extern "C" {

// 1: float16 can be converted. 2: AVX2 with FMA, and no AVX-512.
int regroup_features() {
    int found = HALVES ? 1 : 0;
#if defined(__AVX2__) && defined(__FMA__) && !defined(__AVX512F__)
    found |= 2;
#endif
    return found;
}

void regroup_decode(const RegroupCall* call) {
#if defined(__AVX512BF16__)
    // A pair of bfloat16 is read as one float: rows that do not hold whole pairs are converted instead.
    if (call->type == BFLOAT16 && call->head_dim % 2 == 0 && call->key_stride[2] % 2 == 0) return attend<Pairs>(*call);
#endif
    attend<Floats>(*call);
}
}
