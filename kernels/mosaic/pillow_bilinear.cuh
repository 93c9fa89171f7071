// A part of a cell by Pillow's antialiased BILINEAR: all warps of a block walk down STEP rows at a time.

namespace {

const int HALF = 1 << 21;  // in units of 2**-22; sums begin with it so that a shift rounds them

__device__ inline int padded(int bytes) { return (bytes + 15) & ~15; }

__device__ inline const byte* photo_row(const Tile& tile, int row, int column) {
    return (const byte*)tile.photo + ((size_t)row * tile.photo_width + column) * 3;
}

// lead_of(photo_row(tile, row, column)), from the low bits alone.
__device__ inline unsigned photo_lead(const Tile& tile, int row, int column) {
    return ((unsigned)tile.photo + ((unsigned)row * tile.photo_width + column) * 3) & 15;
}

// Start to copy `bytes` bytes of a photo row, from a column on, to `line`. One warp does it.
__device__ inline void stage_row(Shared line, const Tile& tile, int row, int column, int bytes) {
    const byte *photo = (const byte*)tile.photo, *begin = photo_row(tile, row, column);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    const int TOGETHER = 16 * LANES;  // they pass through registers
#else
    const int TOGETHER = 3 * 16 * LANES;
#endif
    const int lead = lead_of(begin), lane = 16 * threadIdx.x, pitch = 3 * tile.photo_width;
    if (row > 0 && row < tile.photo_height - 1 && pitch >= 15) {  // there are 15 bytes of the photo around it
        const int rest = lead + bytes - lane;
        const byte* from = begin - lead + lane;
        hold(from);
#pragma unroll 1
        for (int at = 0; at < rest; at += TOGETHER) {
            copy_vectors<16 * LANES, TOGETHER>(line + lane + at, from + at, rest - at);
        }
    } else {
        stage_line(line, begin, bytes, photo, photo + tile.photo_height * pitch, threadIdx.x, LANES);
    }
}

struct Taps {  // the source values behind one output value
    int first, count;
    double total, per_total;  // of the triangle's values, and one over it
};

// How source and output compare along one axis.
struct Scale {
    double scale, support, per_support;

    __device__ void set(int source, int size) {
        scale = (double)source / size;
        support = scale > 1.0 ? scale : 1.0;
        per_support = 1.0 / support;
    }
    __device__ double center(int d) const { return (d + 0.5) * scale; }
    __device__ double triangle(int index, double center) const {
        double value = 1.0 - fabs((index - center + 0.5) * per_support);
        return value > 0.0 ? value : 0.0;
    }
    // In units of 2**-22. The quotient is that of a division, to the bit: a rounded reciprocal and one correction by an
    // exact remainder (Markstein 1990). A division proper would hold registers for its rare cases.
    __device__ int weight(int index, double center, const Taps& taps) const {
        double value = triangle(index, center), quotient = value * taps.per_total;
        quotient = fma(fma(-quotient, taps.total, value), taps.per_total, quotient);
        return (int)(0.5 + quotient * (1 << 22));
    }
    __device__ Taps taps(int d, int source) const {
        double middle = center(d);
        Taps taps;
        taps.first = max((int)(middle - support + 0.5), 0);
        taps.count = min((int)(middle + support + 0.5), source) - taps.first;
        taps.total = 0;
#pragma unroll 1
        for (int j = 0; j < taps.count; j++) taps.total += triangle(taps.first + j, middle);
        taps.per_total = 1.0 / taps.total;
        return taps;
    }
    // Keep weights of the taps [begin, begin + count) of `n` columns from `x0` on, by all threads of the block: for
    // each four taps of a column three words, of the weights' lowest, middle and highest bytes. What is missing of four
    // is 0.
    __device__ void keep(byte* weights, const Taps* columns, int x0, int n, int begin, int count) const {
#pragma unroll 1
        for (int x = threadIdx.x; x < n; x += LANES) {
            const int own = min(columns[x].count - begin, count);
#pragma unroll 1
            for (int j = threadIdx.y; j < ((own + 3) & ~3); j += ROWS) {
                int value = 0;
                if (j < own) value = weight(columns[x].first + begin + j, center(x0 + x), columns[x]);
                byte* to = weights + 12 * (j / 4 * n + x) + j % 4;
                for (int k = 0; k < 3; k++) to[4 * k] = (byte)(value >> (8 * k));
            }
        }
    }
};

// Weighted sums of three channels, rounded: of pixels from a staged byte on, four for each three words of `weights`,
// which are `step` bytes apart. Sums with the weights' lowest, middle and highest bytes come together last.
struct Blend {
    unsigned sums[3][3];

    __device__ void begin() {
        for (int c = 0; c < 3; c++) sums[c][0] = HALF, sums[c][1] = sums[c][2] = 0;
    }
    __device__ void add(Shared at, Shared weights, int step, int taps) {
        const unsigned shift = 8 * low_bits(at);  // a funnel shift takes it modulo 32
        Shared word = at - (low_bits(at) & 3);
        unsigned words[4];
        load(word, words[0]);
#pragma unroll 1
        do {
            unsigned parts[3];
#pragma unroll
            for (int i = 0; i < 3; i++) {
                load(word + 4 * (i + 1), words[i + 1]);
                load(weights + 4 * i, parts[i]);
            }
            const unsigned first = __funnelshift_r(words[0], words[1], shift);   // r0 g0 b0 r1
            const unsigned second = __funnelshift_r(words[1], words[2], shift);  // g1 b1 r2 g2
            const unsigned third = __funnelshift_r(words[2], words[3], shift);   // b2 r3 g3 b3
            const unsigned four[3] = {__byte_perm(__byte_perm(first, second, 0x0630), third, 0x5210),
                                      __byte_perm(__byte_perm(first, second, 0x0741), third, 0x6210),
                                      __byte_perm(__byte_perm(first, second, 0x0052), third, 0x7410)};
#pragma unroll
            for (int c = 0; c < 3; c++) {
#pragma unroll
                for (int i = 0; i < 3; i++) sums[c][i] = __dp4a(four[c], parts[i], sums[c][i]);
            }
            words[0] = words[3];
            word += 12;
            weights += step;
            taps -= 4;
        } while (taps > 0);
    }
    // 0 to 255: weights are rounded, but even those of 8192 taps add up to less than 1/255 too much.
    __device__ unsigned value(int c) const { return (sums[c][0] + (sums[c][1] << 8) + (sums[c][2] << 16)) >> 22; }
};

struct Stored {  // how rows of the part are, by Out
    int vectors, values, head;
};

// Normalise a row of bytes and store it, by one warp.
template <typename V, bool LAST>
__device__ inline void write_row(const Tile& tile, const Part& part, int y, Shared from, Shared table, Shared lines,
                                 Shared list, const Stored& stored) {
    typedef Out<V, LAST> Row;
    const int count = part.columns;
    const Shared own = lines + 16 - stored.head + threadIdx.x * Row::PIXEL, pixels = from + 3 * threadIdx.x;
#pragma unroll
    for (int k = 0; k < PER_LANE; k++) {
        if (k * LANES >= count) break;
#pragma unroll
        for (int c = 0; c < 3; c++) {
            unsigned word;
            load(table + 1024 * c + 4 * load_byte(pixels + 3 * LANES * k + c), word);
            store(own + k * LANES * Row::PIXEL + c * (LAST ? (int)sizeof(V) : Row::LONG), (V)word);
        }
    }
    __syncwarp();
    const size_t pixel = (size_t)(unsigned)(tile.y0 + part.y + y) * (unsigned)tile.frame_width + (tile.x0 + part.x);
    store_row<V, LAST>(tile, part, (byte*)tile.image + pixel * Row::PIXEL, lines, list, stored.vectors, stored.values);
}

struct Segment {  // of each photo row, what a part needs
    int left, bytes, pitch;
    int rows;    // resampled along x at a time
    int chunks;  // of COLUMN_TAPS taps, where not all of a column's weights are kept at a time
};

template <typename V>
__device__ inline void pillow_bilinear(const Tile* tiles, const unsigned* tile_of_block, int stage_bytes) {
    const int WORDS = 3 * COLUMNS / 4;               // of a row of the part, four values each
    const int ACROSS = (WORDS + LANES - 1) / LANES;  // of them, those that one thread sums up
    const int DOWN = STEP / ROWS;                    // in as many rows
    DYNAMIC_SHARED(stage);                           // photo rows; then the lines that are going out
    __shared__ unsigned table[3 * 256];              // a value a word
    __shared__ Tile tile;
    __shared__ Part part;
    __shared__ Scale across, down;
    __shared__ Segment segment;
    __shared__ Taps columns[COLUMNS], rows[PART_ROWS];
    __shared__ unsigned column_weights[COLUMN_TAPS];
    __shared__ int row_weights[STEP * GROUP];    // of the photo rows in `between`
    __shared__ unsigned between[GROUP * WORDS];  // photo rows, resampled along x
    __shared__ uint2 list[LISTED<V>];
    __shared__ Stored stored;
    __shared__ Blend partial[GROUP];  // of a column whose weights are not all kept

    const int thread = threadIdx.y * LANES + threadIdx.x;
    fetch_tile(tile, tiles, tile_of_block, thread, LANES * ROWS);
    if (thread == 0) {
        part = part_of(tile);
        across.set(tile.photo_width, tile.x1 - tile.x0);
        down.set(tile.photo_height, tile.y1 - tile.y0);
    }
#pragma unroll
    for (int i = 0; i < 3 * 256; i += LANES * ROWS) table[i + thread] = ((const V*)tile.table)[i + thread];
    __syncthreads();
    if (tile.channels_last) {
        const Out<V, true> out(tile, part);
        out.make_list(list);
        if (thread == 0) stored = {out.vectors(), out.values(), out.head};
    } else {
        const Out<V, false> out(tile, part);
        out.make_list(list);
        if (thread == 0) stored = {out.vectors(), out.values(), out.head};
    }
#pragma unroll 1
    for (int x = thread; x < part.columns; x += LANES * ROWS) columns[x] = across.taps(part.x + x, tile.photo_width);
#pragma unroll 1
    for (int y = LANES * ROWS - 1 - thread; y < part.rows; y += LANES * ROWS) {
        rows[y] = down.taps(part.y + y, tile.photo_height);
    }
    __syncthreads();
    if (thread == 0) {
        const Taps& last = columns[part.columns - 1];
        segment.left = columns[0].first;
        segment.bytes = 3 * (last.first + last.count - segment.left);
        segment.pitch = padded(LEAD + segment.bytes + BEYOND);
        segment.rows = max(min(GROUP, stage_bytes / segment.pitch), 1);
        // Only a part of a single column can have more taps than are kept at a time.
        segment.chunks = part.columns == 1 ? (last.count + COLUMN_TAPS - 1) / COLUMN_TAPS : 1;
    }
    __syncthreads();
    if (segment.chunks == 1) across.keep((byte*)column_weights, columns, part.x, part.columns, 0, COLUMN_TAPS);
    const Shared lines = shared_of(stage) + threadIdx.y * 3 * Out<V, false>::LONG;
    Shared sums = shared_of(between), weights = shared_of(column_weights) + 12 * threadIdx.x;
    hold(sums);
    hold(weights);
    const int n = part.columns;
    int first[PER_LANE], taps[PER_LANE];  // of this lane's columns: first byte in the segment, how many
#pragma unroll
    for (int k = 0; k < PER_LANE; k++) {
        const Taps& own = columns[min((int)threadIdx.x + k * LANES, n - 1)];
        first[k] = 3 * (own.first - segment.left);
        taps[k] = own.count;
    }

#pragma unroll 1
    for (int y = 0; y < part.rows; y += STEP) {
        const int count = min(STEP, part.rows - y);
        const int end = rows[y + count - 1].first + rows[y + count - 1].count;
        int sum[DOWN][ACROSS][4];
#pragma unroll
        for (int i = 0; i < DOWN * ACROSS * 4; i++) sum[i / 4 / ACROSS][i / 4 % ACROSS][i % 4] = HALF;
#pragma unroll 1
        for (int top = rows[y].first; top < end; top += segment.rows) {
            const int height = min(segment.rows, end - top);
#pragma unroll 1
            for (int slot = threadIdx.y; slot < height; slot += ROWS) {
                stage_row(shared_of(stage) + slot * segment.pitch, tile, top + slot, segment.left, segment.bytes);
            }
            wait_for_copies();
            __syncthreads();
            if (segment.chunks == 1) {
#pragma unroll 1
                for (int slot = threadIdx.y; slot < height; slot += ROWS) {
                    const Shared from =
                        shared_of(stage) + slot * segment.pitch + (int)photo_lead(tile, top + slot, segment.left);
                    const Shared to = sums + slot * 4 * WORDS + 3 * threadIdx.x;
#pragma unroll
                    for (int k = 0; k < PER_LANE; k++) {
                        if ((int)threadIdx.x + k * LANES >= n) break;
                        Blend blend;
                        blend.begin();
                        blend.add(from + first[k], weights + 12 * k * LANES, 12 * n, taps[k]);
                        for (int c = 0; c < 3; c++) store_byte(to + 3 * k * LANES + c, blend.value(c));
                    }
                }
            } else {  // a single column, by one lane of each warp
#pragma unroll 1
                for (int i = 0; i < segment.chunks; i++) {
                    __syncthreads();
                    across.keep((byte*)column_weights, columns, part.x, 1, i * COLUMN_TAPS, COLUMN_TAPS);
                    __syncthreads();
#pragma unroll 1
                    for (int slot = threadIdx.y; slot < height && threadIdx.x == 0; slot += ROWS) {
                        const Shared from =
                            shared_of(stage) + slot * segment.pitch + (int)photo_lead(tile, top + slot, segment.left);
                        Blend blend;
                        blend.begin();
                        if (i > 0) blend = partial[slot];
                        blend.add(from + 3 * i * COLUMN_TAPS, weights, 12, min(taps[0] - i * COLUMN_TAPS, COLUMN_TAPS));
                        partial[slot] = blend;
                        for (int c = 0; c < 3; c++) store_byte(sums + slot * 4 * WORDS + c, blend.value(c));
                    }
                }
            }
#pragma unroll 1
            for (int i = thread; i < count * height; i += LANES * ROWS) {
                const int slot = i / height, row = top + i % height;
                const Taps& taps = rows[y + slot];
                const bool used = row >= taps.first && row < taps.first + taps.count;
                row_weights[slot * GROUP + row - top] =
                    used ? down.weight(row, down.center(part.y + y + slot), taps) : 0;
            }
            __syncthreads();
#pragma unroll
            for (int i = 0; i < DOWN; i++) {
                const int slot = threadIdx.y + i * ROWS;
                if (slot >= count) break;
                const int begin = max(rows[y + slot].first - top, 0);
                const int stop = min(rows[y + slot].first + rows[y + slot].count - top, height);
#pragma unroll 1
                for (int row = begin; row < stop; row++) {
                    const int weight = row_weights[slot * GROUP + row];
#pragma unroll
                    for (int k = 0; k < ACROSS; k++) {
                        const int at = threadIdx.x + k * LANES;
                        if (WORDS % LANES && at >= WORDS) break;
                        unsigned four;
                        load(sums + 4 * (row * WORDS + at), four);
#pragma unroll
                        for (int v = 0; v < 4; v++) sum[i][k][v] += weight * (int)__byte_perm(four, 0, 0x4440 + v);
                    }
                }
            }
        }
        __syncthreads();  // `between` is free: now it takes the rows of the part, each warp's its own
#pragma unroll
        for (int i = 0; i < DOWN; i++) {
            const int slot = threadIdx.y + i * ROWS;
            if (slot >= count) break;
#pragma unroll
            for (int k = 0; k < ACROSS; k++) {
                const int at = threadIdx.x + k * LANES;
                if (WORDS % LANES && at >= WORDS) break;
                unsigned four = 0;
#pragma unroll
                for (int v = 0; v < 4; v++) four |= (unsigned)(sum[i][k][v] >> 22) << (8 * v);
                store(sums + 4 * (slot * WORDS + at), four);
            }
            __syncwarp();
            const Shared from = sums + 4 * slot * WORDS, own = lines + i * ROWS * 3 * Out<V, false>::LONG;
            const Shared share = shared_of(list) + 8 * threadIdx.x;
            if (tile.channels_last) {
                write_row<V, true>(tile, part, y + slot, from, shared_of(table), own, share, stored);
            } else {
                write_row<V, false>(tile, part, y + slot, from, shared_of(table), own, share, stored);
            }
        }
        __syncthreads();
    }
}

static_assert(STEP * 3 * Out<unsigned, false>::LONG == LINES,
              "gpu.py makes the stage large enough for the widest type");

}  // namespace
