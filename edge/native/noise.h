// Gumbel noise of the whole vocabulary, and what it draws. Of each set of instructions; see `vectors.h`.

// Words of 32 bits, each with room for a product in 64. Only the lower halves count: products read no others.
#if defined(VNNI_512)
typedef uint64_t Wide __attribute__((vector_size(64)));
typedef float Draws __attribute__((vector_size(64)));
INLINE Wide times(Wide words, uint32_t by) { return (Wide)_mm512_mul_epu32((__m512i)words, _mm512_set1_epi64(by)); }
constexpr Wide NUMBERS = {0, 1, 2, 3, 4, 5, 6, 7};
constexpr Wide FRONT = {0, 8, 1, 9, 2, 10, 3, 11}, BACK = {4, 12, 5, 13, 6, 14, 7, 15};
#else
typedef uint64_t Wide __attribute__((vector_size(32)));
typedef float Draws __attribute__((vector_size(32)));
INLINE Wide times(Wide words, uint32_t by) { return (Wide)_mm256_mul_epu32((__m256i)words, _mm256_set1_epi64x(by)); }
constexpr Wide NUMBERS = {0, 1, 2, 3};
constexpr Wide FRONT = {0, 4, 1, 5}, BACK = {2, 6, 3, 7};
#endif
typedef int32_t Bits __attribute__((vector_size(sizeof(Wide))));
typedef uint32_t Words __attribute__((vector_size(sizeof(Wide))));
constexpr int ROUNDS = 10;

INLINE Draws gumbel(Wide pairs) {
    const Draws bits = __builtin_convertvector((Bits)((Words)pairs >> 9), Draws);
    const Draws uniform = (bits + 0.5f) * 1.1920928955078125e-07f;  // (23 bits + 1/2) / 2^23, strictly inside (0, 1)
    return 0.0f - logarithm<Draws, Bits>(0.0f - logarithm<Draws, Bits>(uniform));
}

// `block_noise` of edge.decoding.philox: token i is word i mod 4 of the counter (i div 4, position, 0, 2).
static void make_noise(uint64_t seed, uint32_t position, int vocabulary, float *noise) {
    constexpr int COUNTERS = sizeof(Wide) / sizeof(uint64_t);
    Wide low[ROUNDS], high[ROUNDS];
    for (uint32_t round = 0; round < ROUNDS; round++) {
        low[round] = Wide{} + (static_cast<uint32_t>(seed) + round * 0x9E3779B9);
        high[round] = Wide{} + (static_cast<uint32_t>(seed >> 32) + round * 0xBB67AE85);
    }
    for (int first = 0; first < vocabulary; first += 4 * COUNTERS) {
        Wide a = NUMBERS + first / 4, b = Wide{} + position, c = {}, d = Wide{} + 2;
        for (int round = 0; round < ROUNDS; round++) {
            const Wide p = times(a, 0xD2511F53), q = times(c, 0xCD9E8D57);
            a = (q >> 32) ^ b ^ low[round], b = q, c = (p >> 32) ^ d ^ high[round], d = p;
        }
        const Wide ab = (a & 0xFFFFFFFF) | b << 32, cd = (c & 0xFFFFFFFF) | d << 32;  // a counter's words side by side
        const Draws made[2] = {gumbel(__builtin_shuffle(ab, cd, FRONT)), gumbel(__builtin_shuffle(ab, cd, BACK))};
        const int size = vocabulary - first < 4 * COUNTERS ? vocabulary - first : 4 * COUNTERS;
        memcpy(noise + first, made, size * sizeof(float));
    }
}

// Of a row (V,): the token with the best score / temperature + noise, the first of equals, and how many tokens score as
// well as it or better: its rank, 0 where its score is not finite. Temperature 0: the best score, without noise.
static void draw(const float *scores, const float *noise, int vocabulary, float temperature, int32_t *token, int32_t *rank) {
    Floats best = all(-__builtin_inff());
    Ints number = {0, 1, 2, 3, 4, 5, 6, 7}, where = number;
    for (int i = 0; i < vocabulary; i += LANES, number += LANES) {
        const Floats noisy = temperature == 0 ? load(scores + i) : load(scores + i) / temperature + load(noise + i);
        const Ints better = noisy > best || noisy != noisy;  // what is not a number wins, and is found out below
        best = better ? noisy : best, where = better ? number : where;
    }
    int winner = 0;
    for (int i = 1; i < LANES; i++)
        if (best[i] > best[winner] || best[i] != best[i] || (best[i] == best[winner] && where[i] < where[winner])) winner = i;
    *token = where[winner];
    const float own = scores[*token];
    Ints as_good = {};
    for (int i = 0; i < vocabulary; i += LANES) as_good -= load(scores + i) >= own;
    *rank = 0;
    if (__builtin_isfinite(own))
        for (int i = 0; i < LANES; i++) *rank += as_good[i];
}

// Scores of guided rows; see `Request`. space (V,)
static void guide(const Request &r, const Request &other, int vocabulary, float *space) {
    for (int row = 0; row < r.scored; row++) {
        float *scores = r.scores + static_cast<long>(row) * vocabulary;
        const float *theirs = other.scores + static_cast<long>(row) * vocabulary;
        for (int i = 0; i < vocabulary; i++)  // what is not a number cannot be sorted, and is found out by `draw`
            space[i] = scores[i] == scores[i] ? scores[i] : __builtin_inff();
        std::nth_element(space, space + r.best - 1, space + vocabulary, [](float a, float b) { return a > b; });
        const float lowest = space[r.best - 1];
        for (int i = 0; i < vocabulary; i++)
            scores[i] = scores[i] < lowest ? NEVER : scores[i] + (scores[i] - theirs[i]) * r.guidance;
    }
}

// The noise of a position, made when it is first asked for.
static const float *noise_at(const Request &r, int position, int vocabulary) {
    const int row = position % r.noise_rows;
    float *noise = r.noise + static_cast<long>(row) * vocabulary;
    if (r.noise_of[row] != position) make_noise(r.seed, position, vocabulary, noise);
    r.noise_of[row] = position;
    return noise;
}

// After a pass: draws behind each scored row, as far as the drafts agree, and drafts again, as edge.decoding.blocks has
// it. Draws whose rank is above `top_rank` are left to the caller, with all that follows.
static void draw_and_draft(const Network &net, const Drafter *drafter, Request &r, const Space &s) {
    const int vocabulary = net.head.outputs, first = r.positions[r.rows - r.scored] + 1;
    const int32_t *drafts = r.tokens + r.rows - r.scored + 1;
    r.agreed = r.drafted = 0, r.left = NOTHING;
    for (int row = 0; row < r.scored; row++) {
        int32_t rank;
        const float *noise = r.temperature == 0 ? nullptr : noise_at(r, first + row, vocabulary);
        draw(r.scores + static_cast<long>(row) * vocabulary, noise, vocabulary, r.temperature, r.drawn + row, &rank);
        r.left = rank == 0 ? NOT_FINITE : r.temperature != 0 && rank > r.top_rank ? FILTERING : NOTHING;
        if (r.left) return;
        r.agreed = row;
        if (row == r.scored - 1 || drafts[row] != r.drawn[row]) break;
    }
    const int token = r.drawn[r.agreed], at = first + r.agreed, room = r.last - at - 1;
    if (!drafter || token == EOS) return;
    int count = r.window < room ? r.window : room;
    count = count < drafter->depths ? count : drafter->depths;
    if (count <= 0) return;
    memcpy(s.x, r.states + static_cast<long>(r.agreed) * net.width, net.width * sizeof(float));
    draft(*drafter, s.x, token, [&](int depth) { return noise_at(r, at + 1 + depth, vocabulary); }, r.draft_temperature,
          count, r.drafts, s);
    while (r.drafted < count && r.drafts[r.drafted] != EOS) r.drafted++;
}
