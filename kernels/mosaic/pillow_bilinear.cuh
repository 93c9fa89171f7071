// A part of a cell by Pillow's antialiased BILINEAR.

namespace {

const int HALF = 1 << 21;  // in units of 2**-22; sums begin with it so that a shift rounds them

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
