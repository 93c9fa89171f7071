// What both of the mosaic's kernels do: the part of a cell that a block writes, photo rows on their way to shared
// memory and values on their way to the frame.

namespace {

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

}  // namespace
