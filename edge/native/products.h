// Products of uint8 rows with int8 matrices: sums are exact, so a row's do not depend on those beside it.
// Of each set of instructions; see `vectors.h`.

constexpr int COLUMNS = 64;  // of a tile
constexpr int GROUPS = COLUMNS / LANES;
constexpr int TALLEST = 6;  // rows of a tile

struct Rows {
    uint8_t *values;  // (rows, inputs)
    float *scales;    // (rows,)
    int32_t *zeros;
};

// One row as uint8: value = scale · (number − zero), halves to even, as ONNX's QuantizeLinear.
INLINE void quantize(const float *x, float scale, int zero, int size, uint8_t *values) {
    const float low = -zero, high = 255 - zero;
    for (int i = 0; i < size; i += LANES) {
        const Floats v = rounded(least(most(load(x + i) / scale, all(low)), all(high)));
        *reinterpret_cast<Bytes *>(values + i) = __builtin_convertvector(__builtin_convertvector(v, Ints) + zero, Bytes);
    }
}

// The scale and zero of a row by its own extremes, as ONNX's DynamicQuantizeLinear.
INLINE void own_scale(const float *x, int size, float *scale, int32_t *zero) {
    Floats low = {}, high = {};
    for (int i = 0; i < size; i += LANES) low = least(low, load(x + i)), high = most(high, load(x + i));
    float a = 0, b = 0;
    for (int i = 0; i < LANES; i++) a = low[i] < a ? low[i] : a, b = high[i] > b ? high[i] : b;
    *scale = b > a ? (b - a) / 255.0f : 1.0f;
    *zero = static_cast<int32_t>((-a / *scale + HALF_UNIT) - HALF_UNIT);
}

#if defined(VNNI_512)
typedef __m512i Part;
constexpr int PARTS = 4;  // of a tile at once: with six rows, 24 sums and four of weights in 32 registers
INLINE Part load_part(const int8_t *weights) { return _mm512_loadu_si512(weights); }
INLINE Part dot(Part sums, int32_t four, Part weights) { return _mm512_dpbusd_epi32(sums, _mm512_set1_epi32(four), weights); }
#else
typedef __m256i Part;
constexpr int PARTS = 2;  // 12 sums and two of weights in 16 registers
INLINE Part load_part(const int8_t *weights) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(weights)); }
INLINE Part dot(Part sums, int32_t four, Part weights) { return _mm256_dpbusd_avx_epi32(sums, _mm256_set1_epi32(four), weights); }
#endif

// Products of rows (ROWS, inputs) with the columns of a tile. A column's four weights lie where its sum does.
template <int ROWS> INLINE void tile(const uint8_t *values, int inputs, const int8_t *weights, Ints sums[][GROUPS]) {
    for (unsigned from = 0; from < 4 * COLUMNS; from += PARTS * sizeof(Part)) {
        Part own[ROWS][PARTS];
#pragma GCC unroll 8
        for (int row = 0; row < ROWS; row++)
#pragma GCC unroll 8
            for (int part = 0; part < PARTS; part++) own[row][part] = Part{};
        for (int i = 0; i < inputs; i += 4) {
            Part w[PARTS];
#pragma GCC unroll 8
            for (int part = 0; part < PARTS; part++) w[part] = load_part(weights + i * COLUMNS + from + part * sizeof(Part));
#pragma GCC unroll 8
            for (int row = 0; row < ROWS; row++) {
                int32_t four;
                memcpy(&four, values + static_cast<long>(row) * inputs + i, 4);
#pragma GCC unroll 8
                for (int part = 0; part < PARTS; part++) own[row][part] = dot(own[row][part], four, w[part]);
            }
        }
#pragma GCC unroll 8
        for (int row = 0; row < ROWS; row++)
#pragma GCC unroll 8
            for (int part = 0; part < PARTS; part++)
                memcpy(reinterpret_cast<char *>(sums[row]) + from + part * sizeof(Part), &own[row][part], sizeof(Part));
    }
}

// y (rows, outputs) = scale · (x − zero) · weights + bias
INLINE void product(const Matrix &m, const Rows &x, int rows, float *y) {
    for (int column = 0; column < m.outputs; column += COLUMNS) {
        const int8_t *weights = m.weights + static_cast<long>(column) * m.inputs;
        for (int first = 0; first < rows; first += TALLEST) {
            const int tall = rows - first < TALLEST ? rows - first : TALLEST;
            const uint8_t *values = x.values + static_cast<long>(first) * m.inputs;
            Ints sums[TALLEST][GROUPS];
            switch (tall) {
            case 1: tile<1>(values, m.inputs, weights, sums); break;
            case 2: tile<2>(values, m.inputs, weights, sums); break;
            case 3: tile<3>(values, m.inputs, weights, sums); break;
            case 4: tile<4>(values, m.inputs, weights, sums); break;
            case 5: tile<5>(values, m.inputs, weights, sums); break;
            default: tile<6>(values, m.inputs, weights, sums);
            }
            for (int group = 0; group < GROUPS; group++) {
                const int at = column + LANES * group;
                if (at >= m.outputs) break;
                const Ints of_column = *reinterpret_cast<const Ints *>(m.sums + at);
                for (int row = 0; row < tall; row++) {
                    const Ints whole = sums[row][group] - of_column * x.zeros[first + row];
                    const Floats scales = load(m.scales + at) * x.scales[first + row];
                    const Floats result = fused(__builtin_convertvector(whole, Floats), scales, load(m.bias + at));
                    store(y + static_cast<long>(first + row) * m.outputs + at, result);
                }
            }
        }
    }
}

// The same of float32 rows, quantized first.
static void multiply(const Matrix &m, const float *x, int rows, const Rows &space, float *y) {
    for (int row = 0; row < rows; row++) {
        const float *from = x + static_cast<long>(row) * m.inputs;
        space.scales[row] = m.input_scale, space.zeros[row] = m.input_zero;
        if (m.input_scale == 0) own_scale(from, m.inputs, space.scales + row, space.zeros + row);
        quantize(from, space.scales[row], space.zeros[row], m.inputs, space.values + static_cast<long>(row) * m.inputs);
    }
    product(m, space, rows, y);
}
