// The kernels and their arithmetic behind C functions, for numpy to call.
#include <algorithm>
#include <cstddef>
#include <cstring>
#include <functional>
#include <iterator>
#include <tuple>
#include <utility>
#include "device.h"
#include "unmask.cu"
#include "blocks.cu"
#include "conditions.cu"

// A kernel with its arguments, copied from where a driver finds them: an array of their addresses.
using Work = std::function<void()>;
template <typename... A, size_t... I>
static Work bound(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    const std::tuple<A...> values{*(A*)arguments[I]...};
    return [kernel, values] { std::apply(kernel, values); };
}
template <typename... A>
static Work bound(void (*kernel)(A...), void** arguments) {
    return bound(kernel, arguments, std::index_sequence_for<A...>());
}

static const char* const kernel_names[] = {
    "draw_candidates", "commit_candidates", "prepare_rows", "draw_rows", "keep_rows", "append_rows", "draft_input",
    "draft_linear", "draft_token", "remember_rows", "guide_scores"};

// The kernel of that name, ready to run; empty where there is none.
static Work kernel_named(const char* name, void** p) {
    const auto found = std::find_if(std::begin(kernel_names), std::end(kernel_names),
                                    [name](const char* known) { return !strcmp(name, known); });
    switch (found - std::begin(kernel_names)) {
        case 0: return bound(draw_candidates, p);
        case 1: return bound(commit_candidates, p);
        case 2: return bound(prepare_rows, p);
        case 3: return bound(draw_rows, p);
        case 4: return bound(keep_rows, p);
        case 5: return bound(append_rows, p);
        case 6: return bound(draft_input, p);
        case 7: return bound(draft_linear, p);
        case 8: return bound(draft_token, p);
        case 9: return bound(remember_rows, p);
        case 10: return bound(guide_scores, p);
        default: return {};
    }
}

static Work running;
static void run_thread() { running(); }

static int run_grid(const Work& work, int x, int y, int z, int backwards) {
    running = work;
    for (blockIdx.z = 0; blockIdx.z < z; ++blockIdx.z)
        for (blockIdx.y = 0; blockIdx.y < y; ++blockIdx.y)
            for (blockIdx.x = 0; blockIdx.x < x; ++blockIdx.x)
                if (run_block(run_thread, backwards) < 0) return 1;
    return 0;
}

extern "C" {
int threads() { return THREADS; }

int launch(const char* name, int x, int y, int z, void** arguments, int backwards) {
    const Work work = kernel_named(name, arguments);
    return work ? run_grid(work, x, y, z, backwards) : 2;
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

void block_noise(u64 seed, const u32* position, const u32* token, int n, float* noise) {
    for (int i = 0; i < n; ++i) noise[i] = block_gumbel(seed, position[i], token[i]);
}

void to_halves(const float* value, int n, u16* half, float* back) {
    for (int i = 0; i < n; ++i) half[i] = half_of(value[i]), back[i] = float_of(half[i]);
}

void gelus(const float* x, int n, float* y) {
    for (int i = 0; i < n; ++i) y[i] = gelu(x[i]);
}

void commit_one(Writing* w, const int* drawn, int pending) { commit_run(w, drawn, pending); }

void writing_layout(int* writing) {  // size, then the offset of each field
    const int w[] = {sizeof(Writing), offsetof(Writing, seed), offsetof(Writing, temperature), offsetof(Writing, top_p),
                     offsetof(Writing, guidance),
                     offsetof(Writing, top_k), offsetof(Writing, window), offsetof(Writing, last),
                     offsetof(Writing, position), offsetof(Writing, token), offsetof(Writing, cached),
                     offsetof(Writing, drafts), offsetof(Writing, draft), offsetof(Writing, start),
                     offsetof(Writing, kept), offsetof(Writing, agreed), offsetof(Writing, fresh),
                     offsetof(Writing, text), offsetof(Writing, broken), sizeof(Reading)};
    std::copy(std::begin(w), std::end(w), writing);
}

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
