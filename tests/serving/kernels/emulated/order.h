// What comes before what, by vector clocks: whether an access follows those that it must follow in every schedule, and
// not only in the one that is run. Without ORDERED nobody asks.
#pragma once

#include <algorithm>
#include <cstdint>
#include <unordered_map>
#include <vector>

typedef unsigned u32;

constexpr int NUM_THREADS = PROGRAMS * PROGRAM_THREADS, NUM_WARPS = NUM_THREADS / 32, MOST_BARRIERS = 32;
// Whose time it is: threads, then phases of barriers, then what warps have begun of products and of stores, which first
// read and then write.
constexpr u32 OF_BARRIERS = NUM_THREADS, OF_PRODUCTS = OF_BARRIERS + PROGRAMS * MOST_BARRIERS;
constexpr u32 OF_READS = OF_PRODUCTS + NUM_WARPS, OF_WRITES = OF_READS + NUM_WARPS;
constexpr u32 CLOCKS = ORDERED ? OF_WRITES + NUM_WARPS : 1;

// `is_plain`: by a thread's own instructions, not by what it began: a copy or a product.
struct Access {
  u32 who = 0, when = 0;
  bool is_plain = false;
};
struct Clocks {
  short at[CLOCKS] = {};  // which processors compare fast

  void join(const Clocks& other) {
    for (u32 i = 0; i < CLOCKS; i++) at[i] = std::max(at[i], other.at[i]);
  }
  bool have(Access access) const { return at[access.who] >= (short)access.when; }
};
// What a thread sees of what came before, what of it copies and products see (of plain accesses those before a fence),
// and what came before, seen or not: a copy that has landed shows nothing but itself.
struct Knowledge {
  Clocks all, fenced, before;

  void join(const Knowledge& other) { all.join(other.all), fenced.join(other.fenced), before.join(other.before); }
  void fence() { fenced = all; }
  // Time goes on for a thread, so that what it does from here on is something else.
  u32 time(u32 who) const { return all.at[who]; }
  u32 tick(u32 who) {
    before.at[who]++;
    return all.at[who]++;
  }
  bool have(Access access, bool is_plain) const {
    return (access.is_plain && !is_plain ? fenced : all).have(access);
  }
};
// 16 bytes: who wrote them last, and who has read them since.
struct Cell {
  Access write;
  std::vector<Access> reads;
};
struct Cells {
  std::unordered_map<uintptr_t, Cell> all;

  // Whether one who knows so much may do so.
  bool touch(const void* at, u32 bytes, Access access, bool writes, const Knowledge& known) {
    bool holds = true;
    for (uintptr_t place = (uintptr_t)at / 16; place < ((uintptr_t)at + bytes + 15) / 16; place++) {
      Cell& cell = all[place];
      holds = holds && known.have(cell.write, access.is_plain);
      auto own = std::find_if(cell.reads.begin(), cell.reads.end(), [&](Access read) {
        if (writes) holds = holds && known.have(read, access.is_plain);
        return !writes && read.who == access.who;
      });
      if (writes) {
        cell.write = access, cell.reads.clear();
      } else if (own != cell.reads.end()) {
        *own = access;
      } else {
        cell.reads.push_back(access);
      }
    }
    return holds;
  }
};
// Of a barrier: what those who arrive know, and in `before` those too whose copies it counts; what its last phase
// tells; and who has passed that.
struct Phases {
  Knowledge arrived, told;
  Access made, asked;  // the latter for bytes, the last time
  std::vector<Access> passed;
  u32 number = 0;
  long flying = 0;  // bytes

  // Which phase somebody waits for who knows that so many are over: the last of them or, of the other parity, the next.
  // -1 was over from the start.
  int choose(int over, u32 parity) const { return over - ((over - 1 & 1) == (int)parity); }
  // Whether one who arrives does so behind all phases so far in every schedule.
  bool follows(const Knowledge& known, u32 phase) const {
    return known.all.have(made) && known.before.have({number, phase});
  }
  // Whether all who waited for the phase before have passed in every schedule.
  bool complete(u32 phase) {
    bool holds = std::all_of(passed.begin(), passed.end(), [&](Access each) { return arrived.before.have(each); });
    arrived.before.at[number] = phase;
    passed.clear(), told = arrived;
    return holds;
  }
};
