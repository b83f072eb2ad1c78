// What rows read of the keys and values before them. Of each set of instructions; see `vectors.h`.

constexpr float HIDDEN = -1e30f;

// Two rows of a request in one head; one by itself is taken twice.
template <int SIZE> struct Readers {
    int seen[2];                // keys; the second row sees no fewer
    float *weights;             // (seen + 7) / 8 pairs: of eight keys, for each row
    const float *distances[2];  // added to the score of a key at position 0, and so on
    Pair query[SIZE / LANES];

    float *weight(unsigned row, unsigned key) const { return weights + (key / LANES * 2 + row) * LANES + key % LANES; }
    float *block(int number) const { return weights + number * 2 * LANES; }
    int blocks() const { return (seen[1] + LANES - 1) / LANES; }
};

// The scores of all keys.  keys (C, SIZE)
template <int SIZE> INLINE void score(const Readers<SIZE> &r, const float *keys) {
    const int end = r.seen[1];
    for (int first = 0; first < end; first += 4) {
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

// Values by their weights, times `scale`.  values (C, SIZE), mixed: of each row, (SIZE,)
template <int SIZE> INLINE void mix(const Readers<SIZE> &r, const float *values, Pair scale, float *const (&mixed)[2]) {
    Pair sum[SIZE / LANES] = {};
    for (int first = 0; first < r.seen[1]; first += LANES)
        for (int key = first; key < (first + LANES < r.seen[1] ? first + LANES : r.seen[1]); key++, values += SIZE) {
            const float *weight = r.weight(0, first) + key - first;  // 0 where a row does not see the key, whose values are finite
            const Pair by = both(all(weight[0]), all(weight[LANES]));
            for (int i = 0; i < SIZE / LANES; i++) sum[i] = fused(twice(load(values + i * LANES)), by, sum[i]);
        }
    for (int i = 0; i < SIZE / LANES; i++)
        for (int row = 0; row < 2; row++) store(mixed[row] + i * LANES, half(sum[i] * scale, row));
}

// Softmax in one head of the scores of each of a request's last `count` rows over the keys that it sees, times their values.
// qkv: of its first row, (rows, 3 D); weights (2, C rounded up to a multiple of 8); mixed (count, D)
template <int SIZE>
static void attend(const Network &net, const Request &r, int layer, int head, int count, const float *qkv, bool in_a_row,
                   float *weights, float *mixed) {
    const float *keys = r.caches[2 * layer] + static_cast<long>(head) * r.room * SIZE;
    const float *values = r.caches[2 * layer + 1] + static_cast<long>(head) * r.room * SIZE;
    const float *distances = net.distances + static_cast<long>(head) * (2 * net.farthest + 2 + LANES) + net.farthest;
    const float by = 1.0f / __builtin_sqrtf(SIZE);
    Readers<SIZE> two;
    two.weights = weights;
    for (int first = r.rows - count; first < r.rows; first += 2) {
        const float *query[2];
        float *to[2];
        for (int which = 0; which < 2; which++) {
            const int row = first + which < r.rows ? first + which : first;
            query[which] = qkv + static_cast<long>(row) * 3 * net.width + head * SIZE;
            to[which] = mixed + static_cast<long>(row - r.rows + count) * net.width + head * SIZE;
            two.distances[which] = distances - r.positions[row];
            two.seen[which] = r.kept + row + 1;
        }
        for (int i = 0; i < SIZE / LANES; i++)
            two.query[i] = both(load(query[0] + i * LANES) * by, load(query[1] + i * LANES) * by);
        score(two, keys);
        mix(two, values, softmax(two, r.places, in_a_row), to);
    }
}
