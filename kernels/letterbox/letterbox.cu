// Letterboxed photos on a GPU: decoded photos and the ends of their targets' runs in, normalised pixels and masks in
// the frames, all such cells of a batch in one launch.
//
//     photo [H, W, 3]                     frame [3, FH, FW]
//     4 x 4 taps of a pixel      ──▶      PART x PART pixels of a block, a thread per pixel
//     ends of the runs           ──▶      mask [FH, FW]
//
// The arithmetic is that of cpu.py, to the bit, and all of it on integers: the host finds the coordinates in the photo,
// by that file's own function. For each cell `lines` holds int32 [h] and [w], of its rows and columns in
// 1/32 pixel, and behind them uint32 [run_count], the ends of the runs; a tile's `runs` is where that begins.
//
// gpu.py launches it and has the constants and `CUBIC`, the weights; lines.cuh stands before this text.

namespace {

const int ROUNDED = ONE / 2;  // half of a weight's unit

static_assert(FRACTIONS == 1 << 5 && ONE == 1 << 15, "what is shifted by");

struct Source {  // of a pixel of the frame, along one axis of the photo
    int first, fraction;

    __device__ explicit Source(int coordinate) : first(coordinate >> 5), fraction(coordinate & (FRACTIONS - 1)) {}
};

// The 4 x 4 taps of all three channels, 0 to 255.
struct Pixel {
    int value[3];

    __device__ Pixel(const Tile& tile, Source down, Source across) {
        const uint4* weights = CUBIC + 2 * (FRACTIONS * down.fraction + across.fraction);
        const int top = down.first - 1, left = across.first - 1;
        const bool inside = top >= 0 && top + 4 <= tile.photo_height && left >= 0 && left + 4 <= tile.photo_width;
        for (int c = 0; c < 3; c++) value[c] = ROUNDED;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const uint4 eight = weights[half];
            const unsigned pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const int weight = (short)(pairs[i / 2] >> 16 * (i & 1));
                const int y = top + 2 * half + i / 4, x = left + (i & 3);
                const bool shown = inside || (y >= 0 && y < tile.photo_height && x >= 0 && x < tile.photo_width);
                const byte* from = (const byte*)(tile.photo + ((long long)y * tile.photo_width + x) * 3);
                for (int c = 0; c < 3; c++) value[c] += weight * (shown ? from[c] : tile.border >> 8 * c & 255);
            }
        }
        for (int c = 0; c < 3; c++) value[c] = min(max(value[c] >> 15, 0), 255);
    }
};

// The runs of one column of the photo's mask, asked for from the top down.
struct Column {
    const unsigned* ends;
    int count, height;
    unsigned begin;  // its first pixel in the mask
    int run;         // that none of the pixels asked for from now on lies before

    // The first of the runs from `run` on that ends behind a pixel; mask.find_run.
    __device__ int find(unsigned pixel) const {
        int first = run, end = count;
        const int near = min(first + 8, end);
        while (first < near && ends[first] <= pixel) first++;
        if (first < near) return first;
        while (first < end) {
            const int middle = (first + end) >> 1;
            if (ends[middle] <= pixel) {
                first = middle + 1;
            } else {
                end = middle;
            }
        }
        return first;
    }

    // Whether the mask covers a row and the next one, in bits 0 and 1.
    __device__ unsigned covers(int row) {
        unsigned bits = 0;
        if (row >= 0 && row < height) {
            run = find(begin + row);
            bits = run < count && run & 1;
        }
        if (row + 1 >= 0 && row + 1 < height) {
            const int next = find(begin + row + 1);
            bits |= (next < count && next & 1) << 1;
        }
        return bits;
    }
};

struct Mask {
    Column left, right;

    __device__ Mask(const Tile& tile, const unsigned* ends, int column)
        : left(column_of(tile, ends, column)), right(column_of(tile, ends, column + 1)) {}

    __device__ static Column column_of(const Tile& tile, const unsigned* ends, int column) {
        const bool shown = column >= 0 && column < tile.photo_width;
        return {ends, shown ? (int)tile.run_count : 0, tile.photo_height, (unsigned)column * tile.photo_height, 0};
    }

    // What warpAffine makes of 0 and 255. With its table a weight of 1 is 32767/32768, and the rest is another tap's,
    // too little to be seen.
    __device__ int value(Source down, Source across) {
        const unsigned bits = left.covers(down.first) | right.covers(down.first) << 2;
        const int x = across.fraction, y = down.fraction;
        int total = 0;
        if (bits & 1) total += (FRACTIONS - x) * (FRACTIONS - y);
        if (bits & 2) total += (FRACTIONS - x) * y;
        if (bits & 4) total += x * (FRACTIONS - y);
        if (bits & 8) total += x * y;
        return (ONE / (FRACTIONS * FRACTIONS) * 255 * total + ROUNDED) >> 15;
    }
};

template <typename V>
__device__ inline void letterbox(const Tile* tiles, const unsigned* tile_of_block, const int* lines) {
    __shared__ Tile tile;
    __shared__ uint4 staged[3 * 256 * sizeof(V) / 16 + 1];
    const int thread = threadIdx.y * LANES + threadIdx.x;
    fetch_tile(tile, tiles, tile_of_block, thread, LANES * ROWS);
    const byte* values = (const byte*)tile.table;
    stage_line(shared_of(staged), values, 768 * sizeof(V), values, values + 768 * sizeof(V), thread, LANES * ROWS);
    wait_for_copies();
    __syncthreads();

    const V* table = (const V*)((const byte*)staged + lead_of(values));
    const int width = tile.x1 - tile.x0, height = tile.y1 - tile.y0;
    const int across = (width + PART - 1) / PART, part = blockIdx.x - tile.first_block;
    const int left = part % across * PART, top = part / across * PART;
    const int *rows = lines + tile.runs, *columns = rows + height;
    const unsigned* ends = (const unsigned*)(columns + width);
    const size_t plane = (size_t)tile.frame_height * tile.frame_width;
#pragma unroll 1
    for (int x = left + threadIdx.x; x < min(left + PART, width); x += LANES) {
        const Source column(columns[x]);
        Mask mask(tile, ends, column.first);
#pragma unroll 1
        for (int y = top + threadIdx.y; y < min(top + PART, height); y += ROWS) {
            const Source row(rows[y]);
            const size_t at = (size_t)(tile.y0 + y) * tile.frame_width + tile.x0 + x;
            const Pixel pixel(tile, row, column);
            for (int c = 0; c < 3; c++) {
                ((V*)tile.image)[tile.channels_last ? 3 * at + c : c * plane + at] = table[256 * c + pixel.value[c]];
            }
            ((byte*)tile.mask)[at] = (byte)(mask.value(row, column) >> (tile.soft_mask ? 0 : 7));
        }
    }
}

}  // namespace

#define LETTERBOX(name, type)                                                                                        \
    extern "C" __global__ void __launch_bounds__(LANES* ROWS) name(                                                  \
        const Tile* __restrict__ tiles, const unsigned* __restrict__ tile_of_block, const int* __restrict__ lines) { \
        letterbox<type>(tiles, tile_of_block, lines);                                                                \
    }

LETTERBOX(letterbox_1, unsigned char)
LETTERBOX(letterbox_2, unsigned short)
LETTERBOX(letterbox_4, unsigned int)
