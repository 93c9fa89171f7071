// Mosaic cells on a GPU: decoded photos in, normalised pixels in the frames, all cells of all samples in one launch.
//
//     photo [H, W, 3]         stage (shared)        out (shared)            frame [3, FH, FW]
//     rows of this part  ──▶  row segments    ──▶   normalised lines  ──▶   box of the cell
//                    16 bytes            resample                16 bytes
//
// A block of LANES x ROWS threads writes one part of one cell, a few columns wide. Photos and frames may lie at any
// address: what is staged keeps its address modulo 16, so that the middle of every line moves by 16 bytes at a time and
// only its ends by less.
//
// "cv2-linear": each warp makes rows of its own, one at a time, and stages the photo's for itself: once each, and once
// more where the rows of two warps meet. "pillow-bilinear": all warps walk down STEP rows at a time; a photo row is
// read once in each step that needs it.
//
// The arithmetic is that of kernels/reference.py, to the bit. Compile with --fmad=false: a contracted multiply-add
// rounds once where OpenCV, Pillow and the CPU kernels round twice. gpu.py launches it and has the constants;
// lines.cuh, parts.cuh and the two rules' texts stand before this one.

// Blocks a multiprocessor: four where there is shared memory for them, 64 registers each; three leave 80.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 900 || __CUDA_ARCH__ == 1000)
#define BLOCKS 4
#else
#define BLOCKS 3
#endif

#define KERNEL(name, resample, type, blocks)                                                                \
    extern "C" __global__ void __launch_bounds__(LANES* ROWS, blocks)                                       \
        name(const Tile* __restrict__ tiles, const unsigned* __restrict__ tile_of_block, int stage_bytes) { \
        resample<type>(tiles, tile_of_block, stage_bytes);                                                  \
    }

KERNEL(cv2_linear_1, cv2_linear, unsigned char, BLOCKS)
KERNEL(cv2_linear_2, cv2_linear, unsigned short, BLOCKS)
KERNEL(cv2_linear_4, cv2_linear, unsigned int, BLOCKS)
KERNEL(pillow_bilinear_1, pillow_bilinear, unsigned char, BLOCKS)
KERNEL(pillow_bilinear_2, pillow_bilinear, unsigned short, BLOCKS)
KERNEL(pillow_bilinear_4, pillow_bilinear, unsigned int, BLOCKS)
