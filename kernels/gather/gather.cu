// Cells of resident tiles on a GPU: uint8 planes in, normalised pixels in the frames, all cells of all samples in one
// launch.
//
//     planes [3, h, w]            staged (shared)        frame [3, FH, FW] or [FH, FW, 3]
//     one run of bytes   ──▶   chunk of a block   ──▶   lines of the cell's box
//                     16 bytes              table, 16 bytes
//
// A block reads CHUNK bytes of a cell's planes: one chunk of all that lies there, or, channels last, one of each plane.
// Chunks meet at multiples of 128 bytes in memory, not where rows end, so that each byte crosses the bus once, in whole
// lines, when the planes lie in the host's memory. (Channels last, only where planes are multiples of 128 bytes long.)
// Planes may lie at any address, frames at any multiple of a value's size.
//
// A vector of 16 bytes of the frame is made in registers, whatever the staged bytes' address, and stored as it is
// unless it reaches beyond the cell's line or the chunk: then value by value.
//
// Values are looked up, as the reference does it. When 32 threads look up random bytes, as many as 2.0, 2.8 and 3.1 of
// them (values of 1, 2 and 4 bytes) want the same bank of shared memory. That is a third of the cycles that an H100
// has while the bytes come and go, a half with the reading of what was staged, and does not hold them up. Copies of the
// table for each fourth thread would raise it to 3.0, 3.1 and 3.2; to compute two exact quotients takes as many cycles.
//
// gpu.py launches it and has the constants; lines.cuh stands before this text.

namespace {

const int SLACK = 16;                          // bytes around what is staged that a vector may begin or end in
const int PIECE = CHUNK / 3 + 16 + 2 * SLACK;  // of shared memory for a plane's piece, its lead and the slack

template <typename V>
struct Gather {
    static const int VALUES = 16 / sizeof(V);  // of a vector

    const Tile& tile;
    const byte* staged;
    const V* table;
    int width, height;  // of the cell
    int size;           // bytes of what is read side by side: a plane, or all three planes, one after the other
    int begin, end;     // of the chunk in it

    // Where byte `at` of a plane, counted from its first, is staged: how far behind `staged`.
    __device__ int place(int plane, int at) const {
        const int lead = ((unsigned)tile.photo + plane * size + begin) & 15;
        return plane * PIECE + SLACK + lead + at - begin;
    }

    // Store the vector `k` of the line of row `row`, counted through all channels where they lie one after the other.
    __device__ void store(int row, int k) const {
        const int planes = tile.channels_last ? 3 : 1, first = row * width;
        const int channel = tile.channels_last ? 0 : (row >= height) + (row >= 2 * height);
        const int y = tile.y0 + row - channel * height;
        V* line = (V*)tile.image + ((unsigned)(channel * tile.frame_height + y) * tile.frame_width + tile.x0) * planes;
        const int at = k * VALUES - lead_of(line) / (int)sizeof(V);  // of the vector in the line, in values
        const int low = max(begin - first, 0) * planes, high = min(end - first, width) * planes;
        if (at + VALUES <= low || at >= high) return;
        unsigned words[4] = {0, 0, 0, 0};
        if (!tile.channels_last) {
            const V* values = table + 256 * channel;
            const int from = place(0, first + at), shift = 8 * (from & 3);
            const unsigned* word = (const unsigned*)staged + (from >> 2);
#pragma unroll
            for (int i = 0; i < VALUES; i += 4) {
                const unsigned four = __funnelshift_r(word[i / 4], word[i / 4 + 1], shift);
#pragma unroll
                for (int j = 0; j < 4; j++) put(words, i + j, values[four >> (8 * j) & 255]);
            }
        } else {
            const int pixel = (at + 3 * SLACK) / 3 - SLACK, phase = at - 3 * pixel;  // rounded down, though at < 0
            const byte* from[3];
            const V* values[3];
#pragma unroll
            for (int i = 0; i < 3; i++) {
                const int wrapped = phase + i >= 3, plane = phase + i - 3 * wrapped;
                from[i] = staged + place(plane, first + pixel + wrapped);
                values[i] = table + 256 * plane;
            }
#pragma unroll
            for (int i = 0; i < VALUES; i++) put(words, i, values[i % 3][from[i % 3][i / 3]]);
        }
        if (at >= low && at + VALUES <= high) {
            __stcs((uint4*)(line + at), make_uint4(words[0], words[1], words[2], words[3]));
        } else {
#pragma unroll
            for (int i = 0; i < VALUES; i++) {
                if (at + i >= low && at + i < high) line[at + i] = (V)(words[i * sizeof(V) / 4] >> shift_of(i));
            }
        }
    }

    __device__ static int shift_of(int i) { return 8 * (i * (int)sizeof(V) & 3); }

    __device__ static void put(unsigned* words, int i, V value) {
        words[i * sizeof(V) / 4] |= (unsigned)value << shift_of(i);
    }
};

template <typename V>
__device__ inline void gather(const Tile* tiles, const unsigned* tile_of_block) {
    __shared__ uint4 staged[3 * PIECE / 16];
    __shared__ uint4 table[3 * 256 * sizeof(V) / 16 + 1];
    __shared__ Tile tile;
    fetch_tile(tile, tiles, tile_of_block, threadIdx.x, THREADS);

    const int width = tile.x1 - tile.x0, height = tile.y1 - tile.y0, bytes = 3 * height * width;
    const int size = tile.channels_last ? height * width : bytes, step = tile.channels_last ? CHUNK / 3 : CHUNK;
    const int from = (int)(blockIdx.x - tile.first_block) * step - (int)(tile.photo & (BUS_LINE - 1));
    const int begin = max(from, 0), end = min(from + step, size);
    const byte *photo = (const byte*)tile.photo, *values = (const byte*)tile.table;
    byte* to = (byte*)staged + SLACK;
#pragma unroll 1
    for (int at = begin; at < bytes; at += size, to += PIECE) {
        stage_line(shared_of(to), photo + at, end - begin, photo, photo + bytes, threadIdx.x, THREADS);
    }
    stage_line(shared_of(table), values, 768 * sizeof(V), values, values + 768 * sizeof(V), threadIdx.x, THREADS);
    wait_for_copies();
    __syncthreads();

    const V* staged_table = (const V*)((const byte*)table + lead_of(values));
    const Gather<V> cell = {tile, (const byte*)staged, staged_table, width, height, size, begin, end};
    const unsigned line = (tile.channels_last ? 3 : 1) * width * sizeof(V);
    const unsigned across = (line + 31 - sizeof(V)) / 16;                       // most vectors that a line lies in
    const unsigned lanes = min(across, THREADS + 0u), lines = THREADS / lanes;  // at a time
    const unsigned last = (end - 1u) / width, thread = threadIdx.x;
    if (thread >= lanes * lines) return;
#pragma unroll 1
    for (unsigned row = (unsigned)begin / width + thread / lanes; row <= last; row += lines) {
#pragma unroll 1
        for (unsigned k = thread % lanes; k < across; k += lanes) cell.store(row, k);
    }
}

}  // namespace

#define GATHER(name, type)                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS)                                  \
        name(const Tile* __restrict__ tiles, const unsigned* __restrict__ tile_of_block) { \
        gather<type>(tiles, tile_of_block);                                                \
    }

GATHER(gather_1, unsigned char)
GATHER(gather_2, unsigned short)
GATHER(gather_4, unsigned int)
