// A pass of rows through the network, and the chain of drafts. Of each set of instructions; see `vectors.h`.

struct Space {  // of a pass, in the caller's memory
    float *x, *normed, *wide, *mixed, *weights;
    uint8_t *shares;
    Rows quantized;
};

// x (D,) += what a row reads of a memory. row: its normed values, quantized; scores, shares: memory of the keys' outputs.
static void read(const Reading &r, int heads, const Rows &row, float *scores, uint8_t *shares, float *made, float *x) {
    product(r.keys, row, 1, scores);  // past the last row's they are 0, and so are the weights of the values
    float part[LANES];
    for (int head = 0; head < heads; head++) {
        float *of = scores + head * r.rows, top = of[0];
        for (int i = 1; i < r.rows; i++) top = of[i] > top ? of[i] : top;
        Floats total = {};
        for (int i = 0; i < r.rows; i += LANES) {
            const int size = r.rows - i < LANES ? r.rows - i : LANES;
            for (int n = 0; n < LANES; n++) part[n] = n < size && of[i + n] > NEVER ? of[i + n] - top : HIDDEN;
            const Floats below = load(part), e = below > 0.1f * HIDDEN ? exponential(below) : Floats{};
            total += e;
            memcpy(of + i, &e, size * sizeof(float));
        }
        const float by = sum(total);
        for (int i = 0; i < r.rows; i++) of[i] /= by;
    }
    float scale = r.values.input_scale;
    int32_t zero = r.values.input_zero;
    quantize(scores, scale, zero, r.keys.outputs, shares);
    product(r.values, {shares, &scale, &zero}, 1, made);
    add(x, made, r.values.outputs);
}

// Keys and values of a layer into the request's caches, behind those kept. qkv (rows, 3 D)
INLINE void keep(const Network &net, const Request &r, int layer, const float *qkv) {
    const int size = net.width / net.heads;
    for (int row = 0; row < r.rows; row++, qkv += 3 * net.width)
        for (int head = 0; head < net.heads; head++)
            for (int kind = 0; kind < 2; kind++) {
                float *to = r.caches[2 * layer + kind] + (static_cast<long>(head) * r.room + r.kept + row) * size;
                memcpy(to, qkv + (1 + kind) * net.width + head * size, size * sizeof(float));
            }
}

INLINE void embed(const Network &net, const Request &r, float *x) {
    for (int row = 0; row < r.rows; row++, x += net.width) {
        const int8_t *token = net.tokens + static_cast<long>(r.tokens[row]) * net.width;
        const float *place = net.positions + static_cast<long>(r.positions[row]) * net.width;
        const float scale = net.token_scales[r.tokens[row]];
        for (int i = 0; i < net.width; i++) x[i] = token[i] * scale + place[i];
        r.places[r.kept + row] = r.positions[row];
    }
}

// All rows share the products; each request's rows see the rows kept in its caches, and those before them.
static void pass(const Network &net, const Request *requests, int count, const Space &s) {
    const int d = net.width, size = d / net.heads;
    int rows = 0;
    for (int i = 0; i < count; rows += requests[i++].rows) embed(net, requests[i], s.x + static_cast<long>(rows) * d);
    for (int layer = 0; layer < net.layers; layer++) {
        const Block &block = net.blocks[layer];
        const bool last = layer == net.layers - 1;  // in which only scored rows go on
        for (int row = 0; row < rows; row++)
            normalize(block.norm1, s.x + static_cast<long>(row) * d, d, s.normed + static_cast<long>(row) * d);
        multiply(block.qkv, s.normed, rows, s.quantized, s.wide);
        int row = 0, going_on = 0;
        for (int i = 0; i < count; i++) {
            const Request &r = requests[i];
            const float *qkv = s.wide + static_cast<long>(row) * 3 * d;
            keep(net, r, layer, qkv);
            const int first = last ? r.rows - r.scored : 0, left = r.rows - first;
            bool in_a_row = true;
            for (int at = 0; at < r.kept + r.rows; at++) in_a_row &= r.places[at] == r.places[0] + at;
            for (int head = 0; head < net.heads; head++)
                (size == 64 ? attend<64> : attend<32>)(net, r, layer, head, left, qkv, in_a_row, s.weights,
                                                       s.mixed + static_cast<long>(going_on) * d);
            for (int own = first; r.readings && own < r.rows; own++) {
                const long at = row + own;
                read(r.readings[layer], net.heads, {s.quantized.values + at * d, s.quantized.scales + at, s.quantized.zeros + at},
                     s.weights, s.shares, s.normed, s.x + at * d);
            }
            memmove(s.x + static_cast<long>(going_on) * d, s.x + static_cast<long>(row + first) * d, left * d * sizeof(float));
            row += r.rows, going_on += left;
        }
        rows = going_on;
        multiply(block.attention_out, s.mixed, rows, s.quantized, s.normed);
        add(s.x, s.normed, static_cast<long>(rows) * d);
        for (int i = 0; i < rows; i++)
            normalize(block.norm2, s.x + static_cast<long>(i) * d, d, s.normed + static_cast<long>(i) * d);
        multiply(block.up, s.normed, rows, s.quantized, s.wide);
        for (long i = 0; i < static_cast<long>(rows) * 4 * d; i += 2 * LANES)
            store_pair(s.wide + i, each(load_pair(s.wide + i), [](auto x) { return gelu(x); }));
        multiply(block.down, s.wide, rows, s.quantized, s.normed);
        add(s.x, s.normed, static_cast<long>(rows) * d);
    }
    const float *x = s.x;
    for (int i = 0; i < count; i++)
        for (int row = 0; row < requests[i].scored; row++, x += d)
            normalize(net.norm, x, d, requests[i].states + static_cast<long>(row) * d);
    for (int i = 0; i < count; i++)
        multiply(net.head, requests[i].states, requests[i].scored, s.quantized, requests[i].scores);
}

// The draft of each depth after `token`: the best of the likely ones by score and noise, the first of equals.
// x (D,): the state of the row that drew it, overwritten. noise_of(depth) (V,)
template <typename Noise>
static void draft(const Drafter &net, float *x, int token, Noise noise_of, float temperature, int count, int32_t *drafts,
                  const Space &s) {
    float *scores = s.weights;
    for (int depth = 0; depth < count; depth++) {
        const Depth &step = net.steps[depth];
        const int8_t *known = step.known + static_cast<long>(token) * net.hidden;
        normalize(step.norm, x, net.width, s.normed);
        multiply(step.up, s.normed, 1, s.quantized, s.wide);
        for (int i = 0; i < net.hidden; i++) s.mixed[i] = s.wide[i] + known[i] * step.known_scales[i];
        for (int i = 0; i < net.hidden; i += LANES) store(s.mixed + i, gelu(load(s.mixed + i)));
        multiply(step.down, s.mixed, 1, s.quantized, s.normed);
        add(x, s.normed, net.width);
        multiply(net.head, x, 1, s.quantized, scores);
        if (temperature != 0) {
            const float *noise = noise_of(depth);
            for (int i = 0; i < net.head.outputs; i++) scores[i] += noise[net.likely[i]] * temperature;
        }
        token = 0;
        for (int i = 1; i < net.head.outputs; i++) token = scores[i] > scores[token] ? i : token;
        drafts[depth] = net.likely[token];
    }
}
