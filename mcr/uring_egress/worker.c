// SPDX-License-Identifier: MIT
/*
 * The ingress thread's loop: take a batch, relay it, submit, reap. Relaying is sending it, or with egress threads
 * handing it over to them. Without traffic the worker costs nothing.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "threads.h"

enum { DRAIN_LIMIT_NS = 500 * 1000 * 1000 };

int worker_complete(struct reactor *reactor, enum completion_kind kind, uint32_t index, int result,
		    uint32_t flags)
{
	struct worker *worker = container_of(reactor, struct worker, reactor);

	switch (kind) {
	case COMPLETION_SEND:
		return egress_complete(&worker->egress, index, result);
	case COMPLETION_COMMAND:
		worker->command_ready = true;
		worker->command_result = result;
		return 0;
	case COMPLETION_POLL:
	case COMPLETION_PACKET:
		return worker->ingress->complete(worker, index, result, flags);
	case COMPLETION_PIPE:
		return pipes_written(worker, index, result);
	case COMPLETION_RETURN:
		return pipes_returned(worker, result);
	default:
		return worker_fail(worker, EPROTO, "a completion of an unknown kind");
	}
}

/* Nothing to do: sleeps until something happens, or looks again at once with busy_poll. */
static int idle(struct worker *worker)
{
	int status;

	if (worker->stopping)
		return reactor_wait_briefly(&worker->reactor);
	if (worker->setup.busy_poll)
		return reactor_submit_and_reap(&worker->reactor);
	status = worker->ingress->arm(worker);
	if (status)
		return status;
	worker->counters->waits++;
	return reactor_wait(&worker->reactor);
}

static int relay_batch(struct worker *worker)
{
	int status = 0;

	worker->counters->batches++;
	worker->counters->packets += worker->batch_count;
	if (worker->setup.verify_checksums)
		status = checksum_verify(worker);
	if (status)
		return status;
	if (worker->pipes)
		status = pipes_relay(worker);
	else
		status = egress_relay(&worker->egress, worker->batch, worker->batch_count);
	worker->batch_count = 0;
	return status ? status : reactor_submit_and_reap(&worker->reactor);
}

/*
 * Relays what already waits in the receive rings, which is no more than the pool. A rule is deleted after
 * that, so that the packets which were redirected while XDP still knew it are not lost.
 */
static int relay_waiting(struct worker *worker)
{
	uint32_t limit = worker->setup.frame_count / batch_limit(worker) + worker->setup.queue_count;

	for (uint32_t i = 0; i < limit; i++) {
		int status = worker->ingress->take(worker);

		if (status || !worker->batch_count)
			return status;
		status = relay_batch(worker);
		if (status)
			return status;
	}
	return 0;
}

static int handle_command(struct worker *worker)
{
	int status = 0;

	worker->command_ready = false;
	if (worker->command_result == sizeof(worker->command) && worker->command.type == MCR_DEL_RULE)
		status = relay_waiting(worker);
	if (!status && worker->pipes)
		status = pipes_settle(
			worker); /* a packet that finds no room is counted by the rules as they were */
	if (!status)
		status = commands_handle(worker, worker->command_result);
	if (!status && worker->pipes)
		status = reactor_submit_and_reap(&worker->reactor); /* before packets find the pipes in use */
	if (!status && worker->stopping)
		status = worker->ingress->stop(worker);
	return status;
}

/* Relays what has arrived. Returns how many packets that were, or -errno. */
static int step(struct worker *worker)
{
	int status = worker->ingress->take(worker), count = (int)worker->batch_count;

	if (status)
		return status;
	if (!count)
		return idle(worker);
	status = relay_batch(worker);
	return status ? status : count;
}

static int loop(struct worker *worker)
{
	uint64_t deadline_ns = 0;

	for (;;) {
		int status = step(worker);

		if (status < 0)
			return status;
		if (worker->stopping) {
			if (!deadline_ns)
				deadline_ns = clock_ns() + DRAIN_LIMIT_NS;
			else if ((!status && !worker->owned[FRAME_IN_FLIGHT]) || clock_ns() > deadline_ns)
				return 0;
		}
		if (worker->command_ready) {
			status = handle_command(worker);
			if (status)
				return status;
		}
	}
}

static int run(struct worker *worker)
{
	int status = commands_receive_setup(worker);

	if (!status)
		status = commands_arm(worker);
	if (!status && worker->pipes)
		status = pipes_arm(worker);
	if (!status)
		status = loop(worker);
	if (status)
		return status;
	worker->ingress->count(worker);
	return commands_reply(worker, 0, NULL, 0, 0);
}

/* Only the first thread that fails is heard; the others stay here for the moment that is left to them. */
static void claim_last_words(struct worker *worker)
{
	while (__atomic_exchange_n(&worker->dying, true, __ATOMIC_RELAXED))
		;
}

/* An egress thread has failed, and the worker with it. */
_Noreturn void worker_die(struct worker *worker, const char *last_words)
{
	char line[MESSAGE_BYTES + 1];
	int length = snprintf(line, sizeof(line), "%s\n", last_words);

	claim_last_words(worker);
	if (write(STDERR_FILENO, line, (size_t)length) < 0)
		_exit(1);
	_exit(1);
}

int mcr_worker_run(int command_fd, char *message, size_t message_size)
{
	struct worker *worker = calloc(1, sizeof(*worker));
	int status;

	if (!worker)
		return -ENOMEM;
	worker->reactor.complete = worker_complete;
	worker->command_fd = command_fd;
	status = run(worker);
	if (status)
		claim_last_words(worker);
	snprintf(message, message_size, "%s", worker->reactor.message);
	return status;
}
