// x W^T + bias for few rows of x on a CPU: every weight is read once, as it lies in the checkpoint, for all rows.
//
// With few rows a linear layer is a matter of reading its weights. The outputs are cut into pieces, which the threads
// take one after the other, and a piece into chunks. Of a chunk, blocks of columns are worked on in turn, so short that
// the block of x and the rows of weights stay in the first cache while register blocks of ROW_TILE by OUT_TILE sums go
// over them. Meanwhile the lines of weights that this thread needs next are fetched. bfloat16 is widened in registers:
// as pairs, of which x has the even columns beside the odd ones.
//
// The order in which a number is summed depends on the columns alone, not on how many rows there are, nor on threads:
// a row of a batch gives the bits that it gives by itself.

#include <algorithm>
#include <atomic>

#include "vectors.h"

namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int OUT_TILE = 6;  // 32 registers
#else
constexpr int OUT_TILE = 3;
#endif
constexpr int ROW_TILE = 4;
constexpr long OUTS = 2 * OUT_TILE;  // outputs of a chunk
constexpr long PIECES = 16;          // for each thread
constexpr long MOST_COLUMNS = 256;   // of a block: what is fetched ahead is used before long
constexpr long X_FLOATS = 2048;      // of a block of x, all rows: a quarter of a first cache
constexpr long ROOM_ROWS = 16;       // rows that are worked on at once
// What would take a register for too long is read again, from the first cache.
#define REREAD() asm("" ::: "memory")
typedef uint32_t bits __attribute__((vector_size(4 * WIDTH)));

struct Linear {
    const char *x, *weight, *bias;
    char* out;
    long rows, outs, columns, x_row, type;
    long step, size, columns_up;
    long piece;  // outputs that a thread takes at once: what it fetches ahead should be its own
    const float* packed;
    std::atomic<long> next{0};
};

// Weights as they are summed: a vector of floats, or one half of a vector of pairs, the even columns or the odd ones.
struct Plain {
    static constexpr int PARTS = 1, SIZE = 4;
    static INLINE vec widened(const char* from, int) { return load((const float*)from); }
};
struct Paired {
    static constexpr int PARTS = 2, SIZE = 2;
    static INLINE vec widened(const char* from, int half) {
        bits pairs;
        std::memcpy(&pairs, from, sizeof pairs);
        if (half) {
            pairs >>= 16;
            IN_REGISTER(pairs);  // or it becomes a mask, which takes a register from the sums
        }
        return (vec)(pairs << 16);
    }
};

// sums[r][o] += x[r] · weight[o] over `steps` steps, each WIDTH floats or WIDTH pairs. Of x, the vectors of R rows that
// are multiplied by the same weights lie side by side.
template <class Kind, int R, int O>
void tile(const float* x, const char* weight, long weight_row, long steps, vec* sums, const char* ahead) {
    constexpr long BYTES = Kind::PARTS * WIDTH * Kind::SIZE;
    vec sum[R][O];
    UNROLL
    for (int r = 0; r < R; r++)
        UNROLL
        for (int o = 0; o < O; o++) sum[r][o] = sums[r * OUTS + o];
    for (long i = 0; i < steps; i++) {
        if (ahead)
            UNROLL
            for (int o = 0; o < O; o++) __builtin_prefetch(ahead + o * weight_row + i * BYTES);
        UNROLL
        for (int half = 0; half < Kind::PARTS; half++) {
            vec w[O];
            UNROLL
            for (int o = 0; o < O; o++) {
                w[o] = Kind::widened(weight + o * weight_row + i * BYTES, half);
                IN_REGISTER(w[o]);
            }
            UNROLL
            for (int r = 0; r < R; r++, x += WIDTH) {
                vec y = load(x);
                IN_REGISTER(y);
                UNROLL
                for (int o = 0; o < O; o++) sum[r][o] = fused(y, w[o], sum[r][o]);
            }
            REREAD();
        }
    }
    UNROLL
    for (int r = 0; r < R; r++)
        UNROLL
        for (int o = 0; o < O; o++) sums[r * OUTS + o] = sum[r][o];
}

// `tile` for all rows from `first` column on: groups of ROW_TILE rows, and one of what is left.
template <class Kind, int O>
INLINE void rows_of(const Linear& c, const float* x, long first, long rows, const char* weight, long weight_row,
                    long steps, vec* sums, const char* ahead) {
    for (; rows >= ROW_TILE; rows -= ROW_TILE, ahead = nullptr) {
        tile<Kind, ROW_TILE, O>(x + ROW_TILE * first, weight, weight_row, steps, sums, ahead);
        x += ROW_TILE * c.columns_up, sums += ROW_TILE * OUTS;
    }
    if (rows == 3) tile<Kind, 3, O>(x + 3 * first, weight, weight_row, steps, sums, ahead);
    if (rows == 2) tile<Kind, 2, O>(x + 2 * first, weight, weight_row, steps, sums, ahead);
    if (rows == 1) tile<Kind, 1, O>(x + first, weight, weight_row, steps, sums, ahead);
}

INLINE float number(const char* from, long type, long i) {
    return type == FLOAT ? ((const float*)from)[i] : from_bf16(((const uint16_t*)from)[i]);
}

INLINE void write(const Linear& c, long row, long first, long outs, float* y) {
    const long at = row * c.outs + first;
    if (c.bias)
        for (long o = 0; o < outs; o++) y[o] += number(c.bias, c.type, first + o);
    for (long o = 0; o < outs; o++)
        if (c.type == FLOAT)
            ((float*)c.out)[at + o] = y[o];
        else
            ((uint16_t*)c.out)[at + o] = to_bf16(y[o]);
}

template <class Kind>
void work(Linear& c) {
    static thread_local Room room;
    const long most = std::min(MOST_COLUMNS, X_FLOATS / std::min(c.rows, ROOM_ROWS));
    const long block = std::max<long>(c.step, most / c.step * c.step);
    const long whole = c.columns / c.step * c.step, weight_row = c.columns * c.size;
    float* space = room.take(ROOM_ROWS * OUTS * WIDTH + OUTS * c.step);
    vec* sums = (vec*)space;
    char* tail = (char*)(space + ROOM_ROWS * OUTS * WIDTH);
    for (long first = 0, stop = 0;; first += OUTS) {
        if (first >= stop) {
            first = c.next.fetch_add(c.piece);
            if (first >= c.outs) return;
            stop = std::min(first + c.piece, c.outs);
        }
        const long outs = std::min(OUTS, stop - first);
        const char* weight = c.weight + first * weight_row;
        for (long r = 0; r < c.rows; r += ROOM_ROWS) {
            const long rows = std::min(ROOM_ROWS, c.rows - r);
            std::memset(space, 0, sizeof(float) * rows * OUTS * WIDTH);
            const float* x = c.packed + r * c.columns_up;
            auto over = [&](long from, const char* w, long row, long columns, const char* ahead) {
                long o = 0;
                for (; o + OUT_TILE <= outs; o += OUT_TILE)
                    rows_of<Kind, OUT_TILE>(c, x, from, rows, w + o * row, row, columns / c.step, sums + o,
                                            ahead ? ahead + o * row : nullptr);
                for (; o < outs; o++)
                    rows_of<Kind, 1>(c, x, from, rows, w + o * row, row, columns / c.step, sums + o,
                                     ahead ? ahead + o * row : nullptr);
            };
            for (long k = 0; k < whole; k += block) {
                const long columns = std::min(block, whole - k);
                // What comes next is the next block of these outputs, or the first of those after them.
                const char* ahead = k + block < whole             ? weight + (k + block) * c.size
                                    : first + OUTS + outs <= stop ? weight + OUTS * weight_row
                                                                  : nullptr;
                over(k, weight + k * c.size, weight_row, columns, r ? nullptr : ahead);
            }
            if (whole < c.columns) {
                std::memset(tail, 0, OUTS * c.step * c.size);
                for (long o = 0; o < outs; o++)
                    std::memcpy(tail + o * c.step * c.size, weight + o * weight_row + whole * c.size,
                                (c.columns - whole) * c.size);
                over(whole, tail, c.step * c.size, c.step, nullptr);
            }
            for (long i = 0; i < rows; i++) {
                float total[OUTS + 3];
                const vec* sum = sums + i * OUTS;  // beyond `outs` they are zero
                for (long o = 0; o < outs; o += 4) {
                    const long last = OUTS - 1;
                    sum4(sum[o], sum[std::min(o + 1, last)], sum[std::min(o + 2, last)], sum[std::min(o + 3, last)],
                         total + o);
                }
                write(c, r + i, first, outs, total);
            }
        }
    }
}

// Rows of x as floats, in whole steps and in the order of `tile`; of a step of pairs, the even columns before the odd.
float* pack(const Linear& c, Room& room) {
    float* to = room.take(c.rows * c.columns_up);
    if (c.columns < c.columns_up) std::memset(to, 0, sizeof(float) * c.rows * c.columns_up);
    const long parts = c.step / WIDTH, whole = c.columns / c.step * c.step;
    for (long r = 0; r < c.rows; r++) {
        const long group = r / ROW_TILE * ROW_TILE, side = std::min<long>(ROW_TILE, c.rows - group);
        float* row = to + group * c.columns_up + (r - group) * WIDTH;
        const char* from = c.x + r * c.x_row * c.size;
        for (long k = 0; k < whole; k += c.step, row += parts * side * WIDTH) {
            for (int half = 0; half < parts; half++)
                store(row + half * side * WIDTH, parts == 1 ? Plain::widened(from + 4 * k, half)
                                                            : Paired::widened(from + 2 * k, half));
        }
        for (long k = whole; k < c.columns; k++)
            row[k % parts * side * WIDTH + (k - whole) / parts] = number(from, c.type, k);
    }
    return to;
}

}  // namespace

// out (rows, outs) = x (rows, columns; x_row numbers apart) times weight (outs, columns) transposed, and bias (outs) or
// null; all of one type, FLOAT or BFLOAT16. `parallel`: GOMP_parallel, or null for one thread.
extern "C" void regroup_linear(const void* x, const void* weight, const void* bias, void* out, int64_t rows,
                               int64_t outs, int64_t columns, int64_t x_row, int64_t type, int64_t threads,
                               void* parallel) {
    static thread_local Room room;
    Linear c;
    c.x = (const char*)x, c.weight = (const char*)weight, c.bias = (const char*)bias, c.out = (char*)out;
    c.rows = rows, c.outs = outs, c.columns = columns, c.x_row = x_row, c.type = type;
    c.size = type == FLOAT ? 4 : 2;
    c.step = type == FLOAT ? WIDTH : 2 * WIDTH;
    c.columns_up = (columns + c.step - 1) / c.step * c.step;
    c.packed = pack(c, room);
    typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);
    threads = std::min<int64_t>(threads, (outs + OUTS - 1) / OUTS);
    const long pieces = PIECES * std::max<long>(1, threads);
    c.piece = ((outs + pieces - 1) / pieces + OUTS - 1) / OUTS * OUTS;
    auto run = [](void* data) {
        Linear& call = *(Linear*)data;
        call.type == FLOAT ? work<Plain>(call) : work<Paired>(call);
    };
    if (parallel && threads > 1)
        ((Parallel)parallel)(run, &c, (unsigned)threads, 0);
    else
        run(&c);
}
