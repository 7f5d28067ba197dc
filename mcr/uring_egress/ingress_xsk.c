// SPDX-License-Identifier: MIT
/*
 * The AF_XDP ingress: one socket for each receive queue over one frame pool. XDP has parsed the packet and
 * left its findings in front of it; no header is read here.
 */
#include <errno.h>
#include <linux/if_xdp.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <xdp/xsk.h>

#include "core.h"

enum { BUSY_RETRIES = 100, BUSY_RETRY_NS = 20 * 1000 * 1000 };

struct queue {
	struct xsk_socket *socket;
	struct xsk_ring_cons receive;
	struct xsk_ring_prod fill;
	struct xsk_ring_cons completion; /* of transmission, which is not used */
	bool armed;
};

struct xsk_state {
	struct xsk_umem *umem;
	bool zero_copy;
	uint32_t next;		   /* the queue to look at first, so that none starves */
	uint64_t ring_full_before; /* what the slot's earlier workers lost */
	uint64_t no_frame_before;
	struct queue queues[MCR_MAX_QUEUES];
};

static void close_sockets(struct xsk_state *xsk)
{
	for (uint32_t i = 0; i < MCR_MAX_QUEUES; i++) {
		if (xsk->queues[i].socket)
			xsk_socket__delete(xsk->queues[i].socket);
		xsk->queues[i].socket = NULL;
	}
	if (xsk->umem)
		xsk_umem__delete(xsk->umem);
	xsk->umem = NULL;
}

/* Binds every queue. Returns 0 or -errno, with nothing left open. */
static int open_sockets(struct worker *worker, uint16_t bind_flags)
{
	struct xsk_state *xsk = worker->xsk;
	const struct mcr_setup *setup = &worker->setup;
	struct xsk_umem_config umem_config = {
		/*
		 * Twice the pool: the kernel hands over received frames before it tells that it took them from
		 * the fill ring (xsk_flush), so that a quick worker can give a frame back while its old entry
		 * still counts.
		 */
		.fill_size = 2 * setup->frame_count,
		.comp_size = 64,
		.frame_size = setup->frame_size,
	};
	struct xsk_socket_config config = {
		.rx_size = setup->frame_count,
		.libxdp_flags = XSK_LIBXDP_FLAGS__INHIBIT_PROG_LOAD,
		.bind_flags = bind_flags,
	};
	int status = xsk_umem__create(&xsk->umem, worker->pool,
				      (uint64_t)setup->frame_count * setup->frame_size, &xsk->queues[0].fill,
				      &xsk->queues[0].completion, &umem_config);

	for (uint32_t i = 0; i < setup->queue_count && !status; i++) {
		struct queue *queue = &xsk->queues[i];

		status = xsk_socket__create_shared(&queue->socket, setup->interface, setup->queue_first + i,
						   xsk->umem, &queue->receive, NULL, &queue->fill,
						   &queue->completion, &config);
	}
	if (status)
		close_sockets(xsk);
	return status;
}

/* A queue is released a moment after the socket that held it was closed. */
static int open_sockets_patiently(struct worker *worker, uint16_t bind_flags)
{
	struct timespec pause = {.tv_nsec = BUSY_RETRY_NS};
	int status = -EBUSY;

	for (int i = 0; i < BUSY_RETRIES && status == -EBUSY; i++) {
		if (i)
			nanosleep(&pause, NULL);
		status = open_sockets(worker, bind_flags);
	}
	return status;
}

static int bind_sockets(struct worker *worker)
{
	const struct mcr_setup *setup = &worker->setup;
	int status = -EOPNOTSUPP;

	if (setup->zero_copy != MCR_ZERO_COPY_OFF)
		status = open_sockets_patiently(worker, XDP_ZEROCOPY | XDP_USE_NEED_WAKEUP);
	worker->xsk->zero_copy = status == 0;
	if (status && setup->zero_copy != MCR_ZERO_COPY_ON)
		status = open_sockets_patiently(worker, XDP_COPY | XDP_USE_NEED_WAKEUP);
	if (status && setup->zero_copy == MCR_ZERO_COPY_ON)
		return worker_fail(worker, -status, "%s cannot bind AF_XDP without copying: %s",
				   setup->interface, strerror(-status));
	if (status)
		return worker_fail(worker, -status, "%s cannot bind AF_XDP: %s", setup->interface,
				   strerror(-status));
	return 0;
}

static int fill_queues(struct worker *worker)
{
	uint32_t share = worker->setup.frame_count / worker->setup.queue_count, frame = 0;

	for (uint32_t queue = 0; queue < worker->setup.queue_count; queue++)
		for (uint32_t i = 0; i < share; i++, frame++) {
			int status = frames_give(worker, &frame, 1, FRAME_FREE, queue);

			if (status)
				return status;
		}
	return 0;
}

static int xsk_open(struct worker *worker, int *sockets, uint32_t *socket_count)
{
	int status;

	worker->xsk = calloc(1, sizeof(*worker->xsk));
	if (!worker->xsk)
		return worker_fail(worker, ENOMEM, "no memory");
	status = bind_sockets(worker);
	if (status)
		return status;
	worker->xsk->ring_full_before = worker->counters->receive_ring_full;
	worker->xsk->no_frame_before = worker->counters->fill_ring_empty;
	*socket_count = worker->setup.queue_count;
	for (uint32_t i = 0; i < *socket_count; i++)
		sockets[i] = xsk_socket__fd(worker->xsk->queues[i].socket);
	return fill_queues(worker);
}

static int read_packet(struct worker *worker, const struct xdp_desc *descriptor, uint16_t queue,
		       struct packet *packet)
{
	const struct mcr_metadata *metadata;
	uint8_t *start = worker->pool + descriptor->addr;

	metadata = (const struct mcr_metadata *)start;
	if (descriptor->len < sizeof(*metadata) || metadata->rule_id >= MCR_MAX_RULES ||
	    sizeof(*metadata) + metadata->payload_offset + metadata->payload_length > descriptor->len)
		return worker_fail(worker, EPROTO, "a packet without the metadata of mcr_relay");
	*packet = (struct packet){
		.frame = start + sizeof(*metadata),
		.rx_time_ns = metadata->rx_time_ns,
		.frame_index = (uint32_t)(descriptor->addr / worker->setup.frame_size),
		.rule_id = metadata->rule_id,
		.queue = queue,
		.payload_offset = metadata->payload_offset,
		.payload_length = metadata->payload_length,
		.ip_offset = metadata->ip_offset,
		.dport = metadata->dport,
		.ttl = metadata->ttl,
		.tos = metadata->tos,
	};
	return frames_move(worker, packet->frame_index, FRAME_FILL, FRAME_RECEIVE);
}

/* One batch comes from one queue, so that its frames go back there. */
static int xsk_take(struct worker *worker)
{
	struct xsk_state *xsk = worker->xsk;
	uint32_t queues = worker->setup.queue_count;

	for (uint32_t i = 0; i < queues; i++) {
		uint32_t queue = (xsk->next + i) % queues, first, count;
		struct xsk_ring_cons *receive = &xsk->queues[queue].receive;
		int status = 0;

		count = xsk_ring_cons__peek(receive, batch_limit(worker), &first);
		if (!count)
			continue;
		/* The frames were written by another CPU: fetch all the metadata at once, not one by one. */
		for (uint32_t j = 0; j < count; j++)
			__builtin_prefetch(worker->pool + xsk_ring_cons__rx_desc(receive, first + j)->addr);
		for (uint32_t j = 0; j < count && !status; j++)
			status = read_packet(worker, xsk_ring_cons__rx_desc(receive, first + j), queue,
					     &worker->batch[j]);
		xsk_ring_cons__release(receive, count);
		worker->batch_count = count;
		xsk->next = queue + 1;
		return status;
	}
	return 0;
}

static int xsk_give(struct worker *worker, const uint32_t *frames, uint32_t count, uint16_t queue_index)
{
	struct queue *queue = &worker->xsk->queues[queue_index];
	uint32_t first;

	if (xsk_ring_prod__reserve(&queue->fill, count, &first) != count)
		return worker_fail(worker, EPROTO, "the fill ring has no room for the pool's own frames");
	for (uint32_t i = 0; i < count; i++)
		*xsk_ring_prod__fill_addr(&queue->fill, first + i) = (uint64_t)frames[i] *
								     worker->setup.frame_size;
	xsk_ring_prod__submit(&queue->fill, count);
	if (xsk_ring_prod__needs_wakeup(&queue->fill))
		recvfrom(xsk_socket__fd(queue->socket), NULL, 0, MSG_DONTWAIT, NULL, NULL);
	return 0;
}

/* One shot, and only before sleeping: under load nobody is woken, because nobody sleeps. */
static int xsk_arm(struct worker *worker)
{
	for (uint32_t i = 0; i < worker->setup.queue_count; i++) {
		struct queue *queue = &worker->xsk->queues[i];
		struct io_uring_sqe *sqe;

		if (queue->armed)
			continue;
		sqe = reactor_sqe(&worker->reactor);
		if (!sqe)
			return -ENOSPC;
		io_uring_prep_poll_add(sqe, xsk_socket__fd(queue->socket), POLLIN);
		reactor_tag(sqe, COMPLETION_POLL, i);
		queue->armed = true;
	}
	return 0;
}

static int xsk_complete(struct worker *worker, uint32_t index, int result, uint32_t flags)
{
	(void)flags;
	worker->xsk->queues[index].armed = false;
	if (result == -EINTR || result == -EAGAIN)
		return 0;
	if (result < 0)
		return worker_fail(worker, -result, "poll of AF_XDP: %s", strerror(-result));
	if (result & (POLLERR | POLLHUP | POLLNVAL))
		return worker_fail(worker, ENODEV, "%s is gone", worker->setup.interface);
	return 0;
}

/* The supervisor has already taken the sockets out of the XSKMAP. */
static int xsk_stop(struct worker *worker)
{
	(void)worker;
	return 0;
}

static void xsk_count(struct worker *worker)
{
	struct xsk_state *xsk = worker->xsk;
	uint64_t ring_full = xsk->ring_full_before, no_frame = xsk->no_frame_before;
	uint32_t waiting = 0;

	for (uint32_t i = 0; i < worker->setup.queue_count; i++) {
		struct queue *queue = &xsk->queues[i];
		struct xdp_statistics statistics = {0};
		socklen_t length = sizeof(statistics);

		waiting += __atomic_load_n(queue->receive.producer, __ATOMIC_ACQUIRE) -
			   *queue->receive.consumer;
		if (getsockopt(xsk_socket__fd(queue->socket), SOL_XDP, XDP_STATISTICS, &statistics, &length))
			continue;
		ring_full += statistics.rx_ring_full;
		no_frame += statistics.rx_dropped; /* in copy mode: the fill ring was empty */
	}
	worker->counters->receive_ring_full = ring_full;
	worker->counters->fill_ring_empty = no_frame;
	frames_count(worker, waiting);
}

bool xsk_zero_copy(const struct worker *worker)
{
	return worker->xsk && worker->xsk->zero_copy;
}

const struct ingress ingress_xsk = {
	.open = xsk_open,
	.take = xsk_take,
	.give = xsk_give,
	.arm = xsk_arm,
	.complete = xsk_complete,
	.stop = xsk_stop,
	.count = xsk_count,
};
