// The interface to Python: checks of indices, choice of the target, threads.
#include <stdlib.h>
#if !defined(_WIN32)
#include <pthread.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#include "target.h"

using namespace vision_ssm;

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace {

enum Result : int64_t { kDone = 0, kBadToken = 1, kBadRoute = 2, kNoMemory = 3 };

const Target *target_of(int64_t level) {
#if defined(__x86_64__)
  if (level == 2) return &kAvx512;
  if (level == 1) return &kAvx2;
#endif
  return level == 0 ? &kBaseline : nullptr;
}

// The thread pool that torch has loaded. A second one would fight its spinning workers.
enum PoolKind : int64_t { kNoPool = 0, kGomp = 1, kKmp = 2 };
struct Pool {
  int64_t kind;
  void *fork, *thread_id, *set_threads;
} pool;

struct Job {
  const Problem &p;
  void (*unit)(const Problem &, int64_t, float *);
  int64_t units, scratch;
  int64_t next, failed;
};

// A thread keeps its working memory up to this size: pages that malloc gives back to the system cost more to get
// again than the scan of a small map.
constexpr size_t kKept = 8 << 20;

#if defined(_WIN32)
void *borrow(size_t size) { return malloc(size); }
void give_back(void *memory) { free(memory); }
#else
pthread_key_t kept_key;
pthread_once_t kept_once = PTHREAD_ONCE_INIT;
struct Kept {
  size_t size;
};

void *borrow(size_t size) {
  pthread_once(&kept_once, [] { pthread_key_create(&kept_key, free); });
  Kept *kept = (Kept *)pthread_getspecific(kept_key);
  if (kept) {
    pthread_setspecific(kept_key, nullptr);
    if (kept->size >= size) return kept;
    free(kept);
  }
  kept = (Kept *)malloc(size);
  if (kept) kept->size = size;
#if defined(__linux__)
  // Large pages where the system has them on request: columns of a large map touch a page per step.
  const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
  if (kept && size > (4 << 20)) madvise((void *)(((uintptr_t)kept + page - 1) / page * page), size - page, MADV_HUGEPAGE);
#endif
  return kept;
}

void give_back(void *memory) {
  if (((Kept *)memory)->size <= kKept && !pthread_getspecific(kept_key))
    pthread_setspecific(kept_key, memory);
  else
    free(memory);
}
#endif

void work(void *argument) {
  Job &job = *(Job *)argument;
  void *owned = borrow(job.scratch * sizeof(float) + 128);  // a header and the alignment
  if (!owned) {
    __atomic_store_n(&job.failed, 1, __ATOMIC_RELAXED);
    return;
  }
  float *memory = (float *)(((uintptr_t)owned + 64 + 63) / 64 * 64);
  for (;;) {
    int64_t unit = __atomic_fetch_add(&job.next, 1, __ATOMIC_RELAXED);
    if (unit >= job.units) break;
    job.unit(job.p, unit, memory);
  }
  give_back(owned);
}

void work_kmp(int32_t *, int32_t *, void *argument) { work(argument); }

// Runs the units on as many threads as torch uses; which thread runs which unit does not show in the result.
bool run(const Problem &p, void (*unit)(const Problem &, int64_t, float *), int64_t units, int64_t scratch) {
  Job job = {p, unit, units, scratch, 0, 0};
  int64_t threads = p.threads < units ? p.threads : units;
  if (threads < 2 || pool.kind == kNoPool) {
    work(&job);
  } else if (pool.kind == kGomp) {
    ((void (*)(void (*)(void *), void *, unsigned, unsigned))pool.fork)(work, &job, (unsigned)threads, 0);
  } else {
    static struct {
      int32_t reserved, flags, more[2];
      const char *source;
    } where = {0, 2, {0, 0}, ";vision_ssm;scan;0;0;;"};
    int32_t id = ((int32_t(*)(void *))pool.thread_id)(&where);
    ((void (*)(void *, int32_t, int32_t))pool.set_threads)(&where, id, (int32_t)threads);
    ((void (*)(void *, int32_t, void *, ...))pool.fork)(&where, 1, (void *)work_kmp, (void *)&job);
  }
  return !job.failed;
}

bool outside(const int32_t *index, int64_t count, int64_t tokens) {
  bool found = false;
  for (int64_t i = 0; i < count; ++i) found |= index[i] < -1 || index[i] >= tokens;
  return found;
}

Result check(const Problem &p) {
  int64_t count = p.routes * p.steps;
  if (outside(p.read, count, p.tokens) || (p.write != p.read && outside(p.write, count, p.tokens))) return kBadToken;
  if (p.route_index)
    for (int64_t i = 0; i < p.batch * p.taken; ++i)
      if (p.route_index[i] < 0 || p.route_index[i] >= p.routes) return kBadRoute;
  return kDone;
}

template <typename T>
void turn(const T *from, T *to, int64_t tokens, int64_t channels) {
  constexpr int64_t kSide = 64 / sizeof(T);
  for (int64_t t = 0; t < kSide; ++t)
    for (int64_t r = 0; r < kSide; ++r) to[t * channels + r] = from[r * tokens + t];
}

#if defined(__SSE2__)
template <>
void turn(const uint32_t *from, uint32_t *to, int64_t tokens, int64_t channels) {
  for (int64_t t = 0; t < 16; t += 4)
    for (int64_t r = 0; r < 16; r += 4) {
      __m128 row[4];
      for (int64_t i = 0; i < 4; ++i) row[i] = _mm_loadu_ps((const float *)from + (r + i) * tokens + t);
      _MM_TRANSPOSE4_PS(row[0], row[1], row[2], row[3]);
      for (int64_t i = 0; i < 4; ++i) _mm_storeu_ps((float *)to + (t + i) * channels + r, row[i]);
    }
}
#endif

// Turns images of `channels` rows into channels-last ones, a strip of tokens per unit: whole cache lines both ways.
template <typename T>
void transpose(const Problem &p, int64_t unit, float *) {
  constexpr int64_t kSide = 64 / sizeof(T);
  const int64_t strips = (p.tokens + kSide - 1) / kSide, image = unit / strips, first = unit % strips * kSide;
  const int64_t count = p.tokens - first < kSide ? p.tokens - first : kSide;
  const T *from = (const T *)p.x + image * p.channels * p.tokens + first;
  T *to = (T *)p.y + (image * p.tokens + first) * p.channels;
  for (int64_t c = 0; c < p.channels; c += kSide, from += kSide * p.tokens, to += kSide) {
    const int64_t rows = p.channels - c < kSide ? p.channels - c : kSide;
    if (count == kSide && rows == kSide) {
      if (c + 2 * kSide <= p.channels)  // far apart: the processor does not foresee them
        for (int64_t r = kSide; r < 2 * kSide; ++r) __builtin_prefetch(from + r * p.tokens);
      turn(from, to, p.tokens, p.channels);
    } else {
      for (int64_t t = 0; t < count; ++t)
        for (int64_t r = 0; r < rows; ++r) to[t * p.channels + r] = from[r * p.tokens + t];
    }
  }
}

}  // namespace

#ifndef SOURCE
#define SOURCE "unknown"
#endif

// The sources this library was built from; library.py compares.
EXPORT const char *vision_ssm_source() { return SOURCE; }

EXPORT int64_t vision_ssm_problem_size() { return sizeof(Problem); }

// Whether this machine can run a level: 0 baseline (SSE2 or NEON), 1 AVX2, 2 AVX-512.
EXPORT int64_t vision_ssm_has_level(int64_t level) {
#if defined(__x86_64__)
  if (level == 2)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
  if (level == 1) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
  return level == 0;
}

EXPORT void vision_ssm_set_pool(int64_t kind, void *fork, void *thread_id, void *set_threads) {
  pool = {kind, fork, thread_id, set_threads};
}

EXPORT int64_t vision_ssm_forward(const Problem *p, int64_t level) {
  const Target *target = target_of(level);
  if (Result bad = check(*p)) return bad;
  if (!run(*p, target->forward, forward_units(*p), target->forward_scratch(*p))) return kNoMemory;
  if (p->parts > 1 && !run(*p, target->add_up, p->batch, 0)) return kNoMemory;
  return kDone;
}

EXPORT int64_t vision_ssm_backward(const Problem *p, int64_t level) {
  const Target *target = target_of(level);
  if (Result bad = check(*p)) return bad;
  return run(*p, target->backward, backward_units(*p), target->backward_scratch(*p)) ? kDone : kNoMemory;
}

// x, (batch, channels, tokens) of x_type, to y, (batch, tokens, channels).
EXPORT int64_t vision_ssm_transpose(const Problem *p, int64_t) {
  const int64_t side = p->x_type == kFloat32 ? 16 : 32, units = p->batch * ((p->tokens + side - 1) / side);
  return run(*p, p->x_type == kFloat32 ? transpose<uint32_t> : transpose<uint16_t>, units, 0) ? kDone : kNoMemory;
}
