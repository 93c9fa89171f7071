// Which part of which cell a block of the mosaic's kernels writes, and how its values come to the frame.

namespace {

struct Part {  // of a cell, in pixels from the cell's corner
    int x, y, columns, rows;
};

// The part that this block works on.
__device__ inline Part part_of(const Tile& tile) {
    const int width = tile.x1 - tile.x0, height = tile.y1 - tile.y0;
    const int across = (width + tile.part_width - 1) / tile.part_width;
    const int index = blockIdx.x - tile.first_block;
    Part part;
    part.x = index % across * tile.part_width;
    part.y = index / across * tile.part_height;
    part.columns = min(tile.part_width, width - part.x);
    part.rows = min(tile.part_height, height - part.y);
    return part;
}

const int PER_LANE = COLUMNS / LANES;  // columns of a part, at most

// Values of a row of the part on their way to the frame: they wait in lines, one a channel, or channels last a single
// one, until whole vectors can be stored.
//
// Where rows of the frame are multiples of 16 bytes long, every line of every row lies alike, `head` bytes before the
// next multiple of 16, and the block makes one list of all vectors of a row and of the values before and behind them.
template <typename V, bool LAST>
struct Out {
    static const int PIXEL = (LAST ? 3 : 1) * sizeof(V), COUNT = LAST ? 1 : 3;  // bytes; lines of a row
    static const int LONG = COLUMNS * sizeof(V) + 16;                           // bytes from a line to the next one
    static const int MOST_VECTORS = 3 * COLUMNS * sizeof(V) / 16;

    int bytes, head;  // of a line; of them, before the first vector
    bool alike;       // lines: else they are stored value by value
    unsigned plane;   // bytes from a line to the next one, in the frame

    __device__ Out(const Tile& tile, const Part& part) {
        const unsigned row = (unsigned)tile.frame_width * PIXEL;
        alike = (row & 15) == 0;
        bytes = part.columns * PIXEL;
        head = alike ? min((int)(-((unsigned)tile.image + (unsigned)(tile.x0 + part.x) * PIXEL) & 15), bytes) : 0;
        plane = (unsigned)tile.frame_height * tile.frame_width * (unsigned)sizeof(V);
    }

    // In the list; values -1: there is none.
    __device__ int vectors() const { return alike ? COUNT * ((bytes - head) / 16) : 0; }
    __device__ int values() const { return alike ? COUNT * (head + (bytes - head) % 16) / (int)sizeof(V) : -1; }

    // Offset in the frame and in the lines of byte `at` of a line.
    __device__ uint2 place(int line, int at) const {
        return make_uint2(line * plane + at, line * LONG + 16 - head + at);
    }

    __device__ uint2 vector(int i) const {
        const int each = (bytes - head) / 16, line = (i >= each) + (i >= 2 * each);
        return place(line, head + 16 * (i - line * each));
    }
    __device__ uint2 value(int i) const {
        const int each = (head + (bytes - head) % 16) / (int)sizeof(V), line = (i >= each) + (i >= 2 * each);
        const int at = (i - line * each) * (int)sizeof(V);
        return place(line, at < head ? at : at + (bytes - head) / 16 * 16);
    }

    // By all threads of the block.
    __device__ void make_list(uint2* list) const {
        const int first = vectors(), all = first + max(values(), 0);
#pragma unroll 1
        for (int i = threadIdx.y * LANES + threadIdx.x; i < all; i += LANES * ROWS) {
            list[i] = i < first ? vector(i) : value(i - first);
        }
    }
};

// Places in the list, at most.
template <typename V>
constexpr int LISTED = 3 * COLUMNS * sizeof(V) / 16 + 3 * 2 * (16 / sizeof(V) - 1);

// Store a row that waits in `lines` to where the part begins in the frame, by one warp; `list` is where the lane's
// share of Out's list begins, `vectors` and `values` are how many there are.
template <typename V, bool LAST>
__device__ inline void store_row(const Tile& tile, const Part& part, byte* frame, Shared lines, Shared list,
                                 int vectors, int values) {
#pragma unroll
    for (int i = 0; i < Out<V, LAST>::MOST_VECTORS; i += LANES) {
        if (i + (int)threadIdx.x >= vectors) break;
        uint2 place;
        uint4 vector;
        load(list + 8 * i, place);
        load(lines + place.y, vector);
        *(uint4*)(frame + place.x) = vector;
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < values; i += LANES) {
        uint2 place;
        V value;
        load(list + 8 * (vectors + i - (int)threadIdx.x), place);
        load(lines + place.y, value);
        *(V*)(frame + place.x) = value;
    }
    if (values < 0) {
        const Out<V, LAST> out(tile, part);
#pragma unroll 1
        for (int i = threadIdx.x; i < 3 * part.columns; i += LANES) {
            const int line = LAST ? 0 : i / part.columns;
            const uint2 place = out.place(line, (i - line * part.columns) * (int)sizeof(V));
            V value;
            load(lines + place.y, value);
            *(V*)(frame + place.x) = value;
        }
    }
}

}  // namespace
