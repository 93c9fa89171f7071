// Runs a launch that a file describes, on photos and frames of exactly the right size, for a sanitizer to watch:
// which kernel, blocks, stage bytes, tiles (each int32), the tiles, and the tile of each block.
#include <cstdio>
#include <cstdlib>
#include <memory>

int main(int, char** argv) {
    FILE* file = std::fopen(argv[1], "rb");
    int head[4];
    if (!file || std::fread(head, sizeof(head), 1, file) != 1) return 2;
    std::vector<Tile> tiles(head[3]);
    std::vector<unsigned> tile_of_block(head[1]);
    if (std::fread(tiles.data(), sizeof(Tile), tiles.size(), file) != tiles.size()) return 2;
    if (std::fread(tile_of_block.data(), 4, tile_of_block.size(), file) != tile_of_block.size()) return 2;
    std::fclose(file);
    std::vector<std::unique_ptr<byte[]>> kept;
    auto take = [&](size_t bytes) {
        kept.emplace_back(new byte[bytes]);
        for (size_t i = 0; i < bytes; i++) kept.back()[i] = (byte)(i * 2654435761u >> 13);
        return (unsigned long long)kept.back().get();
    };
    for (Tile& tile : tiles) {
        tile.photo = take(3ull * tile.photo_height * tile.photo_width);
        tile.table = take(3 * 256 * tile.itemsize);
        tile.image = take(3ull * tile.frame_height * tile.frame_width * tile.itemsize);
    }
    run(head[0], head[1], tiles.data(), tile_of_block.data(), head[2]);
    return 0;
}
