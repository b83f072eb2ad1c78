// The kernels of requests with a condition: an encoder's rows go to the memory of a slot, and guidance changes the
// scores of a place by those of the next one, whose rows are the same without the memory.
//
// R, M, V as in blocks.cu; S: memory rows of a slot.
#include "blocks.h"
#include "select.h"

// Where a pass reads a condition from: the memory of the request's slot, and that of the place that reads given text.
// One block per array and row (grid 2·layers × rows).
extern "C" __global__ void __launch_bounds__(THREADS) remember_rows(
    const Reading* __restrict__ reading,    // its slot
    const u16* __restrict__ encoded,        // arrays (1, H, rows, D/H), `encoded_stride` apart: keys.0, values.0, …
    u16* __restrict__ kept,                 // arrays (slots, H, S, D/H), `kept_stride` apart
    u16* __restrict__ read,                 // arrays (1, H, S, D/H), `read_stride` apart
    int first, int rows, int capacity, int heads, int head_width, int encoded_stride, int kept_stride,
    int read_stride) {
    const int array = blockIdx.x, j = blockIdx.y;
    encoded += (size_t)array * encoded_stride, kept += (size_t)array * kept_stride;
    read += (size_t)array * read_stride;
    for (int i = threadIdx.x; i < heads * head_width; i += THREADS) {
        const int head = i / head_width, column = i % head_width;
        const u16 value = encoded[((size_t)head * rows + j) * head_width + column];
        const size_t row = (size_t)head * capacity + first + j;
        read[row * head_width + column] = value;
        kept[((size_t)reading->slot * heads * capacity + row) * head_width + column] = value;
    }
}

// The `keep` best scores of a guided row become s + guidance · (s − plain s), all others impossible (classifier-free
// guidance, as host/export/conditioned_graphs.py has it). One block per scored row and place (grid M × R).
extern "C" __global__ void __launch_bounds__(THREADS) guide_scores(
    u16* __restrict__ logits,               // (R, M, V) float16
    const int* __restrict__ places, const Writing* __restrict__ writings,
    int most_scored, int vocab, int keep, int most_places) {
    __shared__ u32 best[THREADS];
    const int j = blockIdx.x, r = blockIdx.y, request = places[r], tid = threadIdx.x;
    if (request < 0 || r + 1 >= most_places || places[r + 1] != -2 - request) return;
    const Writing* w = writings + request;
    if (j > w->drafts) return;
    u16* own = logits + ((size_t)r * most_scored + j) * vocab;
    const u16* plain = own + (size_t)most_scored * vocab;
    u32 own_best = 0;
    for (int id = tid; id < vocab; id += THREADS) {
        const u32 key = sort_key(own[id], id);
        own_best = key > own_best ? key : own_best;
    }
    select_best(own, vocab, keep, own_best, best);
    const float least = value_of(best[keep - 1] >> 16);
    for (int id = tid; id < vocab; id += THREADS) {
        const float score = value_of(order_of(own[id])), without = value_of(order_of(plain[id]));
        if (is_nan(own[id]) || is_nan(plain[id])) own[id] = 0x7E00;  // draw_rows reports it
        else own[id] = half_of(score >= least ? score + w->guidance * (score - without) : -1e4f);
    }
}
