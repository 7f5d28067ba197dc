// SPDX-License-Identifier: MIT
/* Everything that a worker ever allocates or opens, checked and done once. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include "core.h"

enum { COUNTER_FDS = 4, MAX_FRAMES = 32768 };

static int check_setup(struct worker *worker, uint32_t fd_count)
{
	const struct mcr_setup *setup = &worker->setup;
	uint32_t wanted_fds = COUNTER_FDS + (setup->ingress == MCR_INGRESS_PACKET);

	if (setup->abi_version != MCR_ABI_VERSION)
		return worker_fail(worker, EPROTO, "the supervisor speaks version %u, the worker version %u",
				   setup->abi_version, MCR_ABI_VERSION);
	if (setup->ingress != MCR_INGRESS_XSK && setup->ingress != MCR_INGRESS_PACKET)
		return worker_fail(worker, EINVAL, "unknown ingress %u", setup->ingress);
	if (setup->queue_count == 0 || setup->queue_count > MCR_MAX_QUEUES)
		return worker_fail(worker, EINVAL, "%u queues are not between 1 and %u", setup->queue_count,
				   MCR_MAX_QUEUES);
	if (setup->frame_size != 2048 && setup->frame_size != 4096)
		return worker_fail(worker, EINVAL, "the frame size %u is not 2048 or 4096",
				   setup->frame_size);
	if (setup->frame_count < 64 || setup->frame_count > MAX_FRAMES ||
	    setup->frame_count & (setup->frame_count - 1))
		return worker_fail(worker, EINVAL, "the frame count %u is not a power of two up to %u",
				   setup->frame_count, MAX_FRAMES);
	if (setup->egress_threads)
		return worker_fail(worker, EINVAL, "egress threads are not built yet");
	if (setup->worker_slot >= MCR_MAX_WORKERS)
		return worker_fail(worker, EINVAL, "worker slot out of range");
	if (strnlen(setup->interface, sizeof(setup->interface)) == sizeof(setup->interface))
		return worker_fail(worker, EINVAL, "the interface name does not end");
	if (fd_count != wanted_fds)
		return worker_fail(worker, EINVAL, "%u descriptors instead of %u", fd_count, wanted_fds);
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

static int open_uring(struct worker *worker)
{
	struct io_uring_params params = {
		.flags = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_TASKRUN_FLAG |
			 IORING_SETUP_CQSIZE,
		.cq_entries = COMPLETION_SLOTS,
	};
	int status = io_uring_queue_init_params(SEND_SLOTS, &worker->uring, &params);

	if (status == -EINVAL)
		return worker_fail(worker, EINVAL, "io_uring lacks DEFER_TASKRUN: needs kernel 6.1");
	if (status == -EPERM)
		return worker_fail(worker, EPERM, "io_uring is disabled: sysctl kernel.io_uring_disabled=0");
	if (status)
		return worker_fail(worker, -status, "io_uring: %s", strerror(-status));
	status = io_uring_register_files_sparse(&worker->uring, MCR_MAX_OUTPUTS);
	if (status)
		return worker_fail(worker, -status, "io_uring file table: %s", strerror(-status));
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
	if (!status)
		worker->counters = counters + worker->setup.worker_slot;
	return status;
}

static void chain_free_slots(struct worker *worker)
{
	for (uint32_t i = 0; i < RUN_SLOTS; i++)
		worker->runs[i].next_free = i + 1 < RUN_SLOTS ? i + 1 : NONE;
	for (uint32_t i = 0; i < SEND_SLOTS; i++)
		worker->sends[i].next_free = i + 1 < SEND_SLOTS ? i + 1 : NONE;
	for (uint32_t i = 0; i < MCR_MAX_RULES; i++)
		worker->rules[i].head = NONE;
}

static int allocate(struct worker *worker)
{
	size_t pool_size = (size_t)worker->setup.frame_count * worker->setup.frame_size;

	worker->pool = mmap(NULL, pool_size, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	if (worker->pool == MAP_FAILED)
		return worker_fail(worker, ENOMEM, "no memory for a pool of %zu bytes", pool_size);
	worker->owners = calloc(worker->setup.frame_count, 1);
	worker->owned[FRAME_FREE] = worker->setup.frame_count;
	worker->batch = calloc(BATCH_PACKETS, sizeof(*worker->batch));
	worker->rules = calloc(MCR_MAX_RULES, sizeof(*worker->rules));
	worker->rule_table = calloc(RULE_SLOTS, sizeof(*worker->rule_table));
	worker->outputs = calloc(MCR_MAX_OUTPUTS, sizeof(*worker->outputs));
	worker->runs = calloc(RUN_SLOTS, sizeof(*worker->runs));
	worker->sends = calloc(SEND_SLOTS, sizeof(*worker->sends));
	if (!worker->owners || !worker->batch || !worker->rules || !worker->rule_table || !worker->outputs ||
	    !worker->runs || !worker->sends)
		return worker_fail(worker, ENOMEM, "no memory");
	chain_free_slots(worker);
	return 0;
}

int setup_worker(struct worker *worker, const int *fds, uint32_t fd_count, int *sockets,
		 uint32_t *socket_count)
{
	int status = check_setup(worker, fd_count);

	if (!status)
		status = raise_file_limit(worker);
	if (!status)
		status = open_counters(worker, fds);
	if (!status)
		status = allocate(worker);
	if (!status)
		status = open_uring(worker);
	if (status)
		return status;
	for (int i = 0; i < COUNTER_FDS; i++)
		close(fds[i]);
	worker->ingress = worker->setup.ingress == MCR_INGRESS_XSK ? &ingress_xsk : &ingress_packet;
	sockets[0] = fds[COUNTER_FDS]; /* only read by the AF_PACKET ingress, which then has it */
	status = worker->ingress->open(worker, sockets, socket_count);
	if (!status)
		worker->ingress->count(worker);
	return status;
}
