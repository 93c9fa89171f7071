// Memory as a launch sees it: what it may touch, who touched it, and what the lanes of a warp asked for together.

#pragma once

#include <sys/mman.h>

#include <vector>

#include "numbers.hpp"

namespace {

const int LANES = 32, SECTOR = 32, BANKS = 32;
const u32 NOBODY = 0xffffffff;
const u32 SHARED_WINDOW = 1 << 20;

struct Thread {               // of the block
    u32 number, warp, lanes;  // its warp's first thread, and how many that has
    u32 meetings;             // how often its warp's lanes have waited for each other
};

struct Place {                                               // a byte of shared memory
    u32 writer = NOBODY, reader = NOBODY, copying = NOBODY;  // threads
    u32 written = 0, read = 0;                               // epochs
    u32 writer_meetings = 0, reader_meetings = 0;
    bool many = false, warps = false;  // threads have read it in this epoch; they are of several warps
};

u8* shared_window() {
    static u8* window = nullptr;
    if (!window) {
        void* there =
            mmap(nullptr, SHARED_WINDOW, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
        if (there != MAP_FAILED) window = (u8*)there;
    }
    return window;
}

struct Memory {
    const Region* const regions;
    const int region_count;
    const u32 shared_bytes, threads;  // of a block

    u8* const shared = shared_window();
    std::vector<Place> places = std::vector<Place>(shared_bytes);
    std::vector<u8> shared_unknown = std::vector<u8>(shared_bytes);
    std::vector<std::vector<u32>> written;  // for each writable region the thread of the launch that wrote each byte
    std::vector<std::vector<u8>> touched;   // for each region its sectors: 1 read, 2 written
    u32 epoch = 0;                          // a further one behind each barrier
    u32 block = 0;
    int last_region = 0;

    Memory(const Region* regions, int region_count, u32 shared_bytes, u32 threads)
        : regions(regions), region_count(region_count), shared_bytes(shared_bytes), threads(threads) {
        if (!shared) fail("no memory below 4 GiB");
        if (shared_bytes > SHARED_WINDOW) fail("too much shared memory");
        for (int i = 0; i < region_count; i++) {
            written.emplace_back(regions[i].writable ? regions[i].bytes : 0, NOBODY);
            touched.emplace_back(regions[i].bytes / SECTOR + 2, 0);
        }
    }

    template <class Random>
    void begin_block(u32 number, Random& random) {
        block = number;
        epoch++;
        std::fill(places.begin(), places.end(), Place());
        std::fill(shared_unknown.begin(), shared_unknown.end(), 255);
        for (u32 i = 0; i < shared_bytes; i++) shared[i] = (u8)random();
    }

    bool is_shared(u64 address) const { return address - (u64)shared < SHARED_WINDOW; }

    const Region& region_of(u64 address, u32 bytes, bool write) {
        auto holds = [&](int i) { return address - regions[i].begin < regions[i].bytes; };
        if (!holds(last_region)) {
            last_region = 0;
            while (last_region < region_count && !holds(last_region)) last_region++;
            if (last_region == region_count) {
                last_region = 0;
                fail("%s outside of all memory at %llx", write ? "writes" : "reads", (unsigned long long)address);
            }
        }
        const Region& region = regions[last_region];
        if (address - region.begin + bytes > region.bytes)
            fail("%s beyond the end of its memory, by %llu bytes", write ? "writes" : "reads",
                 (unsigned long long)(address - region.begin + bytes - region.bytes));
        if (write && !region.writable) fail("writes to memory that is only to be read");
        return region;
    }

    void touch_global(const Thread& thread, u64 address, u32 bytes, bool write) {
        const Region& region = region_of(address, bytes, write);
        const int index = &region - regions;
        for (u64 s = (address >> 5) - (region.begin >> 5); s <= ((address + bytes - 1) >> 5) - (region.begin >> 5); s++)
            touched[index][s] |= write ? 2 : 1;
        if (!region.writable) return;
        const u32 me = block * threads + thread.number;
        for (u32 i = 0; i < bytes; i++) {
            u32& writer = written[index][address - region.begin + i];
            if (writer != NOBODY && writer != me) fail("races for a byte of global memory with another thread");
            if (write) writer = me;
        }
    }

    u32 shared_offset(u64 address, u32 bytes, bool write) const {
        const u64 offset = address - (u64)shared;
        if (offset >= SHARED_WINDOW || offset + bytes > shared_bytes)
            fail("%s outside of the block's %u bytes of shared memory, at %lld", write ? "writes" : "reads",
                 shared_bytes, (long long)offset);
        return (u32)offset;
    }

    bool ordered(const Thread& thread, u32 other, u32 epoch_there, u32 meetings_there) const {
        if (epoch_there != epoch) return true;
        return other - thread.warp < thread.lanes && thread.meetings > meetings_there;
    }

    void touch_shared(const Thread& thread, u32 offset, u32 bytes, bool write) {
        const u32 me = thread.number;
        for (u32 i = offset; i < offset + bytes; i++) {
            Place& place = places[i];
            if (place.copying != NOBODY) fail("meets a copy that nobody waited for, at %u of shared memory", i);
            if (place.writer != NOBODY && place.writer != me &&
                !ordered(thread, place.writer, place.written, place.writer_meetings))
                fail("races with a write of thread %u, at %u of shared memory", place.writer, i);
            if (write) {
                if (place.reader != NOBODY && place.read == epoch && (place.many || place.reader != me) &&
                    (place.warps || !ordered(thread, place.reader, place.read, place.reader_meetings)))
                    fail("races with a read of thread %u, at %u of shared memory", place.reader, i);
                place.writer = me, place.written = epoch, place.writer_meetings = thread.meetings;
            } else if (place.reader == NOBODY || place.read != epoch) {
                place.reader = me, place.read = epoch, place.reader_meetings = thread.meetings;
                place.many = place.warps = false;
            } else {
                if (place.reader != me) place.many = true;
                if (place.reader - thread.warp >= thread.lanes) place.warps = true;
                place.reader = me, place.reader_meetings = thread.meetings;
            }
        }
    }

    void check_aligned(u64 address, u32 bytes) const {
        if (address & (bytes - 1)) fail("has an address that is not a multiple of its %u bytes", bytes);
    }

    // What the lanes of a warp ask of memory with one instruction.
    void count(Counts& count, const u64* addresses, int n, u32 bytes, bool is_in_shared) const {
        if (!is_in_shared) {
            u64 sectors[LANES * 2];
            int m = 0;
            for (int i = 0; i < n; i++)
                for (u64 s = addresses[i] / SECTOR; s <= (addresses[i] + bytes - 1) / SECTOR; s++) sectors[m++] = s;
            std::sort(sectors, sectors + m);
            count.sectors += std::unique(sectors, sectors + m) - sectors;
            return;
        }
        // Accesses of 8 and 16 bytes are made by halves and quarters of a warp.
        const int together = bytes <= 4 ? LANES : bytes == 8 ? LANES / 2 : LANES / 4;
        for (int begin = 0; begin < n; begin += together) {
            u64 words[LANES * 4];
            int m = 0, per_bank[BANKS] = {}, most = 0;
            for (int i = begin; i < std::min(n, begin + together); i++)
                for (u64 w = addresses[i] / 4; w <= (addresses[i] + bytes - 1) / 4; w++) words[m++] = w;
            std::sort(words, words + m);
            m = std::unique(words, words + m) - words;
            for (int i = 0; i < m; i++) most = std::max(most, ++per_bank[words[i] % BANKS]);
            count.wavefronts += most;
            count.fewest++;
        }
    }

    // An asynchronous copy begins, which takes place when it is waited for.
    void begin_copy(const Thread& thread, u32 offset, u32 bytes) {
        touch_shared(thread, offset, bytes, true);
        for (u32 k = offset; k < offset + bytes; k++) places[k].copying = thread.number;
    }

    void end_copy(const Thread& thread, u64 to, u64 from, u32 bytes, u32 zeros) {
        memcpy((void*)to, (const void*)from, bytes);
        memset((u8*)to + bytes, 0, zeros);
        const u32 offset = (u32)(to - (u64)shared);
        for (u32 k = offset; k < offset + bytes + zeros; k++) {
            places[k].copying = NOBODY;
            places[k].writer = thread.number, places[k].written = epoch, places[k].writer_meetings = thread.meetings;
            shared_unknown[k] = 0;
        }
    }

    void count_sectors(Totals& totals) const {
        for (const auto& sectors : touched)
            for (u8 sector : sectors) totals.sectors_read += sector & 1, totals.sectors_written += sector >> 1;
    }
};

}  // namespace
