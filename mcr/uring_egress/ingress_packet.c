// SPDX-License-Identifier: MIT
/*
 * The AF_PACKET ingress, for interfaces where XDP cannot run: a multishot receive that the kernel completes
 * once for each packet, straight into frames of the pool. No XDP program has looked at these packets, so
 * parsing, rule lookup and counting happen here, with the parser and in the order of relay_kern.c.
 */
#include <errno.h>
#include <linux/filter.h>
#include <linux/if_packet.h>
#include <linux/virtio_net.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "core.h"

enum { GSO_UDP_L4 = 5 }; /* VIRTIO_NET_HDR_GSO_UDP_L4, in linux/virtio_net.h since kernel 6.2 */
enum { BUFFER_GROUP = 0, CONTROL_SIZE = CMSG_SPACE(sizeof(struct tpacket_auxdata)) };

enum { FRAGMENT_SLOTS = 1024 }; /* a power of two */

/* A fragmented datagram that a rule wanted, and the port that only its first fragment names. */
struct fragmented {
	struct mcr_fragment_key key;
	uint16_t dport; /* 0: none */
};

struct packet_state {
	int socket;
	bool armed;
	struct io_uring_buf_ring *buffers;
	struct msghdr shape;	/* of what a receive puts into a frame */
	struct packet *arrived; /* a ring as large as the pool: it cannot overflow */
	uint32_t head;
	uint32_t tail;
	struct fragmented
		fragmented[FRAGMENT_SLOTS]; /* by hash of the key; a newer one takes the place of an older */
};

static int register_buffers(struct worker *worker)
{
	struct packet_state *state = worker->packet;
	size_t size = worker->setup.frame_count * sizeof(struct io_uring_buf);
	struct io_uring_buf_reg registration = {
		.ring_entries = worker->setup.frame_count,
		.bgid = BUFFER_GROUP,
	};
	int status;

	state->buffers = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (state->buffers == MAP_FAILED)
		return worker_fail(worker, ENOMEM, "no memory");
	registration.ring_addr = (uint64_t)(uintptr_t)state->buffers;
	status = io_uring_register_buf_ring(&worker->reactor.uring, &registration, 0);
	if (status)
		return worker_fail(worker, -status, "io_uring buffer ring: %s", strerror(-status));
	io_uring_buf_ring_init(state->buffers);
	return 0;
}

static int packet_open(struct worker *worker, int *sockets, uint32_t *socket_count)
{
	struct packet_state *state = calloc(1, sizeof(*state));
	int status;

	(void)socket_count;
	worker->packet = state;
	if (!state)
		return worker_fail(worker, ENOMEM, "no memory");
	state->socket = sockets[0];
	state->shape.msg_controllen = CONTROL_SIZE;
	state->arrived = calloc(worker->setup.frame_count, sizeof(*state->arrived));
	if (!state->arrived)
		return worker_fail(worker, ENOMEM, "no memory");
	status = register_buffers(worker);
	for (uint32_t frame = 0; frame < worker->setup.frame_count && !status; frame++)
		status = frames_give(worker, &frame, 1, FRAME_FREE, 0);
	return status;
}

static int packet_give(struct worker *worker, const uint32_t *frames, uint32_t count, uint16_t queue)
{
	struct io_uring_buf_ring *buffers = worker->packet->buffers;
	uint32_t size = worker->setup.frame_size;

	(void)queue;
	for (uint32_t i = 0; i < count; i++)
		io_uring_buf_ring_add(buffers, worker->pool + (size_t)frames[i] * size, size, frames[i],
				      io_uring_buf_ring_mask(worker->setup.frame_count), (int)i);
	io_uring_buf_ring_advance(buffers, (int)count);
	return 0;
}

/*
 * A multishot receive ends when the frames run out or the link goes down; this starts the next. Before the
 * first PING, packets wait in the socket: they may belong to rules that are still to come.
 */
static int packet_arm(struct worker *worker)
{
	struct packet_state *state = worker->packet;
	struct io_uring_sqe *sqe;

	if (state->armed || !worker->started)
		return 0;
	sqe = reactor_sqe(&worker->reactor);
	if (!sqe)
		return -ENOSPC;
	io_uring_prep_recvmsg_multishot(sqe, state->socket, &state->shape, MSG_TRUNC);
	sqe->flags |= IOSQE_BUFFER_SELECT;
	sqe->buf_group = BUFFER_GROUP;
	reactor_tag(sqe, COMPLETION_PACKET, 0);
	state->armed = true;
	return 0;
}

static int packet_take(struct worker *worker)
{
	struct packet_state *state = worker->packet;
	uint32_t mask = worker->setup.frame_count - 1, limit = batch_limit(worker);

	worker->batch_count = 0;
	while (worker->batch_count < limit && state->head != state->tail)
		worker->batch[worker->batch_count++] = state->arrived[state->head++ & mask];
	return packet_arm(worker);
}

static const struct tpacket_auxdata *auxiliary(struct io_uring_recvmsg_out *out, struct msghdr *shape)
{
	struct cmsghdr *cmsg = io_uring_recvmsg_cmsg_firsthdr(out, shape);

	if (!cmsg || cmsg->cmsg_level != SOL_PACKET || cmsg->cmsg_type != PACKET_AUXDATA)
		return NULL;
	return (const struct tpacket_auxdata *)CMSG_DATA(cmsg);
}

/*
 * What the kernel says of a super-packet (linux/virtio_net.h): datagrams of one size, the last one may be smaller, that
 * a sender on this host handed over as one (UDP_SEGMENT) or that GRO merged. Returns the size of their payload, or 0 of
 * any other packet, also of one that would leave in IP fragments: that is one datagram.
 */
static uint16_t segment_of(const struct virtio_net_hdr *header, const struct mcr_packet *parsed)
{
	if (header->gso_type != GSO_UDP_L4 || header->gso_size >= parsed->payload_length)
		return 0;
	return header->gso_size;
}

static struct fragmented *find_fragmented(struct worker *worker, const struct mcr_packet *parsed,
					  struct mcr_fragment_key *key)
{
	*key = (struct mcr_fragment_key){
		.ifindex = parsed->key.ifindex,
		.vlan = parsed->key.vlan,
		.vlan_outer = parsed->key.vlan_outer,
		.identification = parsed->identification,
	};
	memcpy(key->saddr, parsed->key.saddr, sizeof(key->saddr));
	memcpy(key->daddr, parsed->key.daddr, sizeof(key->daddr));
	return &worker->packet->fragmented[hash_words(key, sizeof(*key)) & (FRAGMENT_SLOTS - 1)];
}

/* A first fragment is remembered if a rule wants its datagram; a later one gets its port from it, if it is. */
static void follow_fragments(struct worker *worker, struct mcr_packet *parsed, bool later, bool wanted)
{
	struct mcr_fragment_key key;
	struct fragmented *slot = find_fragmented(worker, parsed, &key);
	bool same = slot->dport && memcmp(&slot->key, &key, sizeof(key)) == 0;

	if (later)
		parsed->key.dport = same ? slot->dport : 0;
	else if (wanted)
		*slot = (struct fragmented){.key = key, .dport = parsed->key.dport};
	else if (same)
		slot->dport = 0;
}

/* The rule that wants the packet, as relay_kern.c finds it; 0 if there is none. */
static uint32_t find_rule(struct worker *worker, enum mcr_parsed kind, struct mcr_packet *parsed)
{
	uint32_t rule_id;

	if (kind == MCR_PARSED_OTHER)
		return 0;
	parsed->key.ifindex = worker->setup.ifindex;
	if (kind == MCR_PARSED_LATER_FRAGMENT) {
		follow_fragments(worker, parsed, true, false);
		return parsed->key.dport ? rules_find(worker, parsed) : 0;
	}
	rule_id = rules_find(worker, parsed);
	if (parsed->drop_reason == MCR_DROP_FRAGMENT)
		follow_fragments(worker, parsed, false, rule_id);
	return rule_id;
}

/*
 * Decides about one received packet as relay_kern.c does. Returns its rule_id when it is to be relayed,
 * 0 when not, having counted the reason if a rule wanted it, for each of its datagrams.
 */
static uint32_t admit(struct worker *worker, uint8_t *data, uint32_t captured, uint32_t length, uint16_t tag,
		      const struct virtio_net_hdr *header, struct mcr_packet *parsed, uint16_t *segment)
{
	bool whole = header->gso_type == VIRTIO_NET_HDR_GSO_NONE;
	struct mcr_rule_counters *counters;
	uint32_t rule_id, datagrams;

	rule_id = find_rule(worker, mcr_parse(data, data + captured, length, tag, parsed), parsed);
	if (!rule_id)
		return 0;
	*segment = segment_of(header, parsed);
	datagrams = count_datagrams(parsed->payload_length, *segment);
	counters = &worker->rule_counters[rule_id];
	counter_add(&counters->received_packets, datagrams);
	counter_add(&counters->received_bytes, parsed->payload_length);
	if (parsed->drop_reason != MCR_NO_DROP) {
		counter_add(&counters->dropped[parsed->drop_reason], datagrams);
		return 0;
	}
	if ((whole && length > worker->tables.rules[rule_id].frame_limit) || datagrams > RUN_DATAGRAMS ||
	    (uint32_t)parsed->payload_offset + parsed->payload_length > captured) {
		counter_add(&counters->dropped[MCR_DROP_OVERSIZE], datagrams);
		return 0;
	}
	return rule_id;
}

static void enqueue(struct worker *worker, uint8_t *data, uint32_t frame, uint32_t rule_id,
		    const struct mcr_packet *parsed, uint16_t segment, bool verified)
{
	struct packet_state *state = worker->packet;
	uint64_t now_ns = clock_ns();

	state->arrived[state->tail++ & (worker->setup.frame_count - 1)] = (struct packet){
		.frame = data,
		.rx_time_ns = now_ns,
		.frame_index = frame,
		.rule_id = (uint16_t)rule_id,
		.segment = segment,
		.payload_offset = parsed->payload_offset,
		.payload_length = parsed->payload_length,
		.ip_offset = parsed->ip_offset,
		.dport = parsed->key.dport,
		.ttl = parsed->ttl,
		.tos = parsed->tos,
		.verified = verified,
	};
	counter_set(&worker->rule_counters[rule_id].last_seen_ns, now_ns);
}

/* One packet lies in a frame as: io_uring's own header, auxiliary data, virtio_net_hdr, Ethernet. */
static int receive(struct worker *worker, uint32_t frame, int result)
{
	struct packet_state *state = worker->packet;
	uint8_t *buffer = worker->pool + (size_t)frame * worker->setup.frame_size;
	struct io_uring_recvmsg_out *out = io_uring_recvmsg_validate(buffer, result, &state->shape);
	const struct tpacket_auxdata *aux;
	struct mcr_packet parsed;
	uint32_t captured, rule_id = 0;
	uint16_t segment = 0;
	bool verified = false;
	uint8_t *data;

	if (!out)
		return worker_fail(worker, EPROTO, "a receive without its header");
	aux = auxiliary(out, &state->shape);
	data = io_uring_recvmsg_payload(out, &state->shape);
	captured = io_uring_recvmsg_payload_length(out, result, &state->shape);
	if (aux && captured >= sizeof(struct virtio_net_hdr)) {
		const struct virtio_net_hdr *header = (const struct virtio_net_hdr *)data;
		uint16_t tag = aux->tp_status & TP_STATUS_VLAN_VALID ? aux->tp_vlan_tci : 0;

		data += sizeof(*header);
		captured -= sizeof(*header);
		verified = header->flags & (VIRTIO_NET_HDR_F_NEEDS_CSUM | VIRTIO_NET_HDR_F_DATA_VALID);
		rule_id = admit(worker, data, captured, aux->tp_len, tag, header, &parsed, &segment);
	}
	if (!rule_id)
		return frames_give(worker, &frame, 1, FRAME_RECEIVE, 0);
	enqueue(worker, data, frame, rule_id, &parsed, segment, verified);
	return 0;
}

static int packet_complete(struct worker *worker, uint32_t index, int result, uint32_t flags)
{
	uint32_t frame = flags >> IORING_CQE_BUFFER_SHIFT;
	int status;

	(void)index;
	if (!(flags & IORING_CQE_F_MORE))
		worker->packet->armed = false;
	if (result == -EINVAL) {
		worker->counters
			->socket_dropped++; /* kernel 6.1 cannot describe a UDP packet merged by GRO */
		return 0;
	}
	if (result == -ENOBUFS || result == -ENETDOWN || result == -EINTR || result == -EAGAIN)
		return 0; /* no frame was free, or the link went down: packet_arm starts again */
	if (result < 0)
		return worker_fail(worker, -result, "AF_PACKET on %s: %s", worker->setup.interface,
				   strerror(-result));
	if (!(flags & IORING_CQE_F_BUFFER))
		return worker_fail(worker, EPROTO, "a receive without a frame");
	status = frames_move(worker, frame, FRAME_FILL, FRAME_RECEIVE);
	return status ? status : receive(worker, frame, result);
}

/* What waits in the socket can still be read; nothing more gets in. */
static int packet_stop(struct worker *worker)
{
	struct sock_filter nothing = BPF_STMT(BPF_RET | BPF_K, 0);
	struct sock_fprog filter = {.len = 1, .filter = &nothing};

	if (setsockopt(worker->packet->socket, SOL_SOCKET, SO_ATTACH_FILTER, &filter, sizeof(filter)))
		return worker_fail(worker, errno, "cannot close the AF_PACKET ingress: %s", strerror(errno));
	return 0;
}

static void packet_count(struct worker *worker)
{
	struct tpacket_stats statistics = {0};
	socklen_t length = sizeof(statistics);

	/* Reading it sets it back to zero. */
	if (!getsockopt(worker->packet->socket, SOL_PACKET, PACKET_STATISTICS, &statistics, &length))
		worker->counters->socket_dropped += statistics.tp_drops;
	frames_count(worker, 0);
}

const struct ingress ingress_packet = {
	.open = packet_open,
	.take = packet_take,
	.give = packet_give,
	.arm = packet_arm,
	.complete = packet_complete,
	.stop = packet_stop,
	.count = packet_count,
};

int mcr_core_parse(uint8_t *frame, uint32_t captured, uint32_t length, uint16_t tag,
		   struct mcr_packet *parsed)
{
	return mcr_parse(frame, frame + captured, length, tag, parsed);
}
