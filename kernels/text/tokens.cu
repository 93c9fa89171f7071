// Tokens of sentences, from a table of all of a data set's: a row is a sentence's length and then its tokens. A thread
// writes one token, and whether a model sees it.

template <typename Number>
__device__ void take_tokens(const int* __restrict__ rows, const Number* __restrict__ table,
                            long long* __restrict__ tokens, long long* __restrict__ seen, int samples, int length) {
    const unsigned i = blockIdx.x * THREADS + threadIdx.x;  // below 2^28 + THREADS
    if (i >= static_cast<unsigned>(samples) * length) return;
    const unsigned sample = i / length, column = i - sample * length;
    const Number* row = table + static_cast<size_t>(rows[sample]) * (length + 1);
    tokens[i] = row[1 + column];
    seen[i] = column < static_cast<unsigned>(row[0]);
}

#define TAKE_TOKENS(name, type)                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                  \
        name(const int* __restrict__ rows, const type* __restrict__ table, long long* __restrict__ tokens, \
             long long* __restrict__ seen, int samples, int length) {                                      \
        take_tokens<type>(rows, table, tokens, seen, samples, length);                                     \
    }

TAKE_TOKENS(take_tokens_2, unsigned short)
TAKE_TOKENS(take_tokens_4, int)
