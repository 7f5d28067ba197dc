// SPDX-License-Identifier: MIT
/*
 * The worker's loop: take a batch, relay it, submit, reap. The only place that waits is io_uring, for
 * packets, commands and sends alike; without traffic the worker costs nothing.
 */
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "core.h"

enum { DRAIN_LIMIT_MS = 500 };

int worker_fail(struct worker *worker, int error, const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	vsnprintf(worker->message, sizeof(worker->message), format, arguments);
	va_end(arguments);
	return -error;
}

/* A submission slot. A full queue is submitted first, so that there always is one. */
struct io_uring_sqe *worker_sqe(struct worker *worker)
{
	struct io_uring_sqe *sqe = io_uring_get_sqe(&worker->uring);

	if (!sqe) {
		io_uring_submit(&worker->uring);
		sqe = io_uring_get_sqe(&worker->uring);
	}
	return sqe;
}

static int complete(struct worker *worker, const struct io_uring_cqe *cqe)
{
	uint32_t index = cqe->user_data >> 8;

	switch (cqe->user_data & 0xff) {
	case COMPLETION_SEND:
		return egress_complete(worker, index, cqe->res);
	case COMPLETION_COMMAND:
		worker->command_ready = true;
		worker->command_result = cqe->res;
		return 0;
	case COMPLETION_POLL:
	case COMPLETION_PACKET:
		return worker->ingress->complete(worker, index, cqe->res, cqe->flags);
	default:
		return worker_fail(worker, EPROTO, "a completion of an unknown kind");
	}
}

/* Handles every completion that is there. */
int worker_reap(struct worker *worker)
{
	struct io_uring_cqe *cqe;

	while (io_uring_peek_cqe(&worker->uring, &cqe) == 0) {
		struct io_uring_cqe copy = *cqe;
		int status;

		io_uring_cqe_seen(&worker->uring, cqe);
		status = complete(worker, &copy);
		if (status)
			return status;
	}
	return 0;
}

int worker_submit_and_reap(struct worker *worker)
{
	int status = io_uring_submit(&worker->uring);

	if (status < 0 && status != -EINTR && status != -EAGAIN && status != -EBUSY)
		return worker_fail(worker, -status, "io_uring: %s", strerror(-status));
	return worker_reap(worker);
}

/* Nothing to do: sleeps until something happens, or looks again at once with busy_poll. */
static int idle(struct worker *worker)
{
	int status;

	if (worker->setup.busy_poll || worker->stopping)
		return worker_submit_and_reap(worker);
	status = worker->ingress->arm(worker);
	if (status)
		return status;
	worker->counters->waits++;
	status = io_uring_submit_and_wait(&worker->uring, 1);
	if (status < 0 && status != -EINTR)
		return worker_fail(worker, -status, "io_uring: %s", strerror(-status));
	return worker_reap(worker);
}

static uint64_t now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

static int relay_batch(struct worker *worker)
{
	int status;

	worker->counters->batches++;
	worker->counters->packets += worker->batch_count;
	status = egress_relay(worker);
	return status ? status : worker_submit_and_reap(worker);
}

/*
 * Relays what already waits in the receive rings, which is no more than the pool. A rule is deleted after
 * that, so that the packets which were redirected while XDP still knew it are not lost.
 */
static int relay_waiting(struct worker *worker)
{
	uint32_t limit = worker->setup.frame_count / BATCH_PACKETS + worker->setup.queue_count;

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
	if (!status)
		status = commands_complete(worker, worker->command_result);
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
	uint64_t deadline_ms = 0;

	for (;;) {
		int status = step(worker);

		if (status < 0)
			return status;
		if (worker->stopping) {
			if (!deadline_ms)
				deadline_ms = now_ms() + DRAIN_LIMIT_MS;
			else if ((!status && !worker->sends_in_flight) || now_ms() > deadline_ms)
				return 0;
		}
		if (worker->command_ready) {
			status = handle_command(worker);
			if (status)
				return status;
		}
	}
}

int mcr_worker_run(int command_fd, char *message, size_t message_size)
{
	struct worker *worker = calloc(1, sizeof(*worker));
	int status;

	if (!worker)
		return -ENOMEM;
	worker->command_fd = command_fd;
	status = commands_receive_setup(worker);
	if (!status)
		status = confine_worker(worker);
	if (!status)
		status = commands_arm(worker);
	if (!status)
		status = loop(worker);
	if (!status) {
		worker->ingress->count(worker);
		status = commands_reply(worker, 0, NULL, 0, 0);
	}
	snprintf(message, message_size, "%s", worker->message);
	return status;
}
