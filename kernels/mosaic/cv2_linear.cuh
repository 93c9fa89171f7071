// A part of a cell by OpenCV's INTER_LINEAR.
//
// Each warp makes rows that follow each other, and waits for no other warp: while it blends the columns of a photo row,
// the next one that it wants comes to the other line of its stage. What it knows of its columns stays in registers.

namespace {

struct Pair {  // two neighbouring source values of one output value
    int first, second;
    unsigned weights[2];  // in units of 1/2048
};

__device__ inline Pair pair_of(int d, double scale, int source, bool clamp_weight) {
    float place = (float)((d + 0.5) * scale - 0.5);
    int index = (int)floorf(place);
    float fraction = place - (float)index;
    if (clamp_weight && (index < 0 || index >= source - 1)) fraction = 0;
    Pair pair;
    pair.first = min(max(index, 0), source - 1);
    pair.second = min(max(index + 1, 0), source - 1);
    pair.weights[0] = (unsigned)rintf((1.0f - fraction) * 2048.0f);
    pair.weights[1] = (unsigned)rintf(fraction * 2048.0f);
    return pair;
}

// Three channels of two neighbouring pixels at a staged byte, weighted, in units of 1/128. Reads the word of that byte
// and two more: at most 12 bytes from the first one on that is not staged, gpu.py's _BEYOND.
__device__ inline void blend_columns(Shared at, unsigned weights, unsigned* value) {
    const unsigned shift = 8 * low_bits(at);  // a funnel shift takes it modulo 32
    const Shared word = at - (low_bits(at) & 3);
    unsigned first, second, third;
    load(word, first);
    load(word + 4, second);
    load(word + 8, third);
    const unsigned low = __funnelshift_r(first, second, shift);   // r0 g0 b0 r1
    const unsigned high = __funnelshift_r(second, third, shift);  // g1 b1
    const unsigned red_green = __byte_perm(low, high, 0x4130), blue = __byte_perm(low, high, 0x5252);
    value[0] = __dp2a_lo(weights, red_green, 0u) >> 4;
    value[1] = __dp2a_hi(weights, red_green, 0u) >> 4;
    value[2] = __dp2a_lo(weights, blue, 0u) >> 4;
}

// The whole part of a product in units of 2**-32. The compiler would add to a mul.hi by a multiply-add whose addend,
// two registers, has to be put together for it.
__device__ inline unsigned high(unsigned a, unsigned b) {
#ifdef __CUDA_ARCH__
    unsigned long long product;
    asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
    return (unsigned)(product >> 32);
#else
    return (unsigned)((unsigned long long)a * b >> 32);
#endif
}

// Photo rows on their way to a warp: one is being read, another one is coming.
struct Photo {
    const Tile& tile;
    const byte* from;        // where this lane's copy of row 0 begins
    int pitch, left, bytes;  // from a row to the next one; before what the part needs of each; and that
    int inner;               // rows but for the first and the last: there are 15 bytes of the photo around them
    Shared free;             // the one of the warp's two lines that is not being read
    int other;               // from there to the other one
    Shared begin, coming;    // the first bytes of the row that is being read, of the one that is coming

    // Let a row come; -1: none.
    __device__ void start(int then) {
        if (then < 0) return;
        const byte* at = from + (size_t)((unsigned)then * (unsigned)pitch);
        const int lead = lead_of(at), lane = 16 * threadIdx.x;
        coming = free + lead;
        if ((unsigned)(then - 1) < (unsigned)inner) {
            at -= lead;
            hold(at);
            copy_vectors<16 * LANES, PHOTO_LINE>(free + lane, at, lead + bytes - lane);
        } else {
            const byte* photo = (const byte*)tile.photo;
            stage_line(free, at - lane, bytes, photo, photo + tile.photo_height * pitch, threadIdx.x, LANES);
        }
    }

    // Read the row that was coming, and let another one come.
    __device__ void turn(int then) {
        wait_for_copies();
        __syncwarp();  // all lanes have done so, and none still reads the line before
        begin = coming;
        free += other;
        other = -other;
        start(then);
    }
};

// What the threads of a block share.
struct Block {
    const Tile& tile;
    const Part& part;
    const int2* columns;
    const uint4* rows;
    uint2* list;  // of vectors, then of values
    Shared table, stage, lines;
    int line;  // bytes of a line of the stage
};

template <typename V, bool LAST>
__device__ inline void write_rows(const Block& block) {
    typedef Out<V, LAST> Row;
    const Tile& tile = block.tile;
    const Part& part = block.part;
    const int count = part.columns, left = block.columns[0].x;
    const Row out(tile, part);
    const int vectors = out.vectors(), values = out.values();
    out.make_list(block.list);
    __syncthreads();
    const int height = (part.rows + ROWS - 1) / ROWS;
    int y = threadIdx.y * height;
    const int end = min(y + height, part.rows);
    if (y >= end) return;

    const int pitch = 3 * tile.photo_width;
    Photo photo = {tile, (const byte*)tile.photo + left + 16 * threadIdx.x, pitch, left};
    photo.bytes = min(block.columns[count - 1].x + 6, pitch) - left;
    photo.inner = pitch < 15 ? 0 : max(tile.photo_height - 2, 0);
    photo.free = block.stage + 2 * threadIdx.y * block.line;
    photo.other = block.line;
    hold(photo.from);
    hold(photo.free);
    photo.start(block.rows[y].x);

    const size_t pixel = (size_t)(unsigned)(tile.y0 + part.y + y) * (unsigned)tile.frame_width + (tile.x0 + part.x);
    byte* frame = (byte*)tile.image + pixel * Row::PIXEL;
    const unsigned to_next = (unsigned)tile.frame_width * Row::PIXEL;
    Shared lines = block.lines + threadIdx.y * 3 * Row::LONG, own = lines + 16 - out.head + threadIdx.x * Row::PIXEL;
    Shared list = shared_of(block.list) + 8 * threadIdx.x;
    hold(lines);
    hold(own);
    hold(list);

    int at[PER_LANE];
    unsigned weights[PER_LANE];
#pragma unroll
    for (int k = 0; k < PER_LANE; k++) {
        const int2 own = block.columns[min((int)threadIdx.x + k * LANES, count - 1)];
        at[k] = own.x - left;
        weights[k] = own.y;
    }

    int above = -1, row = -1;  // the photo row that `upper` is made of, that which is being read
    unsigned upper[PER_LANE][3];
#pragma unroll 1
    for (; y < end; y++) {
        const uint4 pair = block.rows[y];
        int ahead = y + 1, then = -1;  // the photo row that is wanted after those of this row
#pragma unroll 1
        while (ahead < end && (int)block.rows[ahead].y <= (int)pair.y) ahead++;
        if (ahead < end) then = max((int)block.rows[ahead].x, (int)pair.y + 1);
        if ((int)pair.x != above) {
            above = pair.x;
            if (row != above) photo.turn(above < (int)pair.y ? (int)pair.y : then);
            row = above;
#pragma unroll
            for (int k = 0; k < PER_LANE; k++) {
                if (k * LANES < count) blend_columns(photo.begin + at[k], weights[k], upper[k]);
            }
        }
        if (row != (int)pair.y) photo.turn(then);
        row = pair.y;
#pragma unroll
        for (int k = 0; k < PER_LANE; k++) {
            if (k * LANES >= count) break;
            unsigned lower[3];
            blend_columns(photo.begin + at[k], weights[k], lower);
#pragma unroll
            for (int c = 0; c < 3; c++) {
                const unsigned value = high(upper[k][c], pair.z) + high(lower[c], pair.w) + 2;
                unsigned word;
                load(block.table + 1024 * c + (value & ~3u), word);
                store(own + k * LANES * Row::PIXEL + c * (LAST ? (int)sizeof(V) : Row::LONG), (V)word);
            }
        }
        __syncwarp();
        store_row<V, LAST>(tile, part, frame, lines, list, vectors, values);
        __syncwarp();
        frame += to_next;
    }
}

template <typename V>
__device__ inline void cv2_linear(const Tile* tiles, const unsigned* tile_of_block, int stage_bytes) {
    DYNAMIC_SHARED(stage);
    __shared__ unsigned table[3 * 256];  // a value a word, so that four times an index is its offset
    __shared__ int2 columns[COLUMNS];    // byte in a photo row, weights
    __shared__ uint4 rows[PART_ROWS];    // first, second, and their weights in units of 2**-27
    __shared__ uint4 out[ROWS * 3 * Out<V, false>::LONG / 16];
    __shared__ uint2 list[LISTED<V>];
    __shared__ double across, down;  // photo pixels to a pixel
    __shared__ Tile tile;
    __shared__ Part part;

    const int thread = threadIdx.y * LANES + threadIdx.x;
    fetch_tile(tile, tiles, tile_of_block, thread, LANES * ROWS);
    if (thread == 0) part = part_of(tile);
    if (thread == LANES * ROWS - 1) {
        across = (double)tile.photo_width / (tile.x1 - tile.x0);
        down = (double)tile.photo_height / (tile.y1 - tile.y0);
    }
#pragma unroll
    for (int i = 0; i < 3 * 256; i += LANES * ROWS) table[i + thread] = ((const V*)tile.table)[i + thread];
    __syncthreads();
#pragma unroll 1
    for (int x = thread; x < part.columns; x += LANES * ROWS) {
        const Pair pair = pair_of(part.x + x, across, tile.photo_width, true);
        columns[x] = make_int2(3 * pair.first, (int)(pair.weights[0] | pair.weights[1] << 16));
    }
#pragma unroll 1
    for (int y = LANES * ROWS - 1 - thread; y < part.rows; y += LANES * ROWS) {
        const Pair pair = pair_of(part.y + y, down, tile.photo_height, false);
        rows[y] = make_uint4(pair.first, pair.second, pair.weights[0] << 16, pair.weights[1] << 16);
    }
    __syncthreads();
    const Block block = {
        tile, part, columns, rows, list, shared_of(table), shared_of(stage), shared_of(out), stage_bytes / (2 * ROWS)};
    if (tile.channels_last) {
        write_rows<V, true>(block);
    } else {
        write_rows<V, false>(block);
    }
}

}  // namespace
