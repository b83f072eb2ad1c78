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

// One row as uint8: value = scale · (number − zero), halves to even, as ONNX's QuantizeLinear. Quotients are those of a
// division, correctly rounded, without the time of one (Markstein, IBM J. Res. Dev. 34, 1990).
INLINE void quantize(const float *x, float scale, int zero, int size, uint8_t *values) {
    const float low = -zero * scale, high = (255 - zero) * scale, by = 1.0f / scale;
    for (int i = 0; i < size; i += LANES) {
        const Floats v = least(most(load(x + i), all(low)), all(high)), near = v * by;
        const Floats quotient = fused(fused(all(-scale), near, v), all(by), near);
        const Ints number = __builtin_convertvector(rounded(quotient), Ints) + zero;
        *reinterpret_cast<Bytes *>(values + i) = __builtin_convertvector(number, Bytes);
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

// Products of a few rows with the columns of a tile after another.
struct Vectors {
    int most = TALLEST;
    void tile_of(int rows, const uint8_t *values, int inputs, const int8_t *weights, Ints (*sums)[GROUPS]) {
        switch (rows) {
        case 1: return tile<1>(values, inputs, weights, sums);
        case 2: return tile<2>(values, inputs, weights, sums);
        case 3: return tile<3>(values, inputs, weights, sums);
        case 4: return tile<4>(values, inputs, weights, sums);
        case 5: return tile<5>(values, inputs, weights, sums);
        default: return tile<6>(values, inputs, weights, sums);
        }
    }
};

#if defined(AMX)
// The same by the matrix unit, whose registers hold 16 rows of 64 bytes: four of sums, one of rows, three of weights.
struct Tiles {
    static constexpr int LEAST = 2, MOST = 16, DEEP = 64, FOURS = 4 * COLUMNS;  // FOURS: bytes of four inputs' weights
    const bool used;
    int most, configured = 0;
    Vectors vectors;
    Tiles(int rows, int inputs) : used(rows >= LEAST && inputs % DEEP == 0), most(used ? MOST : TALLEST) {}
    ~Tiles() {
        if (configured) _tile_release();
    }
    void configure(int rows) {
        struct {
            uint8_t palette = 1, start = 0, unused[14] = {};
            uint16_t bytes[16] = {};
            uint8_t rows[16] = {};
        } shapes;
        for (int i = 0; i < 8; i++) shapes.bytes[i] = 64, shapes.rows[i] = i < 5 ? rows : 16;
        // The compiler does not know what the unit loads: neither this, nor the rows that were quantized before.
        __asm__ volatile("" ::: "memory");
        _tile_loadconfig(&shapes);
        configured = rows;
    }
    void tile_of(int rows, const uint8_t *values, int inputs, const int8_t *weights, Ints (*sums)[GROUPS]) {
        if (!used) return vectors.tile_of(rows, values, inputs, weights, sums);
        if (rows != configured) configure(rows);
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int i = 0; i < inputs; i += DEEP, weights += DEEP * COLUMNS) {
            _tile_loadd(4, values + i, inputs);
            _tile_loadd(5, weights, FOURS);
            _tile_dpbusd(0, 4, 5);
            _tile_loadd(6, weights + 64, FOURS);
            _tile_dpbusd(1, 4, 6);
            _tile_loadd(7, weights + 128, FOURS);
            _tile_dpbusd(2, 4, 7);
            _tile_loadd(5, weights + 192, FOURS);
            _tile_dpbusd(3, 4, 5);
        }
        char *const to = reinterpret_cast<char *>(sums);
        _tile_stored(0, to, FOURS);
        _tile_stored(1, to + 64, FOURS);
        _tile_stored(2, to + 128, FOURS);
        _tile_stored(3, to + 192, FOURS);
    }
};
#endif

// y (rows, outputs) = scale · (x − zero) · weights + bias
INLINE void product(const Matrix &m, const Rows &x, int rows, float *y) {
#if defined(AMX)
    Tiles unit(rows, m.inputs);
    Ints sums[Tiles::MOST][GROUPS];
#else
    Vectors unit;
    Ints sums[TALLEST][GROUPS];
#endif
    for (int column = 0; column < m.outputs; column += COLUMNS) {
        const int8_t *weights = m.weights + static_cast<long>(column) * m.inputs;
        for (int first = 0; first < rows; first += unit.most) {
            const int tall = rows - first < unit.most ? rows - first : unit.most;
            unit.tile_of(tall, x.values + static_cast<long>(first) * m.inputs, m.inputs, weights, sums);
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
