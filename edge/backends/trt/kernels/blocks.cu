// The kernels around the step graph in a pass of blocks: they lay out its rows, draw, keep the longest run of drafts,
// append the kept rows to their slots, and draft anew.
//
// R: places of the pass, N: rows of each, M: scored rows of each, C: rows that a slot holds, V: vocabulary, D: width.
// places (R,): the request of each, −1 where there is none. Step passes have slot r at place r, since the network reads
// the slots from the first on; a reading pass has one place, and a slot that is still empty, so that nothing is read of
// it. A guided request has a second place, which repeats its rows and draws nothing; see `request_of`.
#include "blocks.h"
#include "select.h"

#define COLUMNS (THREADS / 4)

// The network's inputs. One block per place.
extern "C" __global__ void __launch_bounds__(THREADS) prepare_rows(
    const int* __restrict__ places, const Writing* __restrict__ writings,
    const Reading* __restrict__ reading,    // followed by its tokens and positions, (most_read,) each
    int* __restrict__ tokens, int* __restrict__ positions, int* __restrict__ sees,  // (R, N)
    int* __restrict__ cached,               // (R,)
    int* __restrict__ scored,               // (R, M)
    int rows, int most_scored, int most_read, int is_reading) {
    const int r = blockIdx.x, slot = request_of(places[r]);
    const Writing* w = writings + (slot < 0 ? 0 : slot);
    const int* read_tokens = (const int*)(reading + 1);
    const int count = slot < 0 ? 0 : is_reading ? reading->rows : 1 + w->drafts;
    for (int j = threadIdx.x; j < rows; j += THREADS) {
        int token = PAD, position = 0;
        if (j < count) {
            token = is_reading ? read_tokens[j] : j == 0 ? w->token : w->draft[j - 1];
            position = is_reading ? read_tokens[most_read + j] : w->position + j;
        }
        tokens[r * rows + j] = token;
        positions[r * rows + j] = position;
        sees[r * rows + j] = is_reading && reading->evidence ? count : j + 1;
    }
    for (int j = threadIdx.x; j < most_scored; j += THREADS) {
        const int row = (is_reading ? count - 1 : 0) + j;
        scored[r * most_scored + j] = r * rows + (row < count ? row : count > 0 ? count - 1 : 0);
    }
    if (threadIdx.x == 0) cached[r] = slot < 0 ? 0 : w->cached;
}

// The law's token for `position`, after temperature, top-k and top-p, with its noise; −1 where a score is not a number.
// names: the ids that scores are of; null where they are of all tokens in order.
__device__ int drawn_token(const u16* __restrict__ scores, int vocab, const int* __restrict__ names, const Writing* w,
                           float top_p, int position) {
    __shared__ u32 best[THREADS];
    __shared__ int ids[THREADS], token, broken;
    __shared__ float score[THREADS], noisy[THREADS];
    const int tid = threadIdx.x;
    if (tid == 0) broken = 0;
    __syncthreads();
    u32 own_best = 0;
    for (int id = tid; id < vocab; id += THREADS) {
        if (is_nan(scores[id])) broken = 1;
        const u32 key = sort_key(scores[id], id);
        own_best = key > own_best ? key : own_best;
    }
    __syncthreads();
    if (broken) return -1;
    const float temperature = w->temperature;
    const int wanted = temperature == 0.0f ? 1 : w->top_k, keep = wanted < vocab ? wanted : vocab;
    select_best(scores, vocab, keep, own_best, best);
    if (tid < keep) {
        const int id = id_of(best[tid]);
        ids[tid] = names ? names[id] : id;
        score[tid] = tempered(value_of(best[tid] >> 16), temperature);
        noisy[tid] = score[tid] + (temperature == 0.0f ? 0.0f : block_gumbel(w->seed, position, ids[tid]));
    }
    __syncthreads();
    if (tid == 0) {
        if (top_p < 1.0f) truncate(score, noisy, keep, top_p);
        token = ids[best_of(noisy, ids, keep)];
    }
    __syncthreads();
    return token;
}

// One block per scored row and place (grid M × R).
extern "C" __global__ void __launch_bounds__(THREADS) draw_rows(
    const u16* __restrict__ logits,         // (R, M, V) float16
    const int* __restrict__ places, Writing* __restrict__ writings, const Reading* __restrict__ reading,
    int* __restrict__ drawn,                // (R, M)
    int most_scored, int vocab, int is_reading) {
    const int j = blockIdx.x, r = blockIdx.y, slot = places[r];
    if (slot < 0) return;
    Writing* w = writings + slot;
    if (j > w->drafts || (is_reading && !reading->draws)) return;
    const size_t row = (size_t)r * most_scored + j;
    const int token = drawn_token(logits + row * vocab, vocab, 0, w, w->top_p, w->position + 1 + j);
    if (threadIdx.x != 0) return;
    drawn[row] = token;
    if (token < 0) w->broken = 1;
}

// One block per place.
extern "C" __global__ void __launch_bounds__(THREADS) keep_rows(
    const int* __restrict__ places, Writing* __restrict__ writings, const Reading* __restrict__ reading,
    const int* __restrict__ drawn, int most_scored, int is_reading) {
    const int r = blockIdx.x, slot = places[r];
    if (slot < 0 || threadIdx.x != 0) return;
    Writing* w = writings + slot;
    w->kept = w->fresh = 0;
    if (w->broken) return;
    if (is_reading && !reading->draws) {
        w->start = w->cached, w->kept = reading->rows, w->cached += w->kept;
        return;
    }
    commit_run(w, drawn + r * most_scored, is_reading ? reading->rows : 1);
}

// Kept rows go where the slot ends. One block per array, row and place (grid 2·layers × N × R).
extern "C" __global__ void __launch_bounds__(THREADS) append_rows(
    const int* __restrict__ places, const Writing* __restrict__ writings, const Reading* __restrict__ reading,
    const int* __restrict__ positions,
    int* __restrict__ key_positions,        // (slots, C)
    const u16* __restrict__ fresh,          // arrays (R, H, N, D/H), `fresh_stride` apart: keys.0, values.0, keys.1 …
    u16* __restrict__ kept,                 // arrays (slots, H, C, D/H), `kept_stride` apart
    int rows, int capacity, int heads, int head_width, int fresh_stride, int kept_stride,
    int is_reading) {
    const int array = blockIdx.x, j = blockIdx.y, r = blockIdx.z, request = request_of(places[r]);
    if (request < 0 || j >= writings[request].kept) return;
    const int slot = is_reading ? reading->slot : r, to = writings[request].start + j;
    fresh += (size_t)array * fresh_stride, kept += (size_t)array * kept_stride;
    for (int i = threadIdx.x; i < heads * head_width; i += THREADS) {
        const int head = i / head_width, column = i % head_width;
        kept[((size_t)(slot * heads + head) * capacity + to) * head_width + column] =
            fresh[((size_t)(r * heads + head) * rows + j) * head_width + column];
    }
    if (array == 0 && threadIdx.x == 0) key_positions[slot * capacity + to] = positions[r * rows + j];
}

// Mean and variance of x (n,), by one block.
__device__ void moments(const float* x, int n, float* mean, float* variance) {
    __shared__ float sum[THREADS];
    const int tid = threadIdx.x;
    for (int centred = 0; centred < 2; ++centred) {
        float own = 0.0f;
        for (int i = tid; i < n; i += THREADS) own += centred ? (x[i] - *mean) * (x[i] - *mean) : x[i];
        sum[tid] = own;
        for (int half = THREADS / 2; half > 0; half /= 2) {
            __syncthreads();
            if (tid < half) sum[tid] += sum[tid + half];
        }
        __syncthreads();
        *(centred ? variance : mean) = sum[0] / n;
        __syncthreads();
    }
}

// What a depth of the chain reads: LayerNorm of the state and of the embedding of the token before the draft.
// One block per place.
extern "C" __global__ void __launch_bounds__(THREADS) draft_input(
    const int* __restrict__ places, const Writing* __restrict__ writings,
    const u16* __restrict__ states,         // (R, M, D) float16, of the network
    const u16* __restrict__ embedding,      // (V, D) float16
    const u16* __restrict__ norms,          // (4, D) float16: weight and bias of the state's, then of the token's
    float* __restrict__ state,              // (R, D)
    float* __restrict__ both,               // (R, 2·D)
    int most_scored, int width, int depth) {
    const int r = blockIdx.x, slot = places[r];
    if (slot < 0 || writings[slot].fresh == 0 || writings[slot].drafts <= depth) return;
    const Writing* w = writings + slot;
    const int token = depth == 0 ? w->token : w->draft[depth - 1];
    const u16* seen = states + ((size_t)r * most_scored + w->agreed) * width;
    state += r * width, both += 2 * r * width;
    for (int i = threadIdx.x; i < width; i += THREADS) {
        if (depth == 0) state[i] = float_of(seen[i]);
        both[i] = state[i];
        both[width + i] = float_of(embedding[(size_t)token * width + i]);
    }
    __syncthreads();
    for (int part = 0; part < 2; ++part) {
        float mean, variance;
        moments(both + part * width, width, &mean, &variance);
        const u16 *weight = norms + 2 * part * width, *bias = weight + width;
        for (int i = threadIdx.x; i < width; i += THREADS)
            both[part * width + i] =
                normalised(both[part * width + i], mean, variance) * float_of(weight[i]) + float_of(bias[i]);
        __syncthreads();
    }
}

// A linear layer of the drafter, for one draft of each place: four threads a column. Grid tiles × R.
extern "C" __global__ void __launch_bounds__(THREADS) draft_linear(
    const int* __restrict__ places, const Writing* __restrict__ writings,
    const float* __restrict__ x,            // (R, inputs)
    const u16* __restrict__ weight,         // (inputs, outputs) float16
    const u16* __restrict__ bias,           // (outputs,) float16
    float* __restrict__ out,                // (R, outputs): HIDDEN_LAYER after GELU, STATE_LAYER added to what is there
    u16* __restrict__ scores,               // (R, outputs) float16: SCORES_LAYER
    int inputs, int outputs, int layer, int depth, int tiles) {
    __shared__ float partial[THREADS];
    const int r = blockIdx.y, slot = places[r];
    if (slot < 0 || writings[slot].fresh == 0 || writings[slot].drafts <= depth) return;
    const int tid = threadIdx.x, own = tid % COLUMNS, part = tid / COLUMNS;
    x += r * inputs;
    for (int tile = blockIdx.x; tile * COLUMNS < outputs; tile += tiles) {
        const int column = tile * COLUMNS + own;
        float sum = 0.0f;
        if (column < outputs)
            for (int i = part; i < inputs; i += 4) sum += x[i] * float_of(weight[(size_t)i * outputs + column]);
        partial[tid] = sum;
        __syncthreads();
        if (part == 0 && column < outputs) {
            for (int other = 1; other < 4; ++other) sum += partial[own + other * COLUMNS];
            sum += float_of(bias[column]);
            const int at = r * outputs + column;
            if (layer == HIDDEN_LAYER) out[at] = gelu(sum);
            else if (layer == STATE_LAYER) out[at] += sum;
            else scores[at] = half_of(sum);
        }
        __syncthreads();
    }
}

// The draft itself: top-p is left out, as in the CPU's drafter. An EOS ends the drafts before it. One block per place.
extern "C" __global__ void __launch_bounds__(THREADS) draft_token(
    const int* __restrict__ places, Writing* __restrict__ writings,
    const u16* __restrict__ scores,         // (R, F) float16
    const int* __restrict__ likely,         // (F,)
    int count, int depth) {
    const int r = blockIdx.x, slot = places[r];
    if (slot < 0 || writings[slot].fresh == 0 || writings[slot].drafts <= depth) return;
    Writing* w = writings + slot;
    const int token = drawn_token(scores + (size_t)r * count, count, likely, w, 1.0f, w->position + 1 + depth);
    __syncthreads();
    if (threadIdx.x != 0) return;
    w->draft[depth] = token;
    if (token < 0 || token == EOS) w->drafts = depth;
}
