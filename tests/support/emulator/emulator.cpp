// The kernels and their arithmetic behind C functions, for numpy to call.
#include <algorithm>
#include <cstddef>
#include <iterator>
#include "device.h"
#include "unmask.cu"

struct Call {
    const u16* logits; int* canvas; const u8* fill; Row* rows; Candidate* candidates; const double* ratios; float* t;
    int length, vocab, ratio_stride, whole_length, schedule;
};
static Call call;

static void draw() {
    draw_candidates(call.logits, call.canvas, call.fill, call.rows, call.candidates, call.length, call.vocab);
}
static void commit() {
    commit_candidates(call.canvas, call.fill, call.rows, call.ratios, call.candidates, call.t, call.length,
                      call.ratio_stride, call.whole_length, call.schedule);
}

static int run_grid(void (*kernel)(), int x, int y, int backwards) {
    for (blockIdx.y = 0; blockIdx.y < y; ++blockIdx.y)
        for (blockIdx.x = 0; blockIdx.x < x; ++blockIdx.x)
            if (run_block(kernel, backwards) < 0) return 1;
    return 0;
}

extern "C" {
int threads() { return THREADS; }

int emulate_draw(const u16* logits, int* canvas, const u8* fill, Row* rows, Candidate* candidates, int length,
                 int vocab, int batch, int backwards) {
    call = {logits, canvas, fill, rows, candidates, nullptr, nullptr, length, vocab, 0, 0, 0};
    return run_grid(draw, length, batch, backwards);
}

int emulate_commit(int* canvas, const u8* fill, Row* rows, const double* ratios, const Candidate* candidates, float* t,
                   int length, int ratio_stride, int whole_length, int schedule, int batch, int backwards) {
    call = {nullptr, canvas, fill, rows, const_cast<Candidate*>(candidates), ratios, t,
            length, 0, ratio_stride, whole_length, schedule};
    return run_grid(commit, batch, 1, backwards);
}

void philox_words(const u32* counters, u64 key, int n, u32* words) {  // (n, 4) → (n, 4)
    for (int i = 0; i < n; ++i) {
        const Words c = {{counters[4 * i], counters[4 * i + 1], counters[4 * i + 2], counters[4 * i + 3]}};
        const Words result = philox(c, key);
        std::copy(result.w, result.w + 4, words + 4 * i);
    }
}

void uniforms(u64 seed, u32 step, const u32* position, const u32* token, int domain, int n, float* u, float* noise) {
    for (int i = 0; i < n; ++i) {
        u[i] = uniform(seed, step, position[i], token[i], domain);
        noise[i] = gumbel(seed, step, position[i], token[i]);
    }
}

void halves(const u16* half, int n, u32* order, float* value) {
    for (int i = 0; i < n; ++i) order[i] = order_of(half[i]), value[i] = value_of(order[i]);
}

void softmax_row(const u16* logits, int n, int parts, float* logp, float* entropy) {  // in `parts`, then merged
    Softmax whole = empty_softmax();
    for (int part = 0; part < parts; ++part) {
        Softmax own = empty_softmax();
        for (int i = part; i < n; i += parts) own = with_logit(own, value_of(order_of(logits[i])));
        whole = merged(whole, own);
    }
    for (int i = 0; i < n; ++i) logp[i] = log_probability(whole, value_of(order_of(logits[i])));
    *entropy = entropy_of(whole);
}

int within(const float* entropy, int count, double bound) { return within_bound(entropy, count, (float)bound); }
int reveal(int masked, double ratio) { return reveal_count(masked, ratio); }
float time_at(int schedule, int masked, int positions) { return time_of(schedule, masked, positions); }

void layout(int* row, int* candidate) {  // size, then the offset of each field
    const int r[] = {sizeof(Row), offsetof(Row, seed), offsetof(Row, step), offsetof(Row, steps), offsetof(Row, rule),
                     offsetof(Row, top_k), offsetof(Row, temperature), offsetof(Row, top_p), offsetof(Row, bound),
                     offsetof(Row, broken)};
    const int c[] = {sizeof(Candidate), offsetof(Candidate, token), offsetof(Candidate, confidence),
                     offsetof(Candidate, entropy), offsetof(Candidate, margin)};
    std::copy(std::begin(r), std::end(r), row);
    std::copy(std::begin(c), std::end(c), candidate);
}
}
