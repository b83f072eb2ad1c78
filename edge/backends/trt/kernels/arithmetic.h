// The arithmetic of one denoising step, compiled for the device (NVRTC) and by the system's compiler, for tests against
// numpy.
//
// The same as edge/decoding/philox.py and canvas.py: same Philox stream, same ties (the lower id, then the lower
// position), same order of float32 operations. Compile without contraction to FMA, or the last bit differs.
#pragma once

#ifdef __CUDACC__
#define SHARED_FN __device__ __forceinline__
#else
#include <math.h>
#define SHARED_FN static inline
#endif

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

enum Token { PAD = 0, BOS = 1, EOS = 2, MASK = 3, FIRST_TEXT_ID = 4 };            // shared/tokens.py
enum Domain { TOKEN_DOMAIN = 0, ORDER_DOMAIN = 1 };                               // edge/decoding/philox.py
enum Rule { RANDOM = 0, CONFIDENCE = 1, MARGIN = 2, ENTROPY = 3, THRESHOLD = 4, ENTROPY_BOUND = 5 };
enum Schedule { LINEAR = 0, COSINE = 1 };

constexpr float COLDEST = 1e-30f;       // edge/decoding/canvas.py: argmax already
constexpr float NEVER = -3.0e38f;       // below every score; finite, so that no difference of two is NaN

// One request's row of the batch. The host writes it when the request joins; the device advances `step`.
struct Row {
    u64 seed;
    int step;           // steps made
    int steps;          // the most there may be
    int rule;
    int top_k;
    float temperature;
    float top_p;
    float bound;        // THRESHOLD: a log-probability; ENTROPY_BOUND: nats
    int broken;         // set by the device when a logit is not a number
};

// The candidate of a masked position.
struct Candidate {
    int token;
    float confidence;   // its log-probability before temperature
    float entropy;      // nats, of the whole distribution
    float margin;       // between the two likeliest probabilities
};

// --- Philox 4x32-10 ---------------------------------------------------------------------------------------------------

struct Words {
    u32 w[4];
};

SHARED_FN Words philox(Words c, u64 key) {
    u32 k0 = (u32)key, k1 = (u32)(key >> 32);
    for (int round = 0; round < 10; ++round) {
        const u64 a = (u64)0xD2511F53u * c.w[0], b = (u64)0xCD9E8D57u * c.w[2];
        const Words next = {{(u32)(b >> 32) ^ c.w[1] ^ k0, (u32)b, (u32)(a >> 32) ^ c.w[3] ^ k1, (u32)a}};
        c = next;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return c;
}

// Strictly inside (0, 1), exact in float32: (23 random bits + 1/2) / 2^23.
SHARED_FN float uniform(u64 seed, u32 step, u32 position, u32 token, u32 domain) {
    const Words counter = {{token, position, step, domain}};
    return ((float)(philox(counter, seed).w[0] >> 9) + 0.5f) * (1.0f / 8388608.0f);
}

SHARED_FN float gumbel(u64 seed, u32 step, u32 position, u32 token) {
    return -logf(-logf(uniform(seed, step, position, token, TOKEN_DOMAIN)));
}

// --- FP16 logits ------------------------------------------------------------------------------------------------------

SHARED_FN bool is_nan(u16 half) { return (half & 0x7FFF) > 0x7C00; }

// A 16-bit key in the order of the numbers; −0 and 0 are one, infinities are taken for FP16's largest numbers.
SHARED_FN u32 order_of(u16 half) {
    const u32 size = half & 0x7FFF, finite = size > 0x7BFF ? 0x7BFF : size;
    return half & 0x8000 ? 0x8000 - finite : 0x8000 + finite;
}

SHARED_FN float value_of(u32 order) {
    const u32 size = order < 0x8000 ? 0x8000 - order : order - 0x8000;
    union { u32 bits; float value; } as = {size << 13};
    const float magnitude = as.value * 5.192296858534828e33f;  // 2^112: FP16's exponent bias to float32's, subnormals too
    return order < 0x8000 ? -magnitude : magnitude;
}

// Unique within a row, greater for the greater logit, then for the lower id: sorting by it needs no tie-breaking.
SHARED_FN u32 sort_key(u16 half, u32 id) { return order_of(half) << 16 | (0xFFFF - id); }
SHARED_FN int id_of(u32 key) { return 0xFFFF - (int)(key & 0xFFFF); }

// --- log-softmax and entropy in one sweep -----------------------------------------------------------------------------

struct Softmax {
    float max;
    float sum;          // Σ exp(x − max)
    float weighted;     // Σ exp(x − max)·(x − max); of differences, so that large logits lose no digits
};

SHARED_FN Softmax empty_softmax() {
    const Softmax none = {NEVER, 0.0f, 0.0f};
    return none;
}

SHARED_FN Softmax lifted(Softmax s, float max) {
    const float by = s.max - max, scale = s.sum == 0.0f ? 0.0f : expf(by);
    const Softmax result = {max, s.sum * scale, s.sum == 0.0f ? 0.0f : (s.weighted + by * s.sum) * scale};
    return result;
}

SHARED_FN Softmax merged(Softmax a, Softmax b) {
    const float max = fmaxf(a.max, b.max);
    const Softmax x = lifted(a, max), y = lifted(b, max);
    const Softmax both = {max, x.sum + y.sum, x.weighted + y.weighted};
    return both;
}

SHARED_FN Softmax with_logit(Softmax s, float x) {
    if (x > s.max) s = lifted(s, x);
    const float below = x - s.max, e = expf(below);
    const Softmax result = {s.max, s.sum + e, s.weighted + e * below};
    return result;
}

SHARED_FN float log_probability(Softmax s, float x) { return x - s.max - logf(s.sum); }
SHARED_FN float entropy_of(Softmax s) { return logf(s.sum) - s.weighted / s.sum; }

// --- one draw ---------------------------------------------------------------------------------------------------------

SHARED_FN float tempered(float logp, float temperature) { return logp / fmaxf(temperature, COLDEST); }

// Excludes the candidates after those whose probabilities sum to top_p; the first to reach it stays.
// score, noisy (k,): best score first.
SHARED_FN void truncate(const float* score, float* noisy, int k, float top_p) {
    float total = 0.0f, before = 0.0f;
    for (int i = 0; i < k; ++i) total += expf(score[i] - score[0]);
    for (int i = 0; i < k; ++i) {
        const float p = expf(score[i] - score[0]) / total, through = before + p;
        if (through - p >= top_p) noisy[i] = NEVER;
        before = through;
    }
}

// Index of the greatest score; ties go to the lower id.
SHARED_FN int best_of(const float* noisy, const int* ids, int k) {
    int best = 0;
    for (int i = 1; i < k; ++i)
        if (noisy[i] > noisy[best] || (noisy[i] == noisy[best] && ids[i] < ids[best])) best = i;
    return best;
}

// --- what a step commits ----------------------------------------------------------------------------------------------

// Greater is committed first; ties go to the lower position.
SHARED_FN float priority(Candidate c, Row row, int position) {
    switch (row.rule) {
        case CONFIDENCE: case THRESHOLD: return c.confidence;
        case MARGIN: return c.margin;
        case ENTROPY: case ENTROPY_BOUND: return -c.entropy;
        default: return uniform(row.seed, row.step, position, 0, ORDER_DOMAIN);
    }
}

// reveal_count in shared/schedule.py. ratio: cos(π(k + 1)/2n) / cos(πk/2n), computed on the host, whose cosine decides.
SHARED_FN int reveal_count(int masked, double ratio) {
    const int revealed = masked - (int)floor(masked * ratio + 0.5);
    return revealed < 1 ? 1 : revealed;
}

// The EB-sampler's rule (arXiv 2505.24857): how many of the ascending entropies have a sum of at most `bound`, the
// largest (the last) not counted. At least one.
SHARED_FN int within_bound(const float* entropy, int count, float bound) {
    int within = 1;
    float before = 0.0f;
    for (int i = 1; i < count; ++i) within += (before += entropy[i - 1]) <= bound;
    return within;
}

// time_of_masked_fraction in shared/schedule.py. positions: all of the canvas but BOS.
SHARED_FN float time_of(int schedule, int masked, int positions) {
    const double fraction = (double)masked / positions;
    return (float)(schedule == LINEAR ? fraction : 2 / 3.14159265358979323846 * acos(1.0 - fraction));
}
