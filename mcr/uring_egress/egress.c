// SPDX-License-Identifier: MIT
/*
 * From a batch of packets to sends: sorted by rule, cut into runs of one payload size, and each run sent to
 * each output as one SENDMSG with UDP_SEGMENT whose iovecs point into the frames. The cost of a packet in
 * the kernel is the socket, route and IP layers, not the copy, so a run crosses them once.
 *
 * A full socket is that output's drop and holds up nobody. A run's frames go back when its last send has
 * completed, whatever became of it.
 */
#include <errno.h>
#include <netinet/ip.h>
#include <netinet/udp.h>
#include <string.h>

#include "core.h"

static int release_run(struct worker *worker, uint32_t run_index)
{
	struct run *run = &worker->runs[run_index];

	if (--run->references)
		return 0;
	run->next_free = worker->free_run;
	worker->free_run = run_index;
	return frames_give(worker, run->frames, run->count, FRAME_IN_FLIGHT, run->first.queue);
}

static void add_control(struct msghdr *message, int level, int type, const void *value, size_t length)
{
	struct cmsghdr *cmsg = (struct cmsghdr *)((char *)message->msg_control + message->msg_controllen);

	cmsg->cmsg_level = level;
	cmsg->cmsg_type = type;
	cmsg->cmsg_len = CMSG_LEN(length);
	memcpy(CMSG_DATA(cmsg), value, length);
	message->msg_controllen += CMSG_SPACE(length);
}

static void preserve_source(struct msghdr *message, const struct output *output, const struct packet *packet)
{
	const uint8_t *ip = packet->frame + packet->ip_offset;

	if (output->destination.any.sa_family == AF_INET) {
		struct in_pktinfo info = {0};

		memcpy(&info.ipi_spec_dst, ip + 12, 4);
		add_control(message, IPPROTO_IP, IP_PKTINFO, &info, sizeof(info));
	} else {
		struct in6_pktinfo info = {0};

		memcpy(&info.ipi6_addr, ip + 8, 16);
		add_control(message, IPPROTO_IPV6, IPV6_PKTINFO, &info, sizeof(info));
	}
}

/* What this send says beside its destination. The socket's own options say the rest. */
static void fill_control(struct send *send, const struct output *output, const struct run *run)
{
	struct msghdr *message = &send->message;
	bool ipv4 = output->destination.any.sa_family == AF_INET;
	int level = ipv4 ? IPPROTO_IP : IPPROTO_IPV6;

	message->msg_control = send->control.bytes;
	message->msg_controllen = 0;
	if (send->count > 1) {
		uint16_t segment = run->first.payload_length;

		add_control(message, IPPROTO_UDP, UDP_SEGMENT, &segment, sizeof(segment));
	}
	if (output->flags & MCR_OUTPUT_PRESERVE_DSCP && run->first.tos) {
		int tos = run->first.tos;

		add_control(message, level, ipv4 ? IP_TOS : IPV6_TCLASS, &tos, sizeof(tos));
	}
	if (output->flags & MCR_OUTPUT_DECREMENT_TTL) {
		int ttl = run->first.ttl - 1;

		add_control(message, level, ipv4 ? IP_TTL : IPV6_HOPLIMIT, &ttl, sizeof(ttl));
	}
	if (output->flags & MCR_OUTPUT_PRESERVE_SOURCE)
		preserve_source(message, output, &run->first);
	if (!message->msg_controllen)
		message->msg_control = NULL;
}

static int submit_send(struct worker *worker, uint32_t send_index)
{
	struct send *send = &worker->sends[send_index];
	struct output *output = &worker->outputs[send->output_id];
	struct run *run = &worker->runs[send->run];
	struct io_uring_sqe *sqe = worker_sqe(worker);

	if (!sqe)
		return worker_fail(worker, ENOSPC, "the submission queue is full");
	send->message = (struct msghdr){
		.msg_name = &output->destination,
		.msg_namelen = output->destination_length,
		.msg_iov = &run->payloads[send->first],
		.msg_iovlen = send->count,
	};
	if (output->flags & MCR_OUTPUT_KEEP_PORT) {
		memcpy(&send->destination, &output->destination, output->destination_length);
		send->destination.sin6_port = htons(run->first.dport); /* sin_port lies there too */
		send->message.msg_name = &send->destination;
	}
	fill_control(send, output, run);
	io_uring_prep_sendmsg(sqe, (int)send->output_id, &send->message, MSG_DONTWAIT | MSG_NOSIGNAL);
	sqe->flags |= IOSQE_FIXED_FILE;
	worker_tag(sqe, COMPLETION_SEND, send_index);
	return 0;
}

/* Sends `count` packets of the run from `first` on; the run is theirs until the send has completed. */
static int send_packets(struct worker *worker, uint32_t run_index, uint32_t output_id, uint16_t first,
			uint16_t count)
{
	uint32_t send_index;
	struct send *send;

	while (worker->free_send == NONE) {
		int status = worker_submit_and_reap(worker);

		if (status)
			return status;
	}
	send_index = worker->free_send;
	send = &worker->sends[send_index];
	worker->free_send = send->next_free;
	worker->sends_in_flight++;
	send->run = run_index;
	send->output_id = output_id;
	send->first = first;
	send->count = count;
	send->last = 0;
	worker->runs[run_index].references++;
	return submit_send(worker, send_index);
}

static int send_run(struct worker *worker, uint32_t run_index, uint32_t output_id)
{
	const struct output *output = &worker->outputs[output_id];
	const struct run *run = &worker->runs[run_index];

	worker->output_counters[output_id].relayed_packets += run->count;
	if (output->flags & MCR_OUTPUT_DECREMENT_TTL && run->first.ttl <= 1) {
		worker->output_counters[output_id].dropped[MCR_OUTPUT_DROP_TTL_EXPIRED] += run->count;
		return 0;
	}
	if (run->count > 1 && run->first.payload_length <= output->gso_limit)
		return send_packets(worker, run_index, output_id, 0, run->count);
	for (uint16_t i = 0; i < run->count; i++) {
		int status = send_packets(worker, run_index, output_id, i, 1);

		if (status)
			return status;
	}
	return 0;
}

/* Whether the packet can join the run: GSO wants equal sizes, of which only the last may be smaller. */
static bool extends(const struct run *run, const struct packet *packet, uint32_t rule_flags)
{
	const struct packet *first = &run->first;

	if (run->count == RUN_PACKETS || packet->payload_length == 0 ||
	    packet->payload_length > first->payload_length ||
	    run->payloads[run->count - 1].iov_len < first->payload_length ||
	    run->bytes + packet->payload_length > RUN_BYTES)
		return false;
	if (rule_flags & MCR_OUTPUT_KEEP_PORT && packet->dport != first->dport)
		return false;
	if (rule_flags & MCR_OUTPUT_PRESERVE_DSCP && packet->tos != first->tos)
		return false;
	if (rule_flags & MCR_OUTPUT_DECREMENT_TTL && packet->ttl != first->ttl)
		return false;
	if (rule_flags & MCR_OUTPUT_PRESERVE_SOURCE) {
		const uint8_t *one = packet->frame + packet->ip_offset,
			      *other = first->frame + first->ip_offset;
		bool ipv4 = *one >> 4 == 4;

		return one[0] >> 4 == other[0] >> 4 &&
		       memcmp(one + (ipv4 ? 12 : 8), other + (ipv4 ? 12 : 8), ipv4 ? 4 : 16) == 0;
	}
	return true;
}

/* The kernel copies payload by payload and waits for each, because another CPU wrote it: fetch ahead. */
static void fetch_payload(const struct packet *packet)
{
	const uint8_t *payload = packet->frame + packet->payload_offset;

	for (uint32_t i = 0; i < packet->payload_length; i += CACHE_LINE_BYTES)
		__builtin_prefetch(payload + i);
}

static int add_packet(struct worker *worker, struct run *run, const struct packet *packet)
{
	fetch_payload(packet);
	run->payloads[run->count] = (struct iovec){packet->frame + packet->payload_offset,
						   packet->payload_length};
	run->frames[run->count++] = packet->frame_index;
	run->bytes += packet->payload_length;
	return frames_move(worker, packet->frame_index, FRAME_RECEIVE, FRAME_IN_FLIGHT);
}

static int take_run(struct worker *worker, uint32_t *run_index)
{
	while (worker->free_run == NONE) {
		int status = worker_submit_and_reap(worker);

		if (status)
			return status;
	}
	*run_index = worker->free_run;
	worker->free_run = worker->runs[*run_index].next_free;
	return 0;
}

/* Cuts one run off the packets of a rule that begin at *index, and moves *index behind it. */
static int cut_run(struct worker *worker, uint32_t rule_flags, struct run *run, uint32_t *index)
{
	const struct packet *packet = &worker->batch[*index];

	run->first = *packet;
	run->count = 0;
	run->bytes = 0;
	run->references = 1; /* ours, while its sends are being prepared */
	do {
		int status = add_packet(worker, run, packet);

		if (status)
			return status;
		*index = packet->next;
		packet = &worker->batch[*index];
	} while (*index != NONE && extends(run, packet, rule_flags));
	return 0;
}

static int relay_rule(struct worker *worker, uint32_t rule_id)
{
	const struct rule *rule = &worker->rules[rule_id];
	struct mcr_rule_counters *counters = &worker->rule_counters[rule_id];
	uint32_t index = rule->head, run_index;
	int status = 0;

	while (index != NONE && !status) {
		struct run *run;

		status = take_run(worker, &run_index);
		if (status)
			return status;
		run = &worker->runs[run_index];
		status = cut_run(worker, rule->flags, run, &index);
		counters->relayed_packets += run->count;
		counters->relayed_bytes += run->bytes;
		for (uint32_t i = 0; i < rule->output_count && !status; i++)
			status = send_run(worker, run_index, rule->output_ids[i]);
		if (!status)
			status = release_run(worker, run_index);
	}
	return status;
}

static int drop_packet(struct worker *worker, const struct packet *packet, enum mcr_drop_reason reason)
{
	worker->rule_counters[packet->rule_id].dropped[reason]++;
	return frames_give(worker, &packet->frame_index, 1, FRAME_RECEIVE, packet->queue);
}

/* Sorts the batch by rule, in order of arrival. Returns how many rules have packets, or -errno. */
static int sort_by_rule(struct worker *worker)
{
	int active = 0;

	for (uint32_t i = 0; i < worker->batch_count; i++) {
		struct packet *packet = &worker->batch[i];
		struct rule *rule = &worker->rules[packet->rule_id];

		packet->next = NONE;
		if (!rule->known || !rule->output_count) {
			int status = drop_packet(worker, packet,
						 rule->known ? MCR_DROP_NO_OUTPUT : MCR_DROP_UNKNOWN_RULE);

			if (status)
				return status;
			continue;
		}
		if (rule->head == NONE) {
			rule->head = i;
			worker->active_rules[active++] = packet->rule_id;
		} else {
			worker->batch[rule->tail].next = i;
		}
		rule->tail = i;
	}
	return active;
}

/* Relays the batch; its sends are prepared, not yet submitted, when this returns. */
int egress_relay(struct worker *worker)
{
	int active = sort_by_rule(worker);

	if (active < 0)
		return active;
	for (int i = 0; i < active; i++) {
		uint32_t rule_id = worker->active_rules[i];
		int status = relay_rule(worker, rule_id);

		worker->rules[rule_id].head = NONE;
		if (status)
			return status;
	}
	worker->batch_count = 0;
	return 0;
}

static enum mcr_output_drop_reason drop_reason(int error)
{
	switch (error) {
	case EAGAIN:
	case ENOBUFS:
	case ENOMEM:
		return MCR_OUTPUT_DROP_SOCKET_FULL;
	case ENETUNREACH:
	case EHOSTUNREACH:
	case EADDRNOTAVAIL:
		return MCR_OUTPUT_DROP_UNREACHABLE;
	case ENETDOWN:
	case ENODEV:
	case ENXIO:
		return MCR_OUTPUT_DROP_LINK_DOWN;
	case EMSGSIZE:
		return MCR_OUTPUT_DROP_TOO_LARGE;
	case EPERM:
	case EACCES:
		return MCR_OUTPUT_DROP_DENIED;
	default:
		return MCR_OUTPUT_DROP_SEND_ERROR;
	}
}

/* The device or the route cannot take segments of this size in one send. */
static bool gso_refused(int error)
{
	return error == EINVAL || error == EMSGSIZE || error == EIO || error == EOPNOTSUPP;
}

static void account_send(struct worker *worker, const struct send *send, const struct run *run, int result)
{
	struct mcr_output_counters *counters = &worker->output_counters[send->output_id];

	if (result < 0) {
		counters->dropped[drop_reason(-result)] += send->count;
		counters->last_error = (uint64_t)-result;
		return;
	}
	counters->sent_packets += send->count;
	counters->sent_bytes += send->count == run->count ? run->bytes : run->payloads[send->first].iov_len;
}

int egress_complete(struct worker *worker, uint32_t send_index, int result)
{
	struct send *send = &worker->sends[send_index];
	struct run *run = &worker->runs[send->run];

	if (result < 0 && send->count > 1 && gso_refused(-result)) {
		/* The MTU has shrunk, or the path's is smaller: these and later ones go one by one. */
		worker->outputs[send->output_id].gso_limit = run->first.payload_length - 1;
		send->last = send->first + send->count;
		send->count = 1;
		return submit_send(worker, send_index);
	}
	account_send(worker, send, run, result);
	if (send->first + 1 < send->last) {
		send->first++;
		return submit_send(worker, send_index);
	}
	send->next_free = worker->free_send;
	worker->free_send = send_index;
	worker->sends_in_flight--;
	return release_run(worker, send->run);
}
