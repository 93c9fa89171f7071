// Runs a PTX kernel on the CPU, a block of threads after the other, and watches what no GPU tells.
//
//     block ─▶ warps in a new order from barrier to barrier ─▶ lanes in lockstep, those behind go first
//
// Lanes of a warp that have parted meet again where the one that is behind in the text catches up, as they do on a GPU
// where code is structured. So an instruction is counted as often as a warp issues it.
//
// A launch ends with a fault at: an access outside the memory that was given to it, or to a part that it may not write;
// an address that is not a multiple of the access's size; two threads at one place without a barrier between them, one
// of them writing; a place of shared memory that an asynchronous copy is still to fill; a copy that nobody waits for;
// a barrier that some threads of the block do not reach; a decision, an address or a stored byte that depends on
// shared memory which nobody wrote (followed bit by bit through the registers, as Valgrind's memcheck does); no end.
// Only to look something up in shared memory by such a number is no fault, and what comes of it is unknown as well: at
// first shared memory holds random bytes, others in each block, so a table that is too small for them is found out.
//
// An asynchronous copy takes place when it is waited for, which is as late as the machine allows.

#include <numeric>
#include <random>

#include "warp.hpp"

namespace {

struct Machine {
    const Instruction* code;
    const int length;
    const u8* register_bits;
    const u64* constants;  // of the registers behind those of the machine and of the kernel
    const int registers, kernel_registers;
    const Launch& launch;
    const Region* regions;
    const int region_count;
    Counts* counts;
    Totals& totals;
    int& here;  // the instruction that runs

    const u32 threads = launch.block[0] * launch.block[1] * launch.block[2];
    Memory memory{regions, region_count, launch.static_shared + launch.dynamic_shared, threads};
    std::vector<Warp> warps;
    u32 block_number = 0;
    u64 issues = 0;
    std::mt19937_64 random{launch.seed};

    // --- memory ------------------------------------------------------------------------------------------------------

    void load(Warp& warp, const Instruction& in, const int* lanes, int n) {
        with_type(in.type, [&](auto zero) {
            typedef decltype(zero) T;
            const u32 bytes = sizeof(T) * in.count;
            u64 addresses[2][LANES];
            int asked[2] = {};
            for (int i = 0; i < n; i++) {
                const int lane = lanes[i];
                T values[4];
                u8 lost[4 * sizeof(T)] = {};
                if (in.space == S_param) {
                    memcpy(values, launch.params + in.offset, bytes);
                } else {
                    const u64 address = warp.value(in.of[0], lane) + in.offset;
                    const bool astray = warp.unknown(in.of[0], lane);
                    const bool in_shared = in.space == S_shared || (in.space == S_generic && memory.is_shared(address));
                    if (astray && !in_shared) fail("has an address that depends on memory nobody wrote");
                    memory.check_aligned(address, bytes);
                    addresses[in_shared][asked[in_shared]++] = address;
                    if (in_shared) {
                        const u32 offset = memory.shared_offset(address, bytes, false);
                        memory.touch_shared(warp.thread(lane), offset, bytes, false);
                        memcpy(lost, &memory.shared_unknown[offset], bytes);
                        if (astray) memset(lost, 255, bytes);
                    } else {
                        memory.touch_global(warp.thread(lane), address, bytes, false);
                    }
                    memcpy(values, (const void*)address, bytes);
                }
                for (int k = 0; k < in.count; k++) {
                    T unknown_bits;
                    memcpy(&unknown_bits, lost + k * sizeof(T), sizeof(T));
                    warp.put(in.to[k], lane, bits(values[k]), bits(unknown_bits));
                }
            }
            for (int s = 0; s < 2; s++)
                if (asked[s]) memory.count(counts[here], addresses[s], asked[s], bytes, s);
        });
    }

    void store(Warp& warp, const Instruction& in, const int* lanes, int n) {
        const u32 size = size_of(in.type), bytes = size * in.count;
        u64 addresses[2][LANES];
        int asked[2] = {};
        for (int i = 0; i < n; i++) {
            const int lane = lanes[i];
            const u64 address = warp.address(in.of[0], lane) + in.offset;
            memory.check_aligned(address, bytes);
            const bool in_shared = in.space == S_shared || (in.space == S_generic && memory.is_shared(address));
            addresses[in_shared][asked[in_shared]++] = address;
            if (in_shared) {
                const u32 offset = memory.shared_offset(address, bytes, true);
                memory.touch_shared(warp.thread(lane), offset, bytes, true);
                for (int k = 0; k < in.count; k++)
                    memcpy(&memory.shared_unknown[offset + k * size], &warp.unknown(in.of[1 + k], lane), size);
            } else {
                memory.touch_global(warp.thread(lane), address, bytes, true);
                for (int k = 0; k < in.count; k++)
                    if (warp.unknown(in.of[1 + k], lane) & ones(8 * size))
                        fail("stores what depends on memory that nobody wrote");
            }
            for (int k = 0; k < in.count; k++) memcpy((u8*)address + k * size, &warp.value(in.of[1 + k], lane), size);
        }
        for (int s = 0; s < 2; s++)
            if (asked[s]) memory.count(counts[here], addresses[s], asked[s], bytes, s);
    }

    void start_copies(Warp& warp, const Instruction& in, const int* lanes, int n) {
        u64 to[LANES], from[LANES];
        int asked = 0;
        for (int i = 0; i < n; i++) {
            const int lane = lanes[i];
            u32 bytes = in.count, copied = bytes;
            to[i] = warp.address(in.of[0], lane) + in.offset;  // the offset is the target's
            if (warp.unknown(in.of[1], lane)) fail("has an address that depends on memory nobody wrote");
            const u64 source = warp.value(in.of[1], lane) + (int64_t)in.target;
            if (in.of[2] >= 0) copied = std::min((u32)warp.value(in.of[2], lane), bytes);
            memory.check_aligned(to[i], bytes), memory.check_aligned(source, bytes);
            memory.begin_copy(warp.thread(lane), memory.shared_offset(to[i], bytes, true), bytes);
            if (copied) memory.touch_global(warp.thread(lane), source, copied, false), from[asked++] = source;
            warp.copies[lane].push_back({to[i], source, copied, bytes - copied, warp.groups[lane]});
            warp.in_flight[lane] += copied;
            warp.most_in_flight[lane] = std::max(warp.most_in_flight[lane], warp.in_flight[lane]);
        }
        if (asked) memory.count(counts[here], from, asked, in.count, false);
        if (n) memory.count(counts[here], to, n, in.count, true);
    }

    void wait_for_copies(Warp& warp, int lane, int groups_left) {  // -1: for those without a group too
        std::vector<Copy> later;
        for (const Copy& copy : warp.copies[lane]) {
            if (groups_left >= 0 && copy.group >= warp.groups[lane] - groups_left) {
                later.push_back(copy);
                continue;
            }
            memory.end_copy(warp.thread(lane), copy.to, copy.from, copy.bytes, copy.zeros);
            warp.in_flight[lane] -= copy.bytes;
        }
        warp.copies[lane].swap(later);
    }

    void shuffle(Warp& warp, const Instruction& in, const int* lanes, int n) {
        bool active[LANES] = {};
        u64 source[LANES], lost[LANES];
        for (int i = 0; i < n; i++) {
            active[lanes[i]] = true;
            source[lanes[i]] = warp.value(in.of[0], lanes[i]), lost[lanes[i]] = warp.unknown(in.of[0], lanes[i]);
        }
        for (int i = 0; i < n; i++) {
            const int lane = lanes[i];
            const u32 by = (u32)warp.value(in.of[1], lane), c = (u32)warp.value(in.of[2], lane);
            const u32 members = (u32)warp.value(in.of[3], lane);
            for (int k = 0; k < LANES; k++)
                if ((members >> k & 1) != active[k]) fail("shuffles among lanes that are not those that are there");
            const int mask = c >> 8 & 31, clamp = c & 31, low = lane & mask, high = low | (clamp & ~mask);
            int other = lane;
            bool inside = true;
            switch (in.mode) {
                case H_up:
                    other = lane - (int)by, inside = other >= high;
                    break;
                case H_down:
                    other = lane + (int)by, inside = other <= high;
                    break;
                case H_bfly:
                    other = lane ^ (int)by, inside = other <= high;
                    break;
                case H_idx:
                    other = low | ((int)by & ~mask), inside = other <= high;
                    break;
            }
            if (!inside) other = lane;
            if (!active[other]) fail("asks a lane that is not there");
            warp.put(in.to[0], lane, source[other], lost[other]);
            if (in.count == 2) warp.put(in.to[1], lane, inside, 0);
        }
    }

    // --- warps and blocks --------------------------------------------------------------------------------------------

    // Run an instruction for some lanes; those that jump, wait or end are told in `at` and `state`.
    void run_instruction(Warp& warp, const Instruction& in, const int* lanes, int n) {
        switch (in.operation) {
            case E_nop:
                return;
            case E_add:
            case E_sub:
            case E_mul:
            case E_mul_hi:
            case E_mul_wide:
            case E_mad:
            case E_mad_hi:
            case E_mad_wide:
            case E_fma:
            case E_div:
            case E_rem:
            case E_min:
            case E_max:
            case E_abs:
            case E_neg:
            case E_popc:
            case E_clz:
            case E_rcp:
            case E_sqrt:
                return with_type(in.type, [&](auto zero) { arithmetic<decltype(zero)>(warp, in, lanes, n); });
            case E_setp:
                return compare(warp, in, lanes, n);
            case E_cvt:
                return convert(warp, in, lanes, n);
            case E_ld:
                return load(warp, in, lanes, n);
            case E_st:
                return store(warp, in, lanes, n);
            case E_cp_async:
                return start_copies(warp, in, lanes, n);
            case E_cp_commit:
                for (int i = 0; i < n; i++) warp.groups[lanes[i]]++;
                return;
            case E_cp_wait:
                for (int i = 0; i < n; i++) wait_for_copies(warp, lanes[i], in.target);
                return;
            case E_shfl:
                return shuffle(warp, in, lanes, n);
            case E_trap:
                fail("is a trap");
            default:
                for (int i = 0; i < n; i++) logic(warp, in, lanes[i]);
        }
    }

    // Run a warp until all its lanes have ended or wait for a barrier.
    void run_warp(Warp& warp) {
        for (;;) {
            int next = std::numeric_limits<int>::max(), after = next, lanes[LANES], n = 0;
            for (u32 l = 0; l < warp.lanes; l++)
                if (warp.state[l] == RUNS) next = std::min(next, warp.at[l]);
            if (next == std::numeric_limits<int>::max()) {
                if (!meet(warp)) return;
                continue;
            }
            for (u32 l = 0; l < warp.lanes; l++) {
                if (warp.state[l] != RUNS) continue;
                if (warp.at[l] == next)
                    lanes[n++] = l;
                else
                    after = std::min(after, warp.at[l]);
            }
            run_lanes(warp, next, after, lanes, n);
        }
    }

    // Run lanes that are at one place until they part, wait, or come to where others are.
    void run_lanes(Warp& warp, int at, int others, const int* lanes, int n) {
        for (;;) {
            here = at;
            const Instruction& in = code[at];
            Counts& count = counts[at];
            count.issues++;
            if (++issues > launch.limit) fail("does not end");
            int some[LANES], m = n;
            const int* who = lanes;
            if (in.guard >= 0) {
                m = 0;
                for (int i = 0; i < n; i++)
                    if (warp.truth(in.guard, lanes[i], in.negated & 128)) some[m++] = lanes[i];
                who = some;
            }
            count.lanes += m;
            at++;
            switch (in.operation) {
                case E_bra:
                    if (m == n) {
                        at = in.target;
                    } else if (m) {
                        for (int i = 0; i < n; i++) warp.at[lanes[i]] = at;
                        for (int i = 0; i < m; i++) warp.at[some[i]] = in.target;
                        return;
                    }
                    break;
                case E_exit:
                case E_bar_sync:
                case E_bar_warp:
                    for (int i = 0; i < n; i++) warp.at[lanes[i]] = at;
                    for (int i = 0; i < m; i++) {
                        if (in.operation == E_exit && !warp.copies[who[i]].empty())
                            fail("ends with copies that nobody waited for");
                        warp.state[who[i]] = in.operation == E_exit       ? ENDED
                                             : in.operation == E_bar_sync ? WAITS
                                                                          : MEETS;
                    }
                    return;
                default:
                    run_instruction(warp, in, who, m);
            }
            if (at >= others || at < here) {
                for (int i = 0; i < n; i++) warp.at[lanes[i]] = at;
                return;
            }
        }
    }

    // Where all lanes that have not ended wait for each other, let them go on.
    bool meet(Warp& warp) {
        int place = -1;
        bool all = true;
        for (u32 l = 0; l < warp.lanes; l++) {
            if (warp.state[l] == MEETS) {
                if (place >= 0 && place != warp.at[l]) fail("lanes of a warp wait for each other at two places");
                place = warp.at[l];
            } else if (warp.state[l] == WAITS) {
                all = false;
            }
        }
        if (place < 0) return false;
        if (!all) fail("some lanes of a warp wait for each other, others for the block");
        warp.meetings++;
        for (u32 l = 0; l < warp.lanes; l++)
            if (warp.state[l] == MEETS) warp.state[l] = RUNS;
        return true;
    }

    void begin_block(u32 x, u32 y, u32 z) {
        memory.begin_block(block_number, random);
        const u32 *size = launch.block, block[3] = {x, y, z};
        for (Warp& warp : warps) {
            warp.meetings = 0;
            for (u32 l = 0; l < warp.lanes; l++) {
                const u32 thread = warp.first + l;
                const u32 index[3] = {thread % size[0], thread / size[0] % size[1], thread / size[0] / size[1]};
                for (int k = 0; k < 3; k++) {
                    warp.value(k, l) = index[k], warp.value(3 + k, l) = size[k];
                    warp.value(6 + k, l) = block[k], warp.value(9 + k, l) = launch.grid[k];
                }
                warp.value(12, l) = l, warp.value(13, l) = launch.dynamic_shared;
                warp.at[l] = 0, warp.state[l] = RUNS, warp.groups[l] = 0;
                warp.copies[l].clear(), warp.in_flight[l] = warp.most_in_flight[l] = 0;
            }
        }
    }

    void run_block() {
        for (;;) {
            std::vector<int> order(warps.size());
            std::iota(order.begin(), order.end(), 0);
            std::shuffle(order.begin(), order.end(), random);
            for (int i : order) run_warp(warps[i]);
            u32 waiting = 0;
            int place = -1;
            for (Warp& warp : warps)
                for (u32 l = 0; l < warp.lanes; l++)
                    if (warp.state[l] == WAITS) {
                        if (place >= 0 && place != warp.at[l]) fail("threads of a block wait at two barriers");
                        place = warp.at[l];
                        waiting++;
                    }
            if (!waiting) return;
            here = place - 1;
            if (waiting != threads) fail("a barrier that %u of %u threads do not reach", threads - waiting, threads);
            totals.barriers++;
            memory.epoch++;
            for (Warp& warp : warps) std::fill(warp.state, warp.state + warp.lanes, RUNS);
        }
    }

    void count_in_flight() {
        u64 sum = 0;
        for (const Warp& warp : warps)
            sum += std::accumulate(warp.most_in_flight, warp.most_in_flight + warp.lanes, 0ull);
        totals.most_in_flight = std::max(totals.most_in_flight, sum);
    }

    void run() {
        warps.resize((threads + LANES - 1) / LANES);
        for (size_t w = 0; w < warps.size(); w++) {
            Warp& warp = warps[w];
            warp.first = w * LANES, warp.lanes = std::min<u32>(LANES, threads - warp.first);
            warp.values.assign((size_t)registers * LANES, 0), warp.unknowns.assign((size_t)registers * LANES, 0);
            warp.register_bits = register_bits;
            for (int r = kernel_registers; r < registers; r++)
                for (int l = 0; l < LANES; l++) warp.value(r, l) = constants[r - kernel_registers];
        }
        for (u32 z = 0; z < launch.grid[2]; z++)
            for (u32 y = 0; y < launch.grid[1]; y++)
                for (u32 x = 0; x < launch.grid[0]; x++, block_number++)
                    begin_block(x, y, z), run_block(), count_in_flight();
        memory.count_sectors(totals);
    }
};

}  // namespace

extern "C" u64 ptx_shared_window() { return (u64)shared_window(); }

// 0; or -1, and what is wrong in `message`, and in `where` the instruction.
extern "C" int ptx_run(const Instruction* code, int length, const u8* register_bits, const u64* constants,
                       int registers, int kernel_registers, const Launch* launch, const Region* regions,
                       int region_count, Counts* counts, Totals* totals, char* message, int message_size, int* where) {
    int here = 0;
    try {
        Machine machine{code,    length,  register_bits, constants, registers, kernel_registers,
                        *launch, regions, region_count,  counts,    *totals,   here};
        machine.run();
        return 0;
    } catch (const Fault& fault) {
        snprintf(message, message_size, "%s", fault.text.c_str());
        *where = here;
        return -1;
    }
}
