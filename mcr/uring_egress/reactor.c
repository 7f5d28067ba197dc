// SPDX-License-Identifier: MIT
/*
 * One thread's io_uring: everything that the thread starts goes through it, and it is the only place where the
 * thread waits, for packets, commands, pipes and sends alike.
 */
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "core.h"

enum { BRIEFLY_NS = 1000 * 1000 };

int reactor_fail(struct reactor *reactor, int error, const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	vsnprintf(reactor->message, sizeof(reactor->message), format, arguments);
	va_end(arguments);
	return -error;
}

uint64_t clock_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

/* flags: IORING_SETUP_R_DISABLED leaves the ring to the thread that will enable it. */
int reactor_open(struct reactor *reactor, uint32_t flags)
{
	struct io_uring_params params = {
		.flags = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_TASKRUN_FLAG |
			 IORING_SETUP_CQSIZE | flags,
		.cq_entries = COMPLETION_SLOTS,
	};
	int status = io_uring_queue_init_params(SEND_SLOTS, &reactor->uring, &params);

	if (status == -EINVAL)
		return reactor_fail(reactor, EINVAL, "io_uring lacks DEFER_TASKRUN: needs kernel 6.1");
	if (status == -EPERM)
		return reactor_fail(reactor, EPERM,
				    "io_uring is disabled: sysctl kernel.io_uring_disabled=0");
	if (status)
		return reactor_fail(reactor, -status, "io_uring: %s", strerror(-status));
	status = io_uring_register_files_sparse(&reactor->uring, MCR_MAX_OUTPUTS);
	if (status)
		return reactor_fail(reactor, -status, "io_uring file table: %s", strerror(-status));
	return 0;
}

/* Makes a ring that was opened disabled the calling thread's own. (io_uring_enable_rings, which liburing 2.3 declares
 * and does not export.) */
int reactor_enable(struct reactor *reactor)
{
	if (syscall(SYS_io_uring_register, reactor->uring.ring_fd, IORING_REGISTER_ENABLE_RINGS, NULL, 0))
		return reactor_fail(reactor, errno, "io_uring: %s", strerror(errno));
	return 0;
}

/* A submission slot. A full queue is submitted first, so that there always is one; else NULL, and the cause. */
struct io_uring_sqe *reactor_sqe(struct reactor *reactor)
{
	struct io_uring_sqe *sqe = io_uring_get_sqe(&reactor->uring);

	if (!sqe) {
		io_uring_submit(&reactor->uring);
		sqe = io_uring_get_sqe(&reactor->uring);
	}
	if (!sqe)
		reactor_fail(reactor, ENOSPC, "the submission queue is full");
	return sqe;
}

/* Handles every completion that is there. */
int reactor_reap(struct reactor *reactor)
{
	struct io_uring_cqe *cqe;

	reactor->now_ns = 0;
	while (io_uring_peek_cqe(&reactor->uring, &cqe) == 0) {
		struct io_uring_cqe copy = *cqe;
		int status;

		io_uring_cqe_seen(&reactor->uring, cqe);
		status = reactor->complete(reactor, copy.user_data & 0xff, (uint32_t)(copy.user_data >> 8),
					   copy.res, copy.flags);
		if (status)
			return status;
	}
	return 0;
}

static int submitted(struct reactor *reactor, int status)
{
	if (status < 0 && status != -EINTR && status != -EAGAIN && status != -EBUSY && status != -ETIME)
		return reactor_fail(reactor, -status, "io_uring: %s", strerror(-status));
	return reactor_reap(reactor);
}

int reactor_submit_and_reap(struct reactor *reactor)
{
	return submitted(reactor, io_uring_submit(&reactor->uring));
}

/* Sleeps until there is a completion. */
int reactor_wait(struct reactor *reactor)
{
	return submitted(reactor, io_uring_submit_and_wait(&reactor->uring, 1));
}

/* Sleeps until there is a completion, for a moment. */
int reactor_wait_briefly(struct reactor *reactor)
{
	struct __kernel_timespec moment = {.tv_nsec = BRIEFLY_NS};
	struct io_uring_cqe *cqe;

	return submitted(reactor, io_uring_submit_and_wait_timeout(&reactor->uring, &cqe, 1, &moment, NULL));
}
