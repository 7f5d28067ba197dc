// SPDX-License-Identifier: MIT
/*
 * An egress thread: it reads packets from its pipe and sends them to its share of the outputs, and gives the frames
 * back through the return pipe. Commands come between the packets, and are carried out when everything that came
 * before them has been sent. A thread that fails ends the worker.
 */
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>

#include "threads.h"

enum { STACK_BYTES = 256 * 1024 };

/* --- what comes back */

int returns_put(struct returns *returns, const uint32_t *words, uint32_t count)
{
	if (returns->count + count > returns->capacity)
		return -EPROTO;
	memcpy(returns->words + returns->count, words, count * sizeof(*words));
	returns->count += count;
	return 0;
}

static int write_returns(struct egress_thread *thread)
{
	struct returns *returns = &thread->returns;
	struct io_uring_sqe *sqe = reactor_sqe(&thread->reactor);

	if (!sqe)
		return -ENOSPC;
	io_uring_prep_write(sqe, returns->fd, (char *)returns->writing + returns->written,
			    returns->bytes - returns->written, (uint64_t)-1);
	reactor_tag(sqe, COMPLETION_RETURNED, 0);
	returns->busy = true;
	return 0;
}

/* Begins to write what waits, unless a write is under way. */
static int flush_returns(struct egress_thread *thread)
{
	struct returns *returns = &thread->returns;
	uint32_t *words = returns->words;

	if (returns->busy || !returns->count)
		return 0;
	returns->words = returns->writing;
	returns->writing = words;
	returns->bytes = returns->count * sizeof(*words);
	returns->written = 0;
	returns->count = 0;
	return write_returns(thread);
}

static int returned(struct egress_thread *thread, int result)
{
	struct returns *returns = &thread->returns;

	if (result < 0 && result != -EINTR && result != -EAGAIN)
		return reactor_fail(&thread->reactor, -result, "the return pipe: %s", strerror(-result));
	returns->written += result > 0 ? (uint32_t)result : 0;
	if (returns->written < returns->bytes)
		return write_returns(thread);
	returns->busy = false;
	return 0;
}

/* --- what comes in */

static int relay_batch(struct egress_thread *thread)
{
	uint32_t count = thread->batch_count;

	thread->batch_count = 0;
	return egress_relay(&thread->egress, thread->batch, count);
}

/* Everything that came before the command has been sent before it is carried out, and returned before it is
 * acknowledged. */
static int handle_command(struct egress_thread *thread)
{
	int status = relay_batch(thread);
	uint32_t word;

	if (!status)
		status = egress_settle(&thread->egress);
	if (status)
		return status;
	word = RETURN_ACK + (uint32_t)-egress_apply(&thread->egress, &thread->command, thread->command_fd);
	return returns_put(&thread->returns, &word, 1);
}

static int begin_command(struct egress_thread *thread, const struct descriptor *head)
{
	thread->command_slots = COMMAND_SLOTS;
	thread->command_fd = head->fd;
	return 0;
}

static int continue_command(struct egress_thread *thread, const struct descriptor *slot)
{
	memcpy((struct descriptor *)&thread->command + (COMMAND_SLOTS - thread->command_slots), slot,
	       sizeof(*slot));
	return --thread->command_slots ? 0 : handle_command(thread);
}

static int take_packet(struct egress_thread *thread, const struct descriptor *slot)
{
	const struct mcr_setup *setup = &thread->worker->setup;

	if (slot->rule_id >= MCR_MAX_RULES || slot->frame_index >= setup->frame_count)
		return reactor_fail(&thread->reactor, EPROTO, "a descriptor of no packet");
	thread->batch[thread->batch_count++] = (struct packet){
		.frame = thread->worker->pool + (size_t)slot->frame_index * setup->frame_size +
			 slot->frame_offset,
		.rx_time_ns = slot->rx_time_ns,
		.frame_index = slot->frame_index,
		.rule_id = slot->rule_id,
		.payload_offset = slot->payload_offset,
		.payload_length = slot->payload_length,
		.segment = slot->segment,
		.ip_offset = slot->ip_offset,
		.dport = slot->dport,
		.ttl = slot->ttl,
		.tos = slot->tos,
	};
	return 0;
}

/* Handles every whole slot that has been read. */
static int take_slots(struct egress_thread *thread)
{
	uint32_t count = thread->filled / sizeof(*thread->slots), whole = count * sizeof(*thread->slots);
	int status = 0;

	for (uint32_t i = 0; i < count && !status; i++) {
		const struct descriptor *slot = &thread->slots[i];

		if (thread->command_slots)
			status = continue_command(thread, slot);
		else
			status = slot->rule_id ? take_packet(thread, slot) : begin_command(thread, slot);
	}
	thread->filled -= whole;
	memmove(thread->slots, (char *)thread->slots + whole, thread->filled);
	return status ? status : relay_batch(thread);
}

static int read_pipe(struct egress_thread *thread)
{
	struct io_uring_sqe *sqe = reactor_sqe(&thread->reactor);

	if (!sqe)
		return -ENOSPC;
	io_uring_prep_read(sqe, thread->fd, (char *)thread->slots + thread->filled,
			   sizeof(thread->slots) - thread->filled, (uint64_t)-1);
	reactor_tag(sqe, COMPLETION_READ, 0);
	thread->reading = true;
	return 0;
}

static int complete(struct reactor *reactor, enum completion_kind kind, uint32_t index, int result,
		    uint32_t flags)
{
	struct egress_thread *thread = container_of(reactor, struct egress_thread, reactor);

	(void)flags;
	switch (kind) {
	case COMPLETION_SEND:
		return egress_complete(&thread->egress, index, result);
	case COMPLETION_READ:
		if (result <= 0 && result != -EINTR && result != -EAGAIN)
			return reactor_fail(reactor, EPROTO, "the pipe from the ingress thread: %s",
					    strerror(-result));
		thread->reading = false;
		thread->filled += result > 0 ? (uint32_t)result : 0;
		return 0;
	case COMPLETION_RETURNED:
		return returned(thread, result);
	default:
		return reactor_fail(reactor, EPROTO, "a completion of an unknown kind");
	}
}

/* --- the thread */

static int step(struct egress_thread *thread)
{
	int status = 0;

	if (!thread->reading) {
		status = take_slots(thread);
		if (!status)
			status = read_pipe(thread);
	}
	if (!status)
		status = flush_returns(thread);
	if (status)
		return status;
	if (thread->worker->setup.busy_poll)
		return reactor_submit_and_reap(&thread->reactor);
	return reactor_wait(&thread->reactor);
}

static void *run(void *argument)
{
	struct egress_thread *thread = argument;
	uint32_t started = RETURN_ACK;
	char name[16];
	int status;

	snprintf(name, sizeof(name), "mcr-egress-%u", thread->index);
	prctl(PR_SET_NAME, name, 0, 0, 0);
	status = reactor_enable(&thread->reactor);
	if (!status)
		status = returns_put(&thread->returns, &started, 1);
	while (!status)
		status = step(thread);
	worker_die(thread->worker, thread->reactor.message);
}

static int open_thread(struct worker *worker, uint32_t index)
{
	struct egress_thread *thread = &worker->threads[index];
	uint32_t capacity = worker->setup.frame_count + 1; /* every frame, and one acknowledgement */
	int status;

	thread->worker = worker;
	thread->index = index;
	thread->reactor.complete = complete;
	thread->returns.capacity = capacity;
	thread->returns.words = calloc(capacity, sizeof(uint32_t));
	thread->returns.writing = calloc(capacity, sizeof(uint32_t));
	if (!thread->returns.words || !thread->returns.writing ||
	    tables_open(&thread->tables, index, worker->setup.egress_threads))
		return worker_fail(worker, ENOMEM, "no memory");
	status = reactor_open(&thread->reactor, IORING_SETUP_R_DISABLED);
	if (status)
		return worker_fail(worker, -status, "%s", thread->reactor.message);
	return egress_open(&thread->egress, worker, &thread->reactor, &thread->tables, &thread->returns);
}

/* Everything that the threads need, while there is the privilege to open it. */
int threads_open(struct worker *worker)
{
	int status = 0;

	worker->threads = calloc(worker->setup.egress_threads, sizeof(*worker->threads));
	if (!worker->threads)
		return worker_fail(worker, ENOMEM, "no memory");
	for (uint32_t i = 0; i < worker->setup.egress_threads && !status; i++)
		status = open_thread(worker, i);
	return status ? status : pipes_open(worker);
}

static int start_thread(struct egress_thread *thread, int cpu)
{
	pthread_attr_t attributes;
	pthread_t handle;
	cpu_set_t cpus;
	int status = pthread_attr_init(&attributes);

	if (status)
		return -status;
	status = pthread_attr_setstacksize(&attributes, STACK_BYTES);
	CPU_ZERO(&cpus);
	if (cpu >= 0) {
		CPU_SET((size_t)cpu, &cpus);
		if (!status)
			status = pthread_attr_setaffinity_np(&attributes, sizeof(cpus), &cpus);
	}
	if (!status)
		status = pthread_create(&handle, &attributes, run, thread);
	pthread_attr_destroy(&attributes);
	return -status;
}

/* Starts the threads, each on its CPU, and then goes to the ingress thread's own. */
int threads_start(struct worker *worker)
{
	const int *cpus = worker->setup.cpus;

	for (uint32_t i = 0; i < worker->setup.egress_threads; i++) {
		int status = start_thread(&worker->threads[i], cpus[1 + i]);

		if (status)
			return worker_fail(worker, -status, "cannot start egress thread %u on CPU %d: %s", i,
					   cpus[1 + i], strerror(-status));
	}
	if (cpus[0] >= 0) {
		cpu_set_t own;

		CPU_ZERO(&own);
		CPU_SET((size_t)cpus[0], &own);
		if (sched_setaffinity(0, sizeof(own), &own))
			return worker_fail(worker, errno, "cannot run on CPU %d: %s", cpus[0],
					   strerror(errno));
	}
	return worker->pipes ? pipes_await_threads(worker) : 0;
}
