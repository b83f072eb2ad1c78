// Functions of eight numbers, or of eight of each of two rows. Every operation is one IEEE rounding, in an order that the source fixes (fused where it says
// so, never reordered), so that all processors give the same bits. No include guard: once for each set of instructions.
#undef INLINE
#define INLINE static inline __attribute__((always_inline))

INLINE Floats load(const float *p) { return *reinterpret_cast<const Floats *>(p); }
INLINE void store(float *p, Floats v) { *reinterpret_cast<Floats *>(p) = v; }
template <typename F = Floats> INLINE F all(float x) { return x - F{}; }
template <typename F> INLINE F least(F a, F b) { return a < b ? a : b; }
template <typename F> INLINE F most(F a, F b) { return a > b ? a : b; }
INLINE Floats fused(Floats a, Floats b, Floats c) { return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }

// Eight numbers of each of two rows: one register, or two.
#if defined(VNNI_512)
typedef float Pair __attribute__((vector_size(64), aligned(4), may_alias));
INLINE Pair load_pair(const float *p) { return *reinterpret_cast<const Pair *>(p); }
INLINE void store_pair(float *p, Pair v) { *reinterpret_cast<Pair *>(p) = v; }
INLINE Pair both(Floats a, Floats b) { return (Pair)_mm512_insertf32x8(_mm512_castps256_ps512((__m256)a), (__m256)b, 1); }
INLINE Pair twice(Floats v) { return (Pair)_mm512_broadcast_f32x8((__m256)v); }
INLINE Floats half(Pair v, int which) { return load(reinterpret_cast<const float *>(&v) + which * LANES); }
INLINE Pair fused(Pair a, Pair b, Pair c) { return (Pair)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
template <typename Function> INLINE Pair each(Pair v, Function f) { return f(v); }
#else
struct Pair {
    Floats first, second;
};
INLINE Pair load_pair(const float *p) { return {load(p), load(p + LANES)}; }
INLINE void store_pair(float *p, Pair v) { store(p, v.first), store(p + LANES, v.second); }
INLINE Pair both(Floats a, Floats b) { return {a, b}; }
INLINE Pair twice(Floats v) { return {v, v}; }
INLINE Floats half(Pair v, int which) { return which ? v.second : v.first; }
INLINE Pair fused(Pair a, Pair b, Pair c) { return {fused(a.first, b.first, c.first), fused(a.second, b.second, c.second)}; }
INLINE Pair most(Pair a, Pair b) { return {most(a.first, b.first), most(a.second, b.second)}; }
INLINE Pair operator+(Pair a, Pair b) { return {a.first + b.first, a.second + b.second}; }
INLINE Pair operator-(Pair a, Pair b) { return {a.first - b.first, a.second - b.second}; }
INLINE Pair operator*(Pair a, Pair b) { return {a.first * b.first, a.second * b.second}; }
template <typename Function> INLINE Pair each(Pair v, Function f) { return {f(v.first), f(v.second)}; }
#endif

// The highest power's coefficient first.
template <typename F, int N> INLINE F polynomial(F x, const float (&terms)[N]) {
    F p = all<F>(terms[0]);
    for (int i = 1; i < N; i++) p = fused(p, x, all<F>(terms[i]));
    return p;
}

INLINE Half fold(Floats v) {
    Half halves[2];
    memcpy(halves, &v, sizeof halves);
    return halves[0] + halves[1];
}

INLINE float sum(Floats v) {
    const Half h = fold(v);
    return (h[0] + h[2]) + (h[1] + h[3]);
}

// The sums of four vectors, each as `sum` has it.
INLINE Half sums(Floats a, Floats b, Floats c, Floats d) {
    const Half p = fold(a), q = fold(b), r = fold(c), s = fold(d);
    typedef int32_t Pick __attribute__((vector_size(16)));
    const Half front = __builtin_shuffle(p, q, Pick{0, 4, 1, 5}) + __builtin_shuffle(p, q, Pick{2, 6, 3, 7});
    const Half back = __builtin_shuffle(r, s, Pick{0, 4, 1, 5}) + __builtin_shuffle(r, s, Pick{2, 6, 3, 7});
    return __builtin_shuffle(front, back, Pick{0, 1, 4, 5}) + __builtin_shuffle(front, back, Pick{2, 3, 6, 7});
}

constexpr float HALF_UNIT = 12582912.0f;  // 1.5 · 2^23: added and taken away, it rounds to the nearest, ties to even
template <typename F> INLINE F rounded(F v) { return (v + HALF_UNIT) - HALF_UNIT; }

// e^x for x <= 0: x = n ln 2 + r, polynomial in r as in Cephes' expf (relative error 2e-7).
template <typename F> INLINE F exponential(F x) {
    typedef decltype(x < x) I;  // as many integers
    x = most(x, all<F>(-87.0f));
    const F n = rounded(x * 1.44269504f);
    const F r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    constexpr float TERMS[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                               4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
    const F p = fused(polynomial(r, TERMS), r * r, r) + 1.0f;
    return (F)((I)p + (__builtin_convertvector(n, I) << 23));
}

// The natural logarithm of positive numbers F that are not denormal, I as wide: polynomial of Cephes' logf.
template <typename F, typename I> INLINE F logarithm(F x) {
    constexpr int32_t ROOT_OF_HALF = 0x3f3504f3;  // so that the mantissa lies between it and its double
    const I bits = (I)x, e = (bits - ROOT_OF_HALF) >> 23;
    const F m = (F)(bits - (e << 23)) - 1.0f, n = __builtin_convertvector(e, F), z = m * m;
    F p = m * 7.0376836292e-2f - 1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    const F y = (p * m * z - n * 2.12194440e-4f) - z * 0.5f;
    return (m + y) + n * 0.693359375f;
}

// x Φ(x): erf as a quotient of polynomials within ±4, where it is ±1 in float32 (absolute error 2e-7).
template <typename F> INLINE F gelu(F x) {
    const F t = least(most(x * 0.70710678f, all<F>(-4.0f)), all<F>(4.0f)), s = t * t;
    constexpr float ABOVE[] = {-2.72614225801306e-10f, 2.77068142495902e-08f,  -2.10102402082508e-06f, -5.69250639462346e-05f,
                               -7.34990630326855e-04f, -2.95459980854025e-03f, -1.60960333262415e-02f};
    constexpr float BELOW[] = {-1.45660718464996e-05f, -2.13374055278905e-04f, -1.68282697438203e-03f,
                               -7.37332916720468e-03f, -1.42647390514189e-02f};
    return 0.5f * x * (1.0f + t * polynomial(s, ABOVE) / polynomial(s, BELOW));
}

#if defined(VNNI_512)
INLINE Pair fold(Pair v, Pair w) {  // four numbers of each row of v, then of w
    return (Pair)_mm512_shuffle_f32x4((__m512)v, (__m512)w, 0x88) + (Pair)_mm512_shuffle_f32x4((__m512)v, (__m512)w, 0xDD);
}
#endif

// The sums of four pairs: those of the first rows, then of the second, each as `sum` has it.
INLINE Floats sums(Pair a, Pair b, Pair c, Pair d) {
#if defined(VNNI_512)
    const __m512 ab = (__m512)fold(a, b), cd = (__m512)fold(c, d);
    const Pair two = (Pair)_mm512_unpacklo_ps(ab, cd) + (Pair)_mm512_unpackhi_ps(ab, cd);
    const Pair one = two + (Pair)_mm512_permute_ps((__m512)two, 0xEE);  // the first two of four: for each row of a and c, then of b and d
    const __m512i order = _mm512_setr_epi32(0, 8, 1, 9, 4, 12, 5, 13, 0, 0, 0, 0, 0, 0, 0, 0);
    return half((Pair)_mm512_permutexvar_ps(order, (__m512)one), 0);
#else
    Floats v;
    for (int which = 0; which < 2; which++) {
        const Half row = sums(half(a, which), half(b, which), half(c, which), half(d, which));
        memcpy(reinterpret_cast<float *>(&v) + 4 * which, &row, sizeof row);
    }
    return v;
#endif
}

INLINE void normalize(const Norm &norm, const float *x, int width, float *y) {
    Floats total = {}, squares = {};
    for (int i = 0; i < width; i += LANES) total += load(x + i);
    const float mean = sum(total) / width;
    for (int i = 0; i < width; i += LANES) {
        const Floats off = load(x + i) - mean;
        squares = fused(off, off, squares);
    }
    const float scale = 1.0f / __builtin_sqrtf(sum(squares) / width + 1e-5f);
    for (int i = 0; i < width; i += LANES)
        store(y + i, fused((load(x + i) - mean) * scale, load(norm.weight + i), load(norm.bias + i)));
}

INLINE void add(float *x, const float *y, long size) {
    for (long i = 0; i < size; i += LANES) store(x + i, load(x + i) + load(y + i));
}
