// A part of a cell by OpenCV's INTER_LINEAR.

namespace {

struct Pair {  // two neighbouring source values of one output value
    int first, second;
    unsigned weights;  // in units of 1/2048, the first's in the low half
};

__device__ inline Pair pair_of(int d, int source, int size, bool clamp_weight) {
    float place = (float)((d + 0.5) * ((double)source / size) - 0.5);
    int index = (int)floorf(place);
    float fraction = place - (float)index;
    if (clamp_weight && (index < 0 || index >= source - 1)) fraction = 0;
    Pair pair;
    pair.first = min(max(index, 0), source - 1);
    pair.second = min(max(index + 1, 0), source - 1);
    pair.weights = (unsigned)rintf((1.0f - fraction) * 2048.0f) | (unsigned)rintf(fraction * 2048.0f) << 16;
    return pair;
}

// Three channels of two neighbouring pixels at byte `at` of the staged bytes, weighted, in units of 1/128. Reads the
// word of that byte and two more, and so BEYOND bytes at most.
__device__ inline void blend_columns(const unsigned* stage, int at, unsigned weights, int* value) {
    const unsigned* word = stage + (at >> 2);
    int shift = 8 * (at & 3);
    unsigned low = __funnelshift_r(word[0], word[1], shift);   // r0 g0 b0 r1
    unsigned high = __funnelshift_r(word[1], word[2], shift);  // g1 b1
    unsigned red_green = __byte_perm(low, high, 0x4130), blue = __byte_perm(low, high, 0x5252);
    value[0] = __dp2a_lo(weights, red_green, 0u) >> 4;
    value[1] = __dp2a_hi(weights, red_green, 0u) >> 4;
    value[2] = __dp2a_lo(weights, blue, 0u) >> 4;
}

template <typename V>
__device__ inline void cv2_linear(const Tile* tiles, const unsigned* tile_of_block, int stage_bytes) {
    DYNAMIC_SHARED(stage);
    __shared__ V table[3 * 256];
    __shared__ int2 columns[COLUMNS];  // byte in the segment, weights
    __shared__ Pair rows[PART_ROWS];
    __shared__ uint4 out[Lines<V>::BYTES / 16];

    __shared__ Tile tile;
    __shared__ Part part;
    fetch(tile, part, tiles, tile_of_block);
    const int width = tile.x1 - tile.x0, height = tile.y1 - tile.y0;
    const int thread = threadIdx.y * LANES + threadIdx.x;

    const int left = pair_of(part.x, tile.photo_width, width, true).first;
    const int right = pair_of(part.x + part.columns - 1, tile.photo_width, width, true).second;
    const int bytes = 3 * (right - left + 1);  // of the segment of each photo row
    const int pitch = padded(LEAD + bytes + BEYOND);
    load_table(table, tile);
#pragma unroll 1
    for (int x = thread; x < part.columns; x += LANES * ROWS) {
        Pair pair = pair_of(part.x + x, tile.photo_width, width, true);
        columns[x] = make_int2(3 * (pair.first - left), (int)pair.weights);
    }
#pragma unroll 1
    for (int y = thread; y < part.rows; y += LANES * ROWS) {
        rows[y] = pair_of(part.y + y, tile.photo_height, height, false);
    }
    __syncthreads();

    const Lines<V> lines = {tile, part, (byte*)out};
    for (int y = 0, count; y < part.rows; y += count) {
        // Photo rows one after the other where most of them are wanted, else only those wanted.
        const int top = rows[y].first;
        int span, slots;
        for (count = min(STEP, part.rows - y);; count--) {
            span = rows[y + count - 1].second - top + 1;
            slots = min(span, 2 * count);
            if (count == 1 || slots * pitch <= stage_bytes) break;
        }
        const bool dense = span <= 2 * count;
#pragma unroll 1
        for (int slot = threadIdx.y; slot < slots; slot += ROWS) {
            int row = dense ? top + slot : slot & 1 ? rows[y + slot / 2].second : rows[y + slot / 2].first;
            stage_row((byte*)stage + slot * pitch, tile, row, left, bytes);
        }
        wait_for_copies();
        __syncthreads();
        for (int slot = threadIdx.y; slot < count; slot += ROWS) {
            const Pair pair = rows[y + slot];
            const int upper = (dense ? pair.first - top : 2 * slot) * pitch + (int)photo_lead(tile, pair.first, left);
            const int lower =
                (dense ? pair.second - top : 2 * slot + 1) * pitch + (int)photo_lead(tile, pair.second, left);
            const int b0 = pair.weights & 0xffff, b1 = pair.weights >> 16;
#pragma unroll 1
            for (int x = threadIdx.x; x < part.columns; x += LANES) {
                const int2 column = columns[x];
                int above[3], below[3];
                blend_columns((const unsigned*)stage, upper + column.x, (unsigned)column.y, above);
                blend_columns((const unsigned*)stage, lower + column.x, (unsigned)column.y, below);
                for (int c = 0; c < 3; c++) {
                    int value = (((above[c] * b0) >> 16) + ((below[c] * b1) >> 16) + 2) >> 2;
                    *lines.value(slot, y + slot, x, c) = table[256 * c + value];
                }
            }
        }
        __syncthreads();
        lines.store(y, count);
    }
}

}  // namespace
