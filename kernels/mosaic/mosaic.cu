// Mosaic cells on a GPU: decoded photos in, normalised pixels in the frames, all cells of all samples in one launch.
//
//     photo [H, W, 3]         stage (shared)        out (shared)            frame [3, FH, FW]
//     rows of this part  ──▶  row segments    ──▶   normalised lines  ──▶   box of the cell
//                    16 bytes            resample                16 bytes
//
// A block of LANES x ROWS threads writes one part of one cell: a few columns, walked down STEP rows at a time. A photo
// row is read once in each step that needs it: at most twice, where two steps meet, and more often, out of the cache,
// only where the photo is enlarged more than fourfold. Photos and frames may lie at any address: what is staged keeps
// its address modulo 16, so that the middle of every line moves by 16 bytes at a time and only its ends by less.
//
// The arithmetic is that of kernels/reference.py, to the bit. Compile with --fmad=false: a contracted multiply-add
// rounds once where OpenCV, Pillow and the CPU kernels round twice. gpu.py launches it and has the constants; lines.cuh
// stands before this text.

namespace {

const int HALF = 1 << 21;  // "pillow-bilinear": in units of 2**-22; sums begin with it so that a shift rounds them

struct Part {  // of a cell, in pixels from the cell's corner
    int x, y, columns, rows;
};

// Fetch the tile and the part that this block works on, both into shared memory.
__device__ inline void fetch(Tile& tile, Part& part, const Tile* tiles, const unsigned* tile_of_block) {
    fetch_tile(tile, tiles, tile_of_block, threadIdx.y * LANES + threadIdx.x, LANES * ROWS);
    if (threadIdx.x == 0 && threadIdx.y == 0) {
        int width = tile.x1 - tile.x0, height = tile.y1 - tile.y0;
        int across = (width + tile.part_width - 1) / tile.part_width;
        int index = blockIdx.x - tile.first_block;
        part.x = index % across * tile.part_width;
        part.y = index / across * tile.part_height;
        part.columns = min(tile.part_width, width - part.x);
        part.rows = min(tile.part_height, height - part.y);
    }
    __syncthreads();
}

// --- between global and shared memory --------------------------------------------------------------------------------

__device__ inline int padded(int bytes) { return (bytes + 15) & ~15; }

__device__ inline const byte* photo_row(const Tile& tile, int row, int column) {
    return (const byte*)tile.photo + ((size_t)row * tile.photo_width + column) * 3;
}

// lead_of(photo_row(tile, row, column)), from the low bits alone.
__device__ inline unsigned photo_lead(const Tile& tile, int row, int column) {
    return ((unsigned)tile.photo + ((unsigned)row * tile.photo_width + column) * 3) & 15;
}

// Start to copy `bytes` bytes of a photo row, from a column on, to `line`. One row of threads does it.
__device__ inline void stage_row(byte* line, const Tile& tile, int row, int column, int bytes) {
    const byte *photo = photo_row(tile, 0, 0), *photo_end = photo_row(tile, tile.photo_height, 0);
    stage_line(line, photo_row(tile, row, column), bytes, photo, photo_end, threadIdx.x, LANES);
}

// Where normalised values wait until whole vectors can be stored: per row three lines, one a channel; or, channels
// last, one line three times as long.
template <typename V>
struct Lines {
    static const int LINE = COLUMNS * sizeof(V) + 16;
    static const int BYTES = STEP * 3 * LINE;

    const Tile& tile;
    const Part& part;
    byte* out;

    __device__ V* target(int y, int channel) const {  // first pixel of row y of the part, in the frame
        size_t row = tile.y0 + part.y + y, column = tile.x0 + part.x, width = tile.frame_width;
        V* image = (V*)tile.image;
        if (tile.channels_last) return image + (row * width + column) * 3;
        return image + (channel * (size_t)tile.frame_height + row) * width + column;
    }

    // lead_of(target(y, channel)), from the low bits alone.
    __device__ unsigned lead(int y, int channel) const {
        unsigned row = tile.y0 + part.y + y, column = tile.x0 + part.x, width = tile.frame_width;
        unsigned value =
            tile.channels_last ? (row * width + column) * 3 : (channel * tile.frame_height + row) * width + column;
        return ((unsigned)tile.image + value * (unsigned)sizeof(V)) & 15;
    }

    // Where a value of row y, which is row `slot` of this step, waits.
    __device__ V* value(int slot, int y, int x, int channel) const {
        if (tile.channels_last) return (V*)(out + slot * 3 * LINE + lead(y, 0)) + 3 * x + channel;
        return (V*)(out + (slot * 3 + channel) * LINE + lead(y, channel)) + x;
    }

    // Store rows y to y + rows. All threads of the block do it, after a barrier.
    __device__ void store(int y, int rows) const {
        int per_row = tile.channels_last ? 1 : 3;
        int bytes = part.columns * (3 / per_row) * sizeof(V);
#pragma unroll 1
        for (int i = threadIdx.y; i < rows * per_row; i += ROWS) {
            int slot = i / per_row, channel = i % per_row;
            byte* global = (byte*)target(y + slot, channel);
            int lead = lead_of(global);
            byte* begin = global - lead;
            const byte* from = out + (slot * 3 + channel) * LINE;
#pragma unroll 1
            for (int at = 16 * threadIdx.x; at < lead + bytes; at += 16 * LANES) {
                if (at >= lead && at + 16 <= lead + bytes) {
                    *(uint4*)(begin + at) = *(const uint4*)(from + at);
                } else {
#pragma unroll 1
                    for (int k = max(at, lead); k < min(at + 16, lead + bytes); k += sizeof(V)) {
                        *(V*)(begin + k) = *(const V*)(from + k);
                    }
                }
            }
        }
    }
};

static_assert(Lines<unsigned>::BYTES == LINES, "gpu.py makes the stage large enough for the widest type");

template <typename V>
__device__ inline void load_table(V* table, const Tile& tile) {
#pragma unroll 1
    for (int i = threadIdx.y * LANES + threadIdx.x; i < 3 * 256; i += LANES * ROWS)
        table[i] = ((const V*)tile.table)[i];
}

// --- OpenCV's INTER_LINEAR -------------------------------------------------------------------------------------------

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

// --- Pillow's antialiased BILINEAR -----------------------------------------------------------------------------------

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
    __device__ int most(int source) const { return min(2 * (int)ceil(support) + 1, source); }
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
    // Keep weights of the taps [begin, begin + count) of `n` columns from `x0` on, by all threads of the block.
    __device__ void keep(int* weights, const Taps* columns, int x0, int n, int begin, int count) const {
#pragma unroll 1
        for (int x = threadIdx.x; x < n; x += LANES) {
#pragma unroll 1
            for (int j = threadIdx.y; j < min(columns[x].count - begin, count); j += ROWS) {
                weights[j * n + x] = weight(columns[x].first + begin + j, center(x0 + x), columns[x]);
            }
        }
    }
};

struct Segment {  // of each photo row, what a part needs
    int left, bytes, pitch;
    int rows;          // resampled along x at a time
    int taps, chunks;  // weights kept at a time, and how many times that is
};

template <typename V>
__device__ inline void pillow_bilinear(const Tile* tiles, const unsigned* tile_of_block, int stage_bytes) {
    const int WORDS = 3 * COLUMNS / 4;               // of a row of the part, four values each
    const int ACROSS = (WORDS + LANES - 1) / LANES;  // of them, those that one thread sums up
    const int DOWN = STEP / ROWS;                    // in as many rows
    DYNAMIC_SHARED(stage);                           // photo rows; then the lines that are going out
    __shared__ V table[3 * 256];
    __shared__ Tile tile;
    __shared__ Part part;
    __shared__ Scale across, down;
    __shared__ Segment segment;
    __shared__ Taps columns[COLUMNS], rows[PART_ROWS];
    __shared__ int column_weights[COLUMN_TAPS];  // tap after tap: neighbouring threads then read neighbouring words
    __shared__ int row_weights[STEP * GROUP];    // of the photo rows in `between`
    __shared__ unsigned between[GROUP * WORDS];  // photo rows, resampled along x
    __shared__ int partial[GROUP * 3];           // sums along x of a column whose weights are not all kept

    fetch(tile, part, tiles, tile_of_block);
    const int thread = threadIdx.y * LANES + threadIdx.x;
    if (thread == 0) {
        across.set(tile.photo_width, tile.x1 - tile.x0);
        down.set(tile.photo_height, tile.y1 - tile.y0);
    }
    load_table(table, tile);
    __syncthreads();
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
        segment.pitch = padded(LEAD + segment.bytes);
        segment.rows = max(min(GROUP, stage_bytes / segment.pitch), 1);
        // Only a part of a single column can have more taps than are kept at a time.
        segment.taps = part.columns == 1 ? COLUMN_TAPS : across.most(tile.photo_width);
        segment.chunks = part.columns == 1 ? (last.count + COLUMN_TAPS - 1) / COLUMN_TAPS : 1;
    }
    __syncthreads();
    if (segment.chunks == 1) across.keep(column_weights, columns, part.x, part.columns, 0, segment.taps);
    const Lines<V> lines = {tile, part, (byte*)stage};

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
            for (int slot = threadIdx.y; slot < height; slot += ROWS)
                stage_row((byte*)stage + slot * segment.pitch, tile, top + slot, segment.left, segment.bytes);
            wait_for_copies();
            __syncthreads();
#pragma unroll 1
            for (int i = 0; i < segment.chunks; i++) {
                if (segment.chunks > 1) {
                    __syncthreads();
                    across.keep(column_weights, columns, part.x, 1, i * segment.taps, segment.taps);
                    __syncthreads();
                }
#pragma unroll 1
                for (int slot = threadIdx.y; slot < height; slot += ROWS) {
                    const byte* from =
                        (const byte*)stage + slot * segment.pitch + photo_lead(tile, top + slot, segment.left);
#pragma unroll 1
                    for (int x = threadIdx.x; x < part.columns; x += LANES) {
                        const int first = columns[x].first - segment.left + i * segment.taps;
                        const int taps = min(columns[x].count - i * segment.taps, segment.taps);
                        const byte* pixel = from + 3 * first;
                        int value[3];
                        for (int c = 0; c < 3; c++) value[c] = i == 0 ? HALF : partial[3 * slot + c];
#pragma unroll 2
                        for (int j = 0; j < taps; j++) {
                            const int weight = column_weights[j * part.columns + x];
                            for (int c = 0; c < 3; c++) value[c] += weight * pixel[3 * j + c];
                        }
                        byte* to = (byte*)(between + slot * WORDS) + 3 * x;
                        for (int c = 0; c < 3; c++) {
                            if (i == segment.chunks - 1) {
                                to[c] = (byte)min(value[c] >> 22, 255);
                            } else {
                                partial[3 * slot + c] = value[c];
                            }
                        }
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
                        if (at >= WORDS) break;
                        const unsigned four = between[row * WORDS + at];
#pragma unroll
                        for (int v = 0; v < 4; v++) sum[i][k][v] += weight * (int)(four >> (8 * v) & 255);
                    }
                }
            }
        }
        __syncthreads();  // `between` is free: now it takes the rows of the part
#pragma unroll
        for (int i = 0; i < DOWN; i++) {
            const int slot = threadIdx.y + i * ROWS;
            if (slot >= count) break;
#pragma unroll
            for (int k = 0; k < ACROSS; k++) {
                const int at = threadIdx.x + k * LANES;
                if (at >= WORDS) break;
                unsigned four = 0;
#pragma unroll
                for (int v = 0; v < 4; v++) four |= (unsigned)min(sum[i][k][v] >> 22, 255) << (8 * v);
                between[slot * WORDS + at] = four;
            }
        }
        __syncthreads();
        for (int slot = threadIdx.y; slot < count; slot += ROWS) {
            const byte* from = (const byte*)(between + slot * WORDS);
#pragma unroll 1
            for (int x = threadIdx.x; x < part.columns; x += LANES) {
                for (int c = 0; c < 3; c++) *lines.value(slot, y + slot, x, c) = table[256 * c + from[3 * x + c]];
            }
        }
        __syncthreads();
        lines.store(y, count);
        __syncthreads();
    }
}

}  // namespace

#define KERNEL(name, resample, type, blocks)                                                                \
    extern "C" __global__ void __launch_bounds__(LANES* ROWS, blocks)                                       \
        name(const Tile* __restrict__ tiles, const unsigned* __restrict__ tile_of_block, int stage_bytes) { \
        resample<type>(tiles, tile_of_block, stage_bytes);                                                  \
    }

KERNEL(cv2_linear_1, cv2_linear, unsigned char, 4)
KERNEL(cv2_linear_2, cv2_linear, unsigned short, 4)
KERNEL(cv2_linear_4, cv2_linear, unsigned int, 4)
KERNEL(pillow_bilinear_1, pillow_bilinear, unsigned char, 3)
KERNEL(pillow_bilinear_2, pillow_bilinear, unsigned short, 3)
KERNEL(pillow_bilinear_4, pillow_bilinear, unsigned int, 3)
