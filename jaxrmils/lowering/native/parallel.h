// Tasks shared between the calling thread and the threads of XLA's pool.

#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>

#include "vectors.h"

namespace jaxrmils {

// What helpers hold. `body` is on the caller's stack: it is read only by who claimed a task, and
// the caller waits for those.
struct Job {
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> done{0};
  int64_t tasks = 0;
  void (*run)(void* body, int64_t task) = nullptr;
  void* body = nullptr;
  std::mutex mutex;
  std::condition_variable finished;

  void work() {
    int64_t ran = 0;
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks; ++ran) {
      run(body, task);
    }
    if (ran > 0 && done.fetch_add(ran, std::memory_order_acq_rel) + ran == tasks) {
      std::lock_guard<std::mutex> lock(mutex);
      finished.notify_all();
    }
  }

  void wait() {
    for (int spin = 0; spin < 4000; ++spin) {
      if (done.load(std::memory_order_acquire) == tasks) return;
#ifdef JAXRMILS_VNNI
      _mm_pause();
#endif
    }
    std::unique_lock<std::mutex> lock(mutex);
    finished.wait(lock, [this] { return done.load(std::memory_order_acquire) == tasks; });
  }
};

// Runs body(task) for every task. The caller works too and waits only for tasks that a running
// thread has claimed, so a pool whose threads are all busy delays nothing and cannot deadlock.
template <class Pool, class Body>
void parallel_for(Pool& pool, int64_t threads, int64_t tasks, Body body) {
  const int64_t helpers = (threads < tasks ? threads : tasks) - 1;
  if (helpers <= 0) {
    for (int64_t task = 0; task < tasks; ++task) body(task);
    return;
  }
  auto job = std::make_shared<Job>();
  job->tasks = tasks;
  job->body = &body;
  job->run = [](void* data, int64_t task) { (*static_cast<Body*>(data))(task); };
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([job] { job->work(); });
  job->work();
  job->wait();
}

}  // namespace jaxrmils
