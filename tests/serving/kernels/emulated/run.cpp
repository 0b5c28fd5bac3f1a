// few_tokens_cluster.cu as fibers on one core: a library of one function.

#include <sys/mman.h>
#include <ucontext.h>

#include <memory>
#include <random>

#include "kernel.cu"

constexpr int THREADS_OF = 17 * 32, NUM_THREADS = HEADS * THREADS_OF, STACK = 64 * 1024;
constexpr int PATIENCE = 100;  // rounds without anything new, after which nothing will come any more

struct Fiber {
  Thread thread;
  ucontext_t context;
  bool is_done = false;
};
static ucontext_t scheduler;
static Fiber* running;
static const Input* input;

void Thread::stop() { swapcontext(&running->context, &scheduler); }

static void begin() {
  few_tokens_cluster(*input);
  running->is_done = true, machine->progress++;
  for (;;) Thread::stop();
}

static void prepare(Machine& all, std::vector<Fiber>& fibers, u8* stacks) {
  for (Program& program : all.programs) {
    program.room.assign(FIRST + SHARED + 1024, 0xff);  // NaN, where nobody has written
    program.memory = (u8*)(((uintptr_t)program.room.data() + 1023) / 1024 * 1024);
  }
  for (int i = 0; i < NUM_THREADS; i++) {
    fibers[i].thread = {i / THREADS_OF, i % THREADS_OF, 0};
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

static void land_some(Machine& all, std::mt19937& random) {
  for (size_t left = all.copies.empty() ? 0 : random() % (all.copies.size() + 1); left > 0; left--) {
    std::swap(all.copies[random() % all.copies.size()], all.copies.back());
    auto copy = all.copies.back();
    all.copies.pop_back();
    copy(), all.progress++;
  }
}

static bool is_over(const Machine& all, const std::vector<Fiber>& fibers) {
  return all.failure || std::all_of(fibers.begin(), fibers.end(), [](const Fiber& each) { return each.is_done; });
}

// Warps in an order by `seed`, of which some pause, and copies that land as late as it says. What went wrong, or null.
extern "C" const char* run(const Input* argument, int seed, int feeder_pauses) {
  Input aligned;
  memcpy((void*)&aligned, (const void*)argument, sizeof aligned);
  input = &aligned;
  auto all = std::make_unique<Machine>();
  machine = all.get();
  size_t room = (size_t)STACK * NUM_THREADS;
  u8* stacks = (u8*)mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  std::vector<Fiber> fibers(NUM_THREADS);
  prepare(*all, fibers, stacks);
  std::mt19937 random(seed);
  std::vector<int> order(NUM_THREADS / 32);
  for (size_t i = 0; i < order.size(); i++) order[i] = i;
  for (int idle = 0; !is_over(*all, fibers) && idle < PATIENCE;) {
    unsigned long long before = all->progress;
    std::shuffle(order.begin(), order.end(), random);
    for (int warp : order)
      if (warp % 17 == 16 ? !feeder_pauses || random() % 8 == 0 : random() % 3 > 0) run_warp(*all, &fibers[32 * warp]);
    land_some(*all, random);
    idle = all->progress == before ? idle + 1 : 0;
  }
  munmap(stacks, room);
  if (!all->failure && !is_over(*all, fibers)) return "threads wait for what does not come";
  if (!all->failure && !all->copies.empty()) return "a copy lands after the end";
  return all->failure;
}
