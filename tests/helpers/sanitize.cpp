// Runs a launch that a file describes, on photos and frames of exactly the right size, for a sanitizer to watch:
// which kernel, blocks, stage bytes, tiles, lines (each int32), the tiles, the tile of each block, and the letterbox's
// lines. A tile's photo is how far behind a multiple of 128 bytes it is to lie.
#include <sanitizer/asan_interface.h>

#include <cstdio>
#include <memory>
#include <new>

int main(int, char** argv) {
    FILE* file = std::fopen(argv[1], "rb");
    int head[5];
    if (!file || std::fread(head, sizeof(head), 1, file) != 1) return 2;
    std::vector<Tile> tiles(head[3]);
    std::vector<unsigned> tile_of_block(head[1]);
    std::vector<int> lines(head[4]);
    if (std::fread(tiles.data(), sizeof(Tile), tiles.size(), file) != tiles.size()) return 2;
    if (std::fread(tile_of_block.data(), 4, tile_of_block.size(), file) != tile_of_block.size()) return 2;
    if (std::fread(lines.data(), 4, lines.size(), file) != lines.size()) return 2;
    std::fclose(file);
    const std::align_val_t line{128};
    std::vector<std::shared_ptr<void>> kept;
    auto take = [&](size_t bytes, size_t behind) {
        kept.emplace_back(operator new(behind + bytes, line), [&](void* memory) { operator delete(memory, line); });
        byte* memory = (byte*)kept.back().get() + behind;
        for (size_t i = 0; i < bytes; i++) memory[i] = (byte)(i * 2654435761u >> 13);
        ASAN_POISON_MEMORY_REGION(kept.back().get(), behind);
        return (unsigned long long)memory;
    };
    for (Tile& tile : tiles) {
        tile.photo = take(3ull * tile.photo_height * tile.photo_width, tile.photo);
        tile.table = take(3 * 256 * tile.itemsize, 0);
        tile.image = take(3ull * tile.frame_height * tile.frame_width * tile.itemsize, 0);
        tile.mask = take((size_t)tile.frame_height * tile.frame_width, 0);
    }
    if (head[0] < FIRST_GATHER) {
        run(head[0], head[1], tiles.data(), tile_of_block.data(), head[2]);
    } else if (head[0] < FIRST_LETTERBOX) {
        run_gather(head[0] - FIRST_GATHER, head[1], tiles.data(), tile_of_block.data());
    } else {
        run_letterbox(head[0] - FIRST_LETTERBOX, head[1], tiles.data(), tile_of_block.data(), lines.data());
    }
    return 0;
}
