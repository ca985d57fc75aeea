// Finds accesses to shared memory that nothing puts in order. Kernels are compiled with -fsanitize=thread, which calls a
// function for every access, but linked with races.cpp instead of the sanitizer's own library: that knows barriers of
// some threads, barriers in shared memory, clusters and copies by others than the threads.
//
// Every thread has a vector clock; what it does is before what another does if the other has heard of it by way of
// barriers. A copy belongs to the barrier that it reports to: only who waited for that may touch what it wrote.
#pragma once

namespace races {
// A cluster of `blocks` blocks starts, whose shared memory begins at bases[rank].
void begin(int blocks, int threads, char* const* bases, long bytes);
void run_as(int who);  // rank * threads + index, or -1 for what is not to be watched

// Synchronisation through what lies at an address.
void forget(const void* key);
void release(const void* key);                        // all that this thread did is before ...
void acquire(const void* key);                        // ... what a thread does after this
void pass_on(const void* from, const void* to);       // who acquires `to` has all of `from`, which is forgotten

void read(const void* from, long bytes);
void write(const void* to, long bytes);
// A copy that arrives later and then reports to a barrier; a number for `arrive`.
long send(const void* to, long bytes, const void* barrier);
void arrive(long copy, const void* key);
// The accelerator reads what a thread wrote only after that thread called `publish`.
void read_by_accelerator(const void* from, long bytes);
void publish();

const char* found();  // what was found first, or nullptr
}  // namespace races
