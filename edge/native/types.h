// What Python gives to `rows.cpp`, and the vectors that all of it computes with.
// D: width, H: heads, V: vocabulary, C: rows that a slot holds.
#pragma once

#include <cstdint>
#include <cstring>

// Eight numbers. A float32 sum is always that of eight sums, whatever the registers hold beside: so it has one order.
typedef float Floats __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint8_t Bytes __attribute__((vector_size(8), aligned(1), may_alias));
typedef float Half __attribute__((vector_size(16), aligned(4), may_alias));
constexpr int LANES = 8;

struct Matrix {
    const int8_t *weights;  // (outputs / 64, inputs / 4, 64, 4), zeros in columns past the last
    const int32_t *sums;    // of each column, as many as columns with those past the last
    const float *scales;    // of each column
    const float *bias;
    float input_scale;  // of the inputs in uint8; where `input_scale` is 0 each row gets its own
    int32_t input_zero;
    int32_t inputs, outputs;  // multiples of 4 and of 8
};

struct Norm {
    const float *weight, *bias;
};

struct Block {
    Norm norm1, norm2;
    Matrix qkv, attention_out, up, down;
};

struct Network {
    int32_t width, heads, layers, farthest;  // farthest: row of `distances` for a key at the query's own position
    const int8_t *tokens;                    // (V, D)
    const float *token_scales;               // (V,)
    const float *positions;                  // (L, D)
    const float *distances;                  // (H, 2 L + 8): added to the score of a key at each distance; the last 9 of a head are none
    const Block *blocks;
    Norm norm;
    Matrix head;
};

// What a layer reads of a condition: shares of the memory's rows, by softmax in each head of normed rows · keys.
struct Reading {
    Matrix keys;    // outputs: `rows` of each head, one head after another; its inputs are those of `qkv`
    Matrix values;  // inputs: as many, zeros past the last
    int32_t rows;
};

// Rows of one request in a pass. The last `scored` are scored: the last committed token's, and those of drafts after it.
struct Request {
    const int32_t *tokens, *positions;  // (rows,)
    int32_t *places;                    // (C,) positions of the rows in the caches
    float *const *caches;               // keys and values of each layer in turn, each (H, C, D / H)
    float *scores, *states;             // (scored, V), (scored, D)
    int32_t rows, kept, scored, room;   // kept: rows in the caches that stay; room: C
    const Reading *readings;            // of each layer; null without a condition
    // Where `guided`, the next request has the same rows, and no condition: a score s becomes s + guidance (s - theirs),
    // or NEVER if it is not among the `best` highest. Nothing is drawn of the other.
    float guidance;
    int32_t guided, best;
    // What is drawn of them; not used by `pass`.
    float *noise;          // (noise_rows, V): position p in row p mod noise_rows
    int32_t *noise_of;     // (noise_rows,) the position that each row is of, -1 where of none
    int32_t *drawn;        // (scored,) the tokens that follow each scored row
    int32_t *drafts;       // (depths,) of the next pass
    uint64_t seed;
    float temperature, draft_temperature;
    int32_t noise_rows, top_rank, window, last;  // top_rank: of draws that nothing filters; last: position of a gap
    // Results: how many drafts the draws agree with, how many there are for the next pass, what is left to the caller.
    int32_t agreed, drafted, left;
};

enum Left { NOTHING, FILTERING, NOT_FINITE };  // FILTERING: a draw is not among what top-k or top-p surely keeps

struct Depth {
    const int8_t *known;        // (tokens, hidden): what the token before adds to the hidden layer
    const float *known_scales;  // (hidden,)
    Norm norm;
    Matrix up, down;
};

constexpr int32_t EOS = 2;
constexpr float NEVER = -10000.0f;

struct Drafter {
    int32_t depths, width, hidden;
    const int32_t *likely;  // (head.outputs,) ids of the tokens that are drafted
    const Depth *steps;
    Matrix head;
};
