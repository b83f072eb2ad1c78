// What rows read of the keys and values before them. Of each set of instructions; see `vectors.h`.

constexpr int BLOCK = 64;  // keys, then values, that all rows of a group read while they are near
constexpr float HIDDEN = -1e30f;

// Two rows of a request in one head; one by itself is taken twice.
template <int SIZE> struct Readers {
    int seen[2];                // keys; the second row sees no fewer
    float *weights;             // (seen + 7) / 8 pairs: of eight keys, for each row
    const float *distances[2];  // added to the score of a key at position 0, and so on
    Pair query[SIZE / LANES], mixed[SIZE / LANES];

    float *weight(unsigned row, unsigned key) const { return weights + (key / LANES * 2 + row) * LANES + key % LANES; }
    float *block(int number) const { return weights + number * 2 * LANES; }
    int blocks() const { return (seen[1] + LANES - 1) / LANES; }
};

// Scores of the keys from `first` on, BLOCK at most. keys (C, SIZE)
template <int SIZE> INLINE void score(const Readers<SIZE> &r, const float *keys, int first) {
    const int end = r.seen[1] < first + BLOCK ? r.seen[1] : first + BLOCK;
    for (; first < end; first += 4) {
        Pair of[4];
        for (int n = 0; n < 4; n++) {  // past the end the last key is taken again, and not used
            const float *key = keys + static_cast<long>(first + n < end ? first + n : end - 1) * SIZE;
            of[n] = r.query[0] * twice(load(key));
            for (int i = 1; i < SIZE / LANES; i++) of[n] = fused(r.query[i], twice(load(key + i * LANES)), of[n]);
        }
        Half scores[2];
        const Floats made = sums(of[0], of[1], of[2], of[3]);
        memcpy(scores, &made, sizeof scores);
        for (int row = 0; row < 2; row++) *reinterpret_cast<Half *>(r.weight(row, first)) = scores[row];
    }
}

// Scores become weights. in_a_row: whether the keys' positions follow each other.  → what to multiply what each row reads by
template <int SIZE> INLINE Pair softmax(const Readers<SIZE> &r, const int32_t *places, bool in_a_row) {
    const int blocks = r.blocks();
    for (int row = 0; row < 2; row++) {
        if (in_a_row)
            for (int i = 0; i < blocks; i++) {
                float *const at = r.weight(row, i * LANES);
                store(at, load(at) + load(r.distances[row] + places[0] + i * LANES));
            }
        else
            for (int i = 0; i < r.seen[row]; i++) *r.weight(row, i) += r.distances[row][places[i]];
        for (int i = r.seen[row]; i < blocks * LANES; i++) *r.weight(row, i) = HIDDEN;
    }
    Pair highest = twice(all(HIDDEN)), total = {};
    for (int i = 0; i < blocks; i++) highest = most(highest, load_pair(r.block(i)));
    float tops[2];
    for (int row = 0; row < 2; row++) {
        const Floats of = half(highest, row);
        tops[row] = of[0];
        for (int i = 1; i < LANES; i++) tops[row] = of[i] > tops[row] ? of[i] : tops[row];
    }
    const Pair top = both(all(tops[0]), all(tops[1]));
    for (int i = 0; i < blocks; i++) {
        const Pair shares = each(load_pair(r.block(i)) - top, [](auto below) {
            return below <= 0.1f * HIDDEN ? decltype(below){} : exponential(below);
        });
        store_pair(r.block(i), shares);
        total = total + shares;
    }
    return both(all(1.0f / sum(half(total, 0))), all(1.0f / sum(half(total, 1))));
}

// Values from `first` on, BLOCK at most, by their weights. values (C, SIZE)
template <int SIZE> INLINE void mix(Readers<SIZE> &r, const float *values, int first) {
    const int end = r.seen[1] < first + BLOCK ? r.seen[1] : first + BLOCK;
    Pair mixed[SIZE / LANES];
    memcpy(mixed, r.mixed, sizeof mixed);
    for (; first < end; first += LANES)
        for (int key = first; key < (first + LANES < end ? first + LANES : end); key++) {
            const float *weight = r.weight(0, first) + key - first;  // 0 where a row does not see the key, whose values are finite
            const Pair by = both(all(weight[0]), all(weight[LANES]));
            for (int i = 0; i < SIZE / LANES; i++)
                mixed[i] = fused(twice(load(values + static_cast<long>(key) * SIZE + i * LANES)), by, mixed[i]);
        }
    memcpy(r.mixed, mixed, sizeof mixed);
}

// Softmax in one head of the scores of each of a request's last `count` rows over the keys that it sees, times their values.
// qkv: of its first row, (rows, 3 D); weights (GROUP, C rounded up to a multiple of 8); mixed (count, D)
template <int SIZE>
static void attend(const Network &net, const Request &r, int layer, int head, int count, const float *qkv, bool in_a_row,
                   float *weights, float *mixed) {
    constexpr int PARTS = SIZE / LANES;
    const float *keys = r.caches[2 * layer] + static_cast<long>(head) * r.room * SIZE;
    const float *values = r.caches[2 * layer + 1] + static_cast<long>(head) * r.room * SIZE;
    const float *distances = net.distances + static_cast<long>(head) * (2 * net.farthest + 2 + LANES) + net.farthest;
    const float by = 1.0f / __builtin_sqrtf(SIZE);
    const long room = (r.room + LANES - 1) / LANES * LANES;
    Readers<SIZE> readers[GROUP / 2];
    for (int begin = r.rows - count; begin < r.rows; begin += GROUP) {
        const int rows = r.rows - begin < GROUP ? r.rows - begin : GROUP, pairs = (rows + 1) / 2;
        const auto of = [&](int pair, int which) { return 2 * pair + which < rows ? begin + 2 * pair + which : begin + rows - 1; };
        for (int pair = 0; pair < pairs; pair++) {
            Readers<SIZE> &own = readers[pair];
            own.weights = weights + 2 * room * pair;
            const float *query[2];
            for (int which = 0; which < 2; which++) {
                const int row = of(pair, which);
                query[which] = qkv + static_cast<long>(row) * 3 * net.width + head * SIZE;
                own.distances[which] = distances - r.positions[row];
                own.seen[which] = r.kept + row + 1;
            }
            for (int i = 0; i < PARTS; i++)
                own.query[i] = both(load(query[0] + i * LANES) * by, load(query[1] + i * LANES) * by), own.mixed[i] = Pair{};
        }
        const int seen = r.kept + begin + rows;
        for (int first = 0; first < seen; first += BLOCK)
            for (int pair = 0; pair < pairs; pair++) score(readers[pair], keys, first);
        Pair scales[GROUP / 2];
        for (int pair = 0; pair < pairs; pair++) scales[pair] = softmax(readers[pair], r.places, in_a_row);
        for (int first = 0; first < seen; first += BLOCK)
            for (int pair = 0; pair < pairs; pair++) mix(readers[pair], values, first);
        for (int pair = 0; pair < pairs; pair++)
            for (int which = 0; which < 2; which++)
                for (int i = 0; i < PARTS; i++)
                    store(mixed + static_cast<long>(of(pair, which) - r.rows + count) * net.width + head * SIZE + i * LANES,
                          half(readers[pair].mixed[i] * scales[pair], which));
    }
}
