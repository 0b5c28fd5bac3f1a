// A kernel as fibers on one core: a library of one function. Compiled with KERNEL and the type of its ARGUMENT, so many
// PROGRAMS of a cluster, PROGRAM_THREADS and SHARED bytes of each, and ORDERED (order.h) or not.

#include <sys/mman.h>
#include <ucontext.h>

#include <memory>
#include <random>

#include "kernel.cu"

constexpr int STACK = 64 * 1024, OF_PROGRAM = PROGRAM_THREADS / 32;  // the latter warps
constexpr int PATIENCE = 100;  // rounds without anything new, after which nothing will come any more

struct Fiber {
  Thread thread;
  ucontext_t context;
  bool is_done = false;
};
static ucontext_t scheduler;
static Fiber* running;
static const ARGUMENT* argument;

void Thread::stop() { swapcontext(&running->context, &scheduler); }

static void begin() {
  KERNEL(*argument);
  u32 warp = Thread::number() / 32;
  if (ORDERED) require(Thread::known().all.at[OF_WRITES + warp] >= Thread::now->begun, "stores that nobody waits for");
  running->is_done = true, machine->progress++, Thread::own().num_ended++;
  for (;;) Thread::stop();
}

static void prepare(Machine& all, std::vector<Fiber>& fibers, u8* stacks) {
  for (Program& program : all.programs) {
    program.room.assign(FIRST + SHARED + 1024, 0xff);  // NaN, where nobody has written
    program.memory = (u8*)(((uintptr_t)program.room.data() + 1023) / 1024 * 1024);
  }
  for (int i = 0; i < NUM_THREADS; i++) {
    fibers[i].thread = {i / PROGRAM_THREADS, i % PROGRAM_THREADS};
    all.threads.push_back(&fibers[i].thread);
    if (ORDERED) all.known[i].all.at[i] = all.known[i].before.at[i] = 1;
    getcontext(&fibers[i].context);
    fibers[i].context.uc_stack.ss_sp = stacks + (size_t)STACK * i, fibers[i].context.uc_stack.ss_size = STACK;
    makecontext(&fibers[i].context, begin, 0);
  }
}

// The lanes of a warp, as long as any gets on.
static void run_warp(Machine& all, Fiber* lanes) {
  unsigned long long before;
  do {
    before = all.progress;
    for (int lane = 0; lane < 32 && !all.failure; lane++) {
      running = lanes + lane, Thread::now = &running->thread;
      if (!running->is_done) swapcontext(&scheduler, &running->context);
    }
    Thread::now = nullptr;
  } while (all.progress != before && !all.failure);
}

static void land(Machine& all, std::mt19937& random, size_t count) {
  for (; count > 0; count--) {
    std::swap(all.copies[random() % all.copies.size()], all.copies.back());
    auto copy = all.copies.back();
    all.copies.pop_back();
    copy(), all.progress++;
  }
}

static bool is_over(const Machine& all, const std::vector<Fiber>& fibers) {
  return all.failure || std::all_of(fibers.begin(), fibers.end(), [](const Fiber& each) { return each.is_done; });
}

// Warps in an order by `seed`, of which those in `slow` (bits by number in the program) pause in the programs of
// `slow_programs`. Copies land as late as it says: some, or only when nobody gets on otherwise, or at once.
static void schedule(Machine& all, std::vector<Fiber>& fibers, int seed, u32 slow, u32 slow_programs) {
  std::mt19937 random(seed);
  std::vector<int> order(NUM_WARPS);
  for (int i = 0; i < NUM_WARPS; i++) order[i] = i;
  for (int idle = 0; !is_over(all, fibers) && idle < PATIENCE;) {
    unsigned long long before = all.progress;
    std::shuffle(order.begin(), order.end(), random);
    for (int warp : order) {
      bool is_slow = slow >> warp % OF_PROGRAM & 1 && slow_programs >> warp / OF_PROGRAM & 1;
      if (is_slow ? random() % 8 == 0 || idle > PATIENCE / 2 : random() % 3 > 0) run_warp(all, &fibers[32 * warp]);
      if (seed % 3 == 2) land(all, random, all.copies.size());
    }
    bool is_late = seed % 3 == 1 && (all.progress != before || idle < 4);
    if (!is_late && !all.copies.empty()) land(all, random, random() % (all.copies.size() + 1));
    idle = all.progress == before ? idle + 1 : 0;
  }
}

static const char* run_cluster(int first, int grid, int seed, u32 slow, u32 slow_programs) {
  auto all = std::make_unique<Machine>();
  machine = all.get(), machine->first = first, machine->grid = grid;
  size_t room = (size_t)STACK * NUM_THREADS;
  u8* stacks = (u8*)mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  std::vector<Fiber> fibers(NUM_THREADS);
  prepare(*all, fibers, stacks);
  schedule(*all, fibers, seed, slow, slow_programs);
  munmap(stacks, room);
  if (!all->failure && !is_over(*all, fibers)) return "threads wait for what does not come";
  if (!all->failure && !all->copies.empty()) return "a copy lands after the end";
  return all->failure;
}

// A grid, one cluster after the other. What went wrong, or null.
extern "C" const char* run(const ARGUMENT* given, int grid, int seed, u32 slow, u32 slow_programs) {
  ARGUMENT aligned;
  memcpy((void*)&aligned, (const void*)given, sizeof aligned);
  argument = &aligned;
  const char* failure = nullptr;
  for (int first = 0; first < grid && !failure; first += PROGRAMS)
    failure = run_cluster(first, grid, seed + first, slow, slow_programs);
  return failure;
}
