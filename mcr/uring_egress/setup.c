// SPDX-License-Identifier: MIT
/*
 * Everything that a worker ever allocates or opens, checked and done once; then it gives up every privilege. What
 * needs one is opened first, the egress threads are started in between, and the filter comes last.
 */
#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include "threads.h"

enum { COUNTER_FDS = 5, MAX_FRAMES = 32768, HUGE_PAGE_BYTES = 2 << 20 };

static int check_setup(struct worker *worker)
{
	const struct mcr_setup *setup = &worker->setup;
	uint32_t wanted_fds = COUNTER_FDS + (setup->ingress == MCR_INGRESS_PACKET);

	if (setup->abi_version != MCR_ABI_VERSION)
		return worker_fail(worker, EPROTO, "the supervisor has layout %08x, the worker %08x",
				   setup->abi_version, MCR_ABI_VERSION);
	if (setup->ingress != MCR_INGRESS_XSK && setup->ingress != MCR_INGRESS_PACKET)
		return worker_fail(worker, EINVAL, "unknown ingress %u", setup->ingress);
	if (setup->queue_count == 0 || setup->queue_count > MCR_MAX_QUEUES)
		return worker_fail(worker, EINVAL, "%u queues are not between 1 and %u", setup->queue_count,
				   MCR_MAX_QUEUES);
	if (setup->frame_size != 2048 && setup->frame_size != 4096 &&
	    (setup->frame_size != MCR_PACKET_FRAME || setup->ingress != MCR_INGRESS_PACKET))
		return worker_fail(worker, EINVAL,
				   "the frame size %u is not 2048 or 4096, nor %u of AF_PACKET",
				   setup->frame_size, MCR_PACKET_FRAME);
	if (setup->frame_count < 64 || setup->frame_count > MAX_FRAMES ||
	    setup->frame_count & (setup->frame_count - 1))
		return worker_fail(worker, EINVAL, "the frame count %u is not a power of two up to %u",
				   setup->frame_count, MAX_FRAMES);
	if (setup->egress_threads > MCR_MAX_EGRESS_THREADS)
		return worker_fail(worker, EINVAL, "%u egress threads are more than %u",
				   setup->egress_threads, MCR_MAX_EGRESS_THREADS);
	for (uint32_t i = 0; i <= setup->egress_threads; i++)
		if (setup->cpus[i] >= CPU_SETSIZE)
			return worker_fail(worker, EINVAL, "there is no CPU %d", setup->cpus[i]);
	if (setup->worker_slot >= MCR_MAX_WORKERS)
		return worker_fail(worker, EINVAL, "worker slot out of range");
	if (strnlen(setup->interface, sizeof(setup->interface)) == sizeof(setup->interface))
		return worker_fail(worker, EINVAL, "the interface name does not end");
	if (worker->command_fd_count != wanted_fds)
		return worker_fail(worker, EINVAL, "%u descriptors instead of %u", worker->command_fd_count,
				   wanted_fds);
	return 0;
}

/* The io_uring's table of registered sockets counts against the limit of open files. */
static int raise_file_limit(struct worker *worker)
{
	struct rlimit limit;

	if (getrlimit(RLIMIT_NOFILE, &limit))
		return worker_fail(worker, errno, "getrlimit: %s", strerror(errno));
	limit.rlim_cur = limit.rlim_max;
	setrlimit(RLIMIT_NOFILE, &limit);
	if (limit.rlim_max <= MCR_MAX_OUTPUTS)
		return worker_fail(worker, EMFILE, "the limit of open files is %lu, and must be above %u",
				   (unsigned long)limit.rlim_max, MCR_MAX_OUTPUTS);
	return 0;
}

static void *map_counters(struct worker *worker, int fd, size_t size, int *status)
{
	long page = sysconf(_SC_PAGESIZE);
	void *memory;

	size = (size + page - 1) / page * page;
	memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (memory == MAP_FAILED) {
		*status = worker_fail(worker, errno, "cannot map the counters: %s", strerror(errno));
		return NULL;
	}
	return memory;
}

static int open_counters(struct worker *worker, const int *fds)
{
	struct mcr_worker_counters *counters;
	int status = 0;

	worker->rule_counters = map_counters(worker, fds[0], MCR_MAX_RULES * sizeof(*worker->rule_counters),
					     &status);
	worker->output_counters = map_counters(worker, fds[1],
					       MCR_MAX_OUTPUTS * sizeof(*worker->output_counters), &status);
	counters = map_counters(worker, fds[2], MCR_MAX_WORKERS * sizeof(*counters), &status);
	worker->latency = map_counters(worker, fds[3], MCR_MAX_RULES * sizeof(*worker->latency), &status);
	worker->reports = map_counters(worker, fds[4], MCR_TAP_REPORTS * sizeof(*worker->reports), &status);
	if (!status)
		worker->counters = counters + worker->setup.worker_slot;
	return status;
}

/* In huge pages, if the kernel has any: each packet is read and written at another place of the pool. */
static int allocate_pool(struct worker *worker)
{
	size_t size = (size_t)worker->setup.frame_count * worker->setup.frame_size;
	uint8_t *memory = mmap(NULL, size + HUGE_PAGE_BYTES, PROT_READ | PROT_WRITE,
			       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (memory == MAP_FAILED)
		return worker_fail(worker, ENOMEM, "no memory for a pool of %zu bytes", size);
	worker->pool = memory + (-(uintptr_t)memory & (HUGE_PAGE_BYTES - 1));
	madvise(worker->pool, size, MADV_HUGEPAGE); /* a wish */
	if (madvise(worker->pool, size, MADV_POPULATE_WRITE))
		return worker_fail(worker, errno, "no memory for a pool of %zu bytes: %s", size,
				   strerror(errno));
	return 0;
}

static int allocate(struct worker *worker)
{
	int status = allocate_pool(worker);

	if (status)
		return status;
	worker->owners = calloc(worker->setup.frame_count, 1);
	worker->owned[FRAME_FREE] = worker->setup.frame_count;
	worker->batch = calloc(BATCH_PACKETS, sizeof(*worker->batch));
	worker->rule_table = calloc(RULE_SLOTS, sizeof(*worker->rule_table));
	if (!worker->owners || !worker->batch || !worker->rule_table || tables_open(&worker->tables, 0, 1))
		return worker_fail(worker, ENOMEM, "no memory");
	return 0;
}

/* The thread's own egress, or the threads that have one. */
static int open_egress(struct worker *worker)
{
	worker->counters->pipe_bytes = 0;
	if (worker->setup.egress_threads)
		return threads_open(worker);
	return egress_open(&worker->egress, worker, &worker->reactor, &worker->tables, NULL);
}

static int open_ingress(struct worker *worker, int *sockets, uint32_t *socket_count)
{
	int status;

	worker->ingress = worker->setup.ingress == MCR_INGRESS_XSK ? &ingress_xsk : &ingress_packet;
	sockets[0] = worker->command_fds
			     [COUNTER_FDS]; /* only read by the AF_PACKET ingress, which then has it */
	status = worker->ingress->open(worker, sockets, socket_count);
	if (!status)
		worker->ingress->count(worker);
	return status;
}

/* sockets: those of AF_XDP, for the supervisor. */
int setup_worker(struct worker *worker, int *sockets, uint32_t *socket_count)
{
	int status = check_setup(worker);

	if (!status)
		status = raise_file_limit(worker);
	if (!status)
		status = open_counters(worker, worker->command_fds);
	if (!status)
		status = allocate(worker);
	if (!status)
		status = reactor_open(&worker->reactor, 0);
	if (!status)
		status = open_egress(worker);
	if (status)
		return status;
	for (int i = 0; i < COUNTER_FDS; i++)
		close(worker->command_fds[i]);
	status = open_ingress(worker, sockets, socket_count);
	if (!status)
		status = confine_privileges(worker);
	if (!status)
		status = threads_start(worker);
	if (!status)
		status = confine_system_calls(worker);
	return status;
}
