// Vectors of the processor that this is compiled for: AVX-512, AVX2 with FMA, or four floats of whatever there is.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
// Register blocks are arrays that must end up in registers: loops over them are unrolled before that is decided.
#define UNROLL _Pragma("GCC unroll 16")

#if defined(__AVX512F__)

constexpr int WIDTH = 16;  // floats in a vector
constexpr int DOTS = 4;    // query rows that a register block of `dots` holds, with four keys
constexpr int ROWS = 4;    // query rows that a register block of `weigh` holds
constexpr int strip(int rows) { return rows <= 2 ? 8 : 4; }  // and vectors of a value row
constexpr int keys(int) { return 8; }  // keys that a register block of `outer` holds, with so many vectors of rows
typedef __m512 vec;
INLINE vec load(const float* p) { return _mm512_loadu_ps(p); }
INLINE vec load_part(const float* p, int n) { return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p); }
INLINE void store(float* p, vec v) { _mm512_storeu_ps(p, v); }
INLINE vec splat(float x) { return _mm512_set1_ps(x); }
INLINE vec fused(vec a, vec b, vec sum) { return _mm512_fmadd_ps(a, b, sum); }

// The sums of four vectors, as four floats.
INLINE void sum4(vec a, vec b, vec c, vec d, float* out) {
    vec ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    vec cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    vec low = _mm512_shuffle_ps(ab, cd, 0x44), high = _mm512_shuffle_ps(ab, cd, 0xee);
    vec all = _mm512_add_ps(low, high);
    __m256 upper = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(all), 1));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), upper);
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

// The greatest and the sum of n floats, n in whole sixteens.
INLINE float highest(const float* x, int n) {
    vec most = load(x);
    for (int i = 16; i < n; i += 16) most = _mm512_max_ps(most, load(x + i));
    return _mm512_reduce_max_ps(most);
}
INLINE float total(const float* x, int n) {
    vec sum = load(x);
    for (int i = 16; i < n; i += 16) sum = _mm512_add_ps(sum, load(x + i));
    return _mm512_reduce_add_ps(sum);
}

// to[i][j] = from[j][i] for WIDTH by WIDTH floats.
INLINE void transpose(const float* from, long from_row, float* to, long to_row) {
    vec a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = load(from + i * from_row);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_shuffle_ps(b[i], b[i + 2], 0x44);
        a[i + 1] = _mm512_shuffle_ps(b[i], b[i + 2], 0xee);
        a[i + 2] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0x44);
        a[i + 3] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0xee);
    }
    for (int i = 0; i < 4; i++) {
        b[i] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0x88);
        b[i + 4] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd);
        b[i + 8] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0x88);
        b[i + 12] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        store(to + i * to_row, _mm512_shuffle_f32x4(b[i], b[i + 8], 0x88));
        store(to + (i + 4) * to_row, _mm512_shuffle_f32x4(b[i + 4], b[i + 12], 0x88));
        store(to + (i + 8) * to_row, _mm512_shuffle_f32x4(b[i], b[i + 8], 0xdd));
        store(to + (i + 12) * to_row, _mm512_shuffle_f32x4(b[i + 4], b[i + 12], 0xdd));
    }
}

#elif defined(__AVX2__) && defined(__FMA__)

// Half as many registers; eight sums or more keep both multipliers busy, each of which takes four or five cycles.
constexpr int WIDTH = 8, DOTS = 2, ROWS = 4;
constexpr int strip(int rows) { return 8 / rows; }
constexpr int keys(int vectors) { return vectors == 2 ? 6 : 8; }
typedef __m256 vec;
INLINE vec load(const float* p) { return _mm256_loadu_ps(p); }
INLINE vec load_part(const float* p, int n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane));
}
INLINE void store(float* p, vec v) { _mm256_storeu_ps(p, v); }
INLINE vec splat(float x) { return _mm256_set1_ps(x); }
// By name: for some processors compilers take chains of a * b + c apart where they see fit.
INLINE vec fused(vec a, vec b, vec sum) { return _mm256_fmadd_ps(a, b, sum); }
INLINE void sum4(vec a, vec b, vec c, vec d, float* out) {
    vec all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}
INLINE void transpose(const float* from, long from_row, float* to, long to_row) {
    vec a[8], b[8];
    UNROLL
    for (int i = 0; i < 8; i++) a[i] = load(from + i * from_row);
    UNROLL
    for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
    UNROLL
    for (int i = 0; i < 8; i += 4) {
        a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
        a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
        a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
        a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
    }
    UNROLL
    for (int i = 0; i < 4; i++) {
        store(to + i * to_row, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
        store(to + (i + 4) * to_row, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
    }
}

#else

constexpr int WIDTH = 4, DOTS = 4, ROWS = 4;
constexpr int strip(int rows) { return rows <= 2 ? 8 : 4; }
constexpr int keys(int) { return 8; }
typedef float vec __attribute__((vector_size(16)));
INLINE vec load(const float* p) {
    vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
INLINE vec load_part(const float* p, int n) {
    vec v = {0, 0, 0, 0};
    for (int i = 0; i < n; i++) v[i] = p[i];
    return v;
}
INLINE void store(float* p, vec v) { std::memcpy(p, &v, sizeof v); }
INLINE vec splat(float x) { return vec{x, x, x, x}; }
INLINE vec fused(vec a, vec b, vec sum) { return sum + a * b; }
INLINE void sum4(vec a, vec b, vec c, vec d, float* out) {
    out[0] = (a[0] + a[1]) + (a[2] + a[3]);
    out[1] = (b[0] + b[1]) + (b[2] + b[3]);
    out[2] = (c[0] + c[1]) + (c[2] + c[3]);
    out[3] = (d[0] + d[1]) + (d[2] + d[3]);
}
INLINE void transpose(const float* from, long from_row, float* to, long to_row) {
    for (int i = 0; i < WIDTH; i++)
        for (int j = 0; j < WIDTH; j++) to[i * to_row + j] = from[j * from_row + i];
}

#endif

// What is used several times is read once: where registers are few, compilers would rather read it at each use.
#if defined(__AVX2__) && !defined(__AVX512F__)
#define IN_REGISTER(v) asm("" : "+x"(v))
#else
#define IN_REGISTER(v) (void)(v)
#endif

#if !defined(__AVX512F__)
INLINE float highest(const float* x, int n) {
    float most[16];
    std::memcpy(most, x, sizeof most);
    for (int at = 16; at < n; at += 16)
        for (int i = 0; i < 16; i++) most[i] = x[at + i] > most[i] ? x[at + i] : most[i];
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++) most[i] = most[i + half] > most[i] ? most[i + half] : most[i];
    return most[0];
}
INLINE float total(const float* x, int n) {
    float sum[16];
    std::memcpy(sum, x, sizeof sum);
    for (int at = 16; at < n; at += 16)
        for (int i = 0; i < 16; i++) sum[i] += x[at + i];
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++) sum[i] += sum[i + half];
    return sum[0];
}
#endif

// What is multiplied and summed: floats, or pairs of bfloat16 in the room of a float.
struct Floats {
    static INLINE vec add_product(vec sum, vec a, vec b) { return fused(a, b, sum); }
};
#if defined(__AVX512BF16__)
struct Pairs {
    static INLINE vec add_product(vec sum, vec a, vec b) {
        return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
    }
};
// Sixteen floats to bfloat16, in place.
INLINE void narrow(const float* from, uint16_t* to) {
    __m256bh some = _mm512_cvtneps_pbh(load(from));
    std::memcpy(to, &some, 32);
}
#endif

INLINE float from_bf16(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

// To the nearest, ties to even; NaN stays NaN.
INLINE uint16_t to_bf16(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)(f != f ? 0x7fc0 : rounded);
}

#if defined(__F16C__)
INLINE float from_fp16(uint16_t x) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(x))); }
INLINE uint16_t to_fp16(float f) {
    return (uint16_t)_mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(f), _MM_FROUND_TO_NEAREST_INT));
}
constexpr bool HALVES = true;
#elif defined(__aarch64__)
INLINE float from_fp16(uint16_t x) {
    __fp16 h;
    std::memcpy(&h, &x, 2);
    return (float)h;
}
INLINE uint16_t to_fp16(float f) {
    __fp16 h = (__fp16)f;
    uint16_t x;
    std::memcpy(&x, &h, 2);
    return x;
}
constexpr bool HALVES = true;
#else
INLINE float from_fp16(uint16_t) { return 0; }
INLINE uint16_t to_fp16(float) { return 0; }
constexpr bool HALVES = false;
#endif

enum Type { FLOAT = 0, BFLOAT16 = 1, FLOAT16 = 2, BOOL = 3 };

// n numbers, `step` elements apart, to floats.
inline void widen(const void* from, long type, long step, float* to, int n) {
    if (type == FLOAT) {
        for (int i = 0; i < n; i++) to[i] = ((const float*)from)[i * step];
        return;
    }
    const uint16_t* p = (const uint16_t*)from;
    int i = 0;
    if (type == BFLOAT16) {
        if (step == 1)
            for (; i < n; i++) to[i] = from_bf16(p[i]);
        for (; i < n; i++) to[i] = from_bf16(p[i * step]);
        return;
    }
#if defined(__AVX512F__)
    if (step == 1)
        for (; i + 16 <= n; i += 16) store(to + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(p + i))));
#elif defined(__F16C__)
    if (step == 1)
        for (; i + 8 <= n; i += 8) _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + i))));
#endif
    for (; i < n; i++) to[i] = from_fp16(p[i * step]);
}

// What a thread works with, kept from call to call.
struct Room {
    std::vector<float> floats;
    float* take(size_t n) {
        if (floats.size() < n + 16) floats.resize(n + 16);
        return (float*)(((uintptr_t)floats.data() + 63) & ~(uintptr_t)63);
    }
};
