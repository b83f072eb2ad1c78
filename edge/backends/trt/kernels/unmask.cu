// Two kernels that follow the network in each denoising step: one draws a candidate for each open position, the other
// commits some of them.
//
// B: rows of the batch, L: length of their canvases, V: vocabulary. Blocks of THREADS. Nothing is allocated; the host
// reads canvas, rows and times from mapped memory.
#include "select.h"

#define MAX_LENGTH 1024

// One block per position (grid L × B); blocks of positions that are not open return at once.
extern "C" __global__ void __launch_bounds__(THREADS) draw_candidates(
    const u16* __restrict__ logits,         // (B, L, V) float16
    const int* __restrict__ canvas,         // (B, L)
    const u8* __restrict__ fill,            // (B, L) 1 where the request is to be filled
    Row* __restrict__ rows,                 // (B,)
    Candidate* __restrict__ candidates,     // (B, L) written where open
    int length, int vocab) {
    __shared__ Softmax partial[THREADS];
    __shared__ u32 best[THREADS];
    __shared__ int ids[THREADS];
    __shared__ float logp[THREADS], score[THREADS], noisy[THREADS];
    const int tid = threadIdx.x, position = blockIdx.x, place = blockIdx.y * length + position;
    if (!fill[place] || canvas[place] != MASK) return;
    const Row row = rows[blockIdx.y];
    const u16* mine = logits + (size_t)place * vocab;

    Softmax softmax = empty_softmax();
    u32 own_best = 0;
    for (int id = tid; id < vocab; id += THREADS) {
        const u16 half = mine[id];
        if (is_nan(half)) rows[blockIdx.y].broken = 1;
        const u32 key = sort_key(half, id);
        own_best = key > own_best ? key : own_best;
        softmax = with_logit(softmax, value_of(key >> 16));
    }
    partial[tid] = softmax;
    for (int half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (tid < half) partial[tid] = merged(partial[tid], partial[tid + half]);
    }
    __syncthreads();
    const Softmax whole = partial[0];

    const int drawn = row.temperature == 0.0f ? 1 : row.top_k, keep = drawn < 2 ? 2 : drawn;  // the margin needs two
    select_best(mine, vocab, keep, own_best, best);
    if (tid < keep) {
        ids[tid] = id_of(best[tid]);
        logp[tid] = log_probability(whole, value_of(best[tid] >> 16));
        score[tid] = tempered(logp[tid], row.temperature);
        noisy[tid] = score[tid] + gumbel(row.seed, row.step, position, ids[tid]);
    }
    __syncthreads();
    if (tid == 0) {
        if (row.top_p < 1.0f) truncate(score, noisy, drawn, row.top_p);
        const int i = best_of(noisy, ids, drawn);
        const Candidate c = {ids[i], logp[i], entropy_of(whole), expf(logp[0]) - expf(logp[1])};
        candidates[place] = c;
    }
}

// One block per row (grid B): rank the candidates, commit the first of them, and the tokens that follow with certainty.
//
// `commit` in edge/decoding/canvas.py: an end drawn left of a text token is not committed; after the first end
// everything is PAD, and an end directly after text is EOS.
extern "C" __global__ void __launch_bounds__(THREADS) commit_candidates(
    int* __restrict__ canvas,                   // (B, L)
    const u8* __restrict__ fill,                // (B, L)
    Row* __restrict__ rows,                     // (B,)
    const double* __restrict__ ratios,          // (B, ratio_stride) of the unmasking schedule
    const Candidate* __restrict__ candidates,   // (B, L)
    float* __restrict__ t,                      // (B,) diffusion time of the next step
    int length, int ratio_stride, int whole_length, int schedule) {
    __shared__ int line[MAX_LENGTH];
    __shared__ float score[MAX_LENGTH], ordered_entropy[MAX_LENGTH];
    __shared__ int open[MAX_LENGTH];
    __shared__ int left, sure, count, last_text, first_end, masked;
    const int tid = threadIdx.x, b = blockIdx.x;
    const Row row = rows[b];
    canvas += b * length, fill += b * length, candidates += b * length;
    if (tid == 0) left = 0, sure = 0, last_text = 0, first_end = length, masked = 0;
    __syncthreads();
    for (int i = tid; i < length; i += THREADS) {
        line[i] = canvas[i];
        open[i] = fill[i] && line[i] == MASK;
        if (!open[i]) continue;
        score[i] = priority(candidates[i], row, i);
        atomicAdd(&left, 1);
        if (candidates[i].confidence >= row.bound) atomicAdd(&sure, 1);
    }
    __syncthreads();
    if (left == 0) return;

    // A position's rank is the number of open positions that come before it.
    int rank[(MAX_LENGTH + THREADS - 1) / THREADS];
    for (int i = tid, n = 0; i < length; i += THREADS, ++n) {
        rank[n] = 0;
        if (!open[i]) continue;
        for (int j = 0; j < length; ++j)
            rank[n] += open[j] && (score[j] > score[i] || (score[j] == score[i] && j < i));
        ordered_entropy[rank[n]] = candidates[i].entropy;
    }
    __syncthreads();
    if (tid == 0) {
        if (row.step >= row.steps - 1) count = left;
        else if (row.rule == THRESHOLD) count = sure;
        else if (row.rule == ENTROPY_BOUND) count = within_bound(ordered_entropy, left, row.bound);
        else count = reveal_count(left, ratios[(size_t)b * ratio_stride + row.step]);
        if (count < 1) count = 1;
    }
    __syncthreads();

    for (int i = tid, n = 0; i < length; i += THREADS, ++n) {
        open[i] = open[i] && rank[n] < count;  // now: committed in this step
        if (open[i] && candidates[i].token >= FIRST_TEXT_ID) line[i] = candidates[i].token;
        if (line[i] >= FIRST_TEXT_ID) atomicMax(&last_text, i);
    }
    __syncthreads();
    for (int i = tid; i < length; i += THREADS) {
        if (open[i] && candidates[i].token < FIRST_TEXT_ID && i > last_text) line[i] = candidates[i].token;
        if (line[i] == EOS || line[i] == PAD) atomicMin(&first_end, i);
    }
    __syncthreads();
    const bool closed = first_end > 0 && first_end < length && line[first_end - 1] != MASK;
    __syncthreads();
    for (int i = tid; i < length; i += THREADS) {
        const int token = i > first_end ? PAD : i == first_end && closed ? EOS : line[i];
        canvas[i] = token;
        if (token == MASK) atomicAdd(&masked, 1);
    }
    __syncthreads();
    if (tid == 0) {
        rows[b].step = row.step + 1;
        t[b] = time_of(schedule, masked, whole_length - 1);
    }
}
