// SPDX-License-Identifier: MIT
/*
 * From a batch of packets to sends: sorted by rule, cut into runs of one payload size, and each run sent to
 * each output as one SENDMSG with UDP_SEGMENT whose iovecs point into the frames. The cost of a packet in
 * the kernel is the socket, route and IP layers, not the copy, so a run crosses them once.
 *
 * A full socket is that output's drop and holds up nobody. A run's frames go back when its last send has
 * completed, whatever became of it.
 *
 * One struct egress is one thread's: the ingress thread's own, or one in each egress thread. In an egress thread
 * (returns is set) the ingress thread has already counted the packets and made sure of their rules.
 */
#include <errno.h>
#include <netinet/ip.h>
#include <netinet/udp.h>
#include <stdlib.h>
#include <string.h>

#include "core.h"
#include "threads.h"

int egress_open(struct egress *egress, struct worker *worker, struct reactor *reactor, struct tables *tables,
		struct returns *returns)
{
	*egress = (struct egress){
		.worker = worker,
		.reactor = reactor,
		.tables = tables,
		.returns = returns,
		.runs = calloc(RUN_SLOTS, sizeof(*egress->runs)),
		.sends = calloc(SEND_SLOTS, sizeof(*egress->sends)),
	};
	if (!egress->runs || !egress->sends)
		return worker_fail(worker, ENOMEM, "no memory");
	for (uint32_t i = 0; i < RUN_SLOTS; i++)
		egress->runs[i].next_free = i + 1 < RUN_SLOTS ? i + 1 : NONE;
	for (uint32_t i = 0; i < SEND_SLOTS; i++)
		egress->sends[i].next_free = i + 1 < SEND_SLOTS ? i + 1 : NONE;
	return 0;
}

static int give_back(struct egress *egress, const uint32_t *frames, uint32_t count, enum frame_owner from,
		     uint16_t queue)
{
	if (!egress->returns)
		return frames_give(egress->worker, frames, count, from, queue);
	if (returns_put(egress->returns, frames, count))
		return reactor_fail(egress->reactor, EPROTO, "more frames are given back than there are");
	return 0;
}

static int release_run(struct egress *egress, uint32_t run_index)
{
	struct run *run = &egress->runs[run_index];

	if (--run->references)
		return 0;
	run->next_free = egress->free_run;
	egress->free_run = run_index;
	return give_back(egress, run->frames, run->frame_count, FRAME_IN_FLIGHT, run->first.queue);
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

static int submit_send(struct egress *egress, uint32_t send_index)
{
	struct send *send = &egress->sends[send_index];
	struct output *output = &egress->tables->outputs[send->output_id];
	struct run *run = &egress->runs[send->run];
	struct io_uring_sqe *sqe = reactor_sqe(egress->reactor);

	if (!sqe)
		return -ENOSPC;
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
	reactor_tag(sqe, COMPLETION_SEND, send_index);
	return 0;
}

/* Sends `count` packets of the run from `first` on; the run is theirs until the send has completed. */
static int send_packets(struct egress *egress, uint32_t run_index, uint32_t output_id, uint16_t first,
			uint16_t count)
{
	uint32_t send_index;
	struct send *send;

	while (egress->free_send == NONE) {
		int status = reactor_submit_and_reap(egress->reactor);

		if (status)
			return status;
	}
	send_index = egress->free_send;
	send = &egress->sends[send_index];
	egress->free_send = send->next_free;
	egress->sends_in_flight++;
	send->run = run_index;
	send->output_id = output_id;
	send->first = first;
	send->count = count;
	send->last = 0;
	egress->runs[run_index].references++;
	return submit_send(egress, send_index);
}

/* Whether payloads of this size may leave as segments of one send. */
static bool may_segment(const struct egress *egress, const struct output *output, uint32_t payload_length)
{
	if (payload_length > output->gso_limit)
		return false;
	return !output->gso_refused || payload_length < output->gso_refused ||
	       reactor_now_ns(egress->reactor) >= output->gso_retry_ns;
}

static int send_run(struct egress *egress, uint32_t run_index, uint32_t output_id)
{
	const struct output *output = &egress->tables->outputs[output_id];
	const struct run *run = &egress->runs[run_index];

	if (output->flags & MCR_OUTPUT_DECREMENT_TTL && run->first.ttl <= 1) {
		counter_add(&egress->worker->output_counters[output_id].dropped[MCR_OUTPUT_DROP_TTL_EXPIRED],
			    run->count);
		if (tap_wanted(egress->worker))
			tap_skip(egress->worker, run, output_id, MCR_OUTPUT_DROP_TTL_EXPIRED);
		return 0;
	}
	if (run->count > 1 && may_segment(egress, output, run->first.payload_length))
		return send_packets(egress, run_index, output_id, 0, run->count);
	for (uint16_t i = 0; i < run->count; i++) {
		int status = send_packets(egress, run_index, output_id, i, 1);

		if (status)
			return status;
	}
	return 0;
}

/* Whether the packet can join the run: GSO wants equal sizes, of which only the last may be smaller. */
static bool extends(const struct run *run, const struct packet *packet, uint32_t rule_flags)
{
	const struct packet *first = &run->first;

	if (run->count == RUN_PACKETS || packet->payload_length == 0 || packet->segment ||
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

/* The frame is the run's until the run is released. */
static int add_frame(struct egress *egress, struct run *run, const struct packet *packet)
{
	run->frames[run->frame_count++] = packet->frame_index;
	if (egress->returns)
		return 0; /* the ingress thread has moved it */
	return frames_move(egress->worker, packet->frame_index, FRAME_RECEIVE, FRAME_IN_FLIGHT);
}

static int add_packet(struct egress *egress, struct run *run, const struct packet *packet)
{
	fetch_payload(packet);
	run->payloads[run->count] = (struct iovec){packet->frame + packet->payload_offset,
						   packet->payload_length};
	run->rx_times_ns[run->count++] = packet->rx_time_ns;
	run->bytes += packet->payload_length;
	return add_frame(egress, run, packet);
}

/* A super-packet is a run by itself: its datagrams lie in one frame, and are sent as they were sent to us. */
static int add_super_packet(struct egress *egress, struct run *run, const struct packet *packet)
{
	uint8_t *payload = packet->frame + packet->payload_offset;

	fetch_payload(packet);
	run->first.payload_length = packet->segment;
	for (uint32_t at = 0; at < packet->payload_length && run->count < RUN_DATAGRAMS;
	     at += packet->segment) {
		uint32_t rest = packet->payload_length - at;

		run->payloads[run->count] = (struct iovec){payload + at,
							   rest < packet->segment ? rest : packet->segment};
		run->rx_times_ns[run->count++] = packet->rx_time_ns;
	}
	run->bytes = packet->payload_length;
	return add_frame(egress, run, packet);
}

static int take_run(struct egress *egress, uint32_t *run_index)
{
	while (egress->free_run == NONE) {
		int status = reactor_submit_and_reap(egress->reactor);

		if (status)
			return status;
	}
	*run_index = egress->free_run;
	egress->free_run = egress->runs[*run_index].next_free;
	return 0;
}

/* Cuts one run off the packets of a rule that begin at *index, and moves *index behind it. */
static int cut_run(struct egress *egress, uint32_t rule_flags, struct run *run, uint32_t *index)
{
	const struct packet *packet = &egress->batch[*index];

	run->first = *packet;
	run->count = 0;
	run->frame_count = 0;
	run->bytes = 0;
	run->references = 1; /* ours, while its sends are being prepared */
	if (packet->segment) {
		*index = packet->next;
		return add_super_packet(egress, run, packet);
	}
	do {
		int status = add_packet(egress, run, packet);

		if (status)
			return status;
		*index = packet->next;
		packet = &egress->batch[*index];
	} while (*index != NONE && extends(run, packet, rule_flags));
	return 0;
}

/* The first sends of a large batch shall not wait for the last ones, nor their frames. */
static int submit_prepared(struct egress *egress, uint32_t packets)
{
	egress->prepared += packets;
	if (egress->prepared < SUBMIT_PACKETS)
		return 0;
	egress->prepared = 0;
	return reactor_submit_and_reap(egress->reactor);
}

static int relay_rule(struct egress *egress, uint32_t rule_id)
{
	const struct rule *rule = &egress->tables->rules[rule_id];
	uint32_t index = rule->head, run_index;
	int status = 0;

	while (index != NONE && !status) {
		struct run *run;
		uint32_t packets;

		status = take_run(egress, &run_index);
		if (status)
			return status;
		run = &egress->runs[run_index];
		status = cut_run(egress, rule->flags, run, &index);
		packets = run->count;
		if (!egress->returns)
			rules_count_relayed(egress->worker, rule_id, run->count, run->bytes);
		for (uint32_t i = 0; i < rule->output_count && !status; i++)
			status = send_run(egress, run_index, rule->output_ids[i]);
		if (!status)
			status = release_run(egress, run_index);
		if (!status)
			status = submit_prepared(egress, packets);
	}
	return status;
}

/* The rule has gone, or all its outputs have: known by the one thread that there is. */
static int drop_packet(struct egress *egress, const struct packet *packet, enum mcr_drop_reason reason)
{
	if (egress->returns)
		return reactor_fail(egress->reactor, EPROTO, "a packet of rule %u without an output here",
				    packet->rule_id);
	counter_add(&egress->worker->rule_counters[packet->rule_id].dropped[reason],
		    count_datagrams(packet->payload_length, packet->segment));
	if (tap_wanted(egress->worker))
		tap_drop(egress->worker, packet, reason);
	return frames_give(egress->worker, &packet->frame_index, 1, FRAME_RECEIVE, packet->queue);
}

/* Sorts the batch by rule, in order of arrival. Returns how many rules have packets, or -errno. */
static int sort_by_rule(struct egress *egress, uint32_t count)
{
	int active = 0;

	for (uint32_t i = 0; i < count; i++) {
		struct packet *packet = &egress->batch[i];
		struct rule *rule = &egress->tables->rules[packet->rule_id];

		packet->next = NONE;
		if (!rule->known || !rule->output_count) {
			int status = drop_packet(egress, packet,
						 rule->known ? MCR_DROP_NO_OUTPUT : MCR_DROP_UNKNOWN_RULE);

			if (status)
				return status;
			continue;
		}
		if (rule->head == NONE) {
			rule->head = i;
			egress->active_rules[active++] = packet->rule_id;
		} else {
			egress->batch[rule->tail].next = i;
		}
		rule->tail = i;
	}
	return active;
}

/* Relays the batch; its last sends are prepared, not yet submitted, when this returns. */
int egress_relay(struct egress *egress, struct packet *packets, uint32_t count)
{
	int active;

	egress->batch = packets;
	egress->prepared = 0;
	active = sort_by_rule(egress, count);
	if (active < 0)
		return active;
	for (int i = 0; i < active; i++) {
		uint32_t rule_id = egress->active_rules[i];
		int status = relay_rule(egress, rule_id);

		egress->tables->rules[rule_id].head = NONE;
		if (status)
			return status;
	}
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

/* The device or the route may not be able to take segments of this size in one send. */
static bool gso_suspect(int error)
{
	return error == EINVAL || error == EMSGSIZE || error == EIO || error == EOPNOTSUPP;
}

static void account_send(struct egress *egress, const struct send *send, const struct run *run, int result)
{
	struct mcr_output_counters *counters = &egress->worker->output_counters[send->output_id];

	if (tap_wanted(egress->worker))
		tap_send(egress->worker, send, run, result < 0 ? -result : 0, drop_reason(-result));
	if (result < 0) {
		counter_add(&counters->dropped[drop_reason(-result)], send->count);
		counter_set(&counters->last_error, (uint64_t)-result);
		return;
	}
	counter_add(&counters->sent_packets, send->count);
	counter_add(&counters->sent_bytes,
		    send->count == run->count ? run->bytes : run->payloads[send->first].iov_len);
	latency_add(&egress->worker->latency[run->first.rule_id], &run->rx_times_ns[send->first], send->count,
		    reactor_now_ns(egress->reactor));
}

/*
 * What a send says of GSO. It is to blame only if packets that were refused as segments succeed one by one: the
 * MTU has shrunk, or the path's is smaller. That may pass, so it is tried again.
 */
static void learn_gso(struct egress *egress, const struct send *send, uint32_t payload_length)
{
	struct output *output = &egress->tables->outputs[send->output_id];

	if (send->count > 1) {
		if (payload_length >= output->gso_refused)
			output->gso_refused = 0;
	} else if (send->last) {
		if (!output->gso_refused || payload_length < output->gso_refused)
			output->gso_refused = payload_length;
		output->gso_retry_ns = reactor_now_ns(egress->reactor) + GSO_RETRY_S * 1000000000ULL;
	}
}

int egress_complete(struct egress *egress, uint32_t send_index, int result)
{
	struct send *send = &egress->sends[send_index];
	struct run *run = &egress->runs[send->run];

	if (result < 0 && send->count > 1 && gso_suspect(-result)) {
		send->last = send->first + send->count;
		send->count = 1;
		return submit_send(egress, send_index);
	}
	if (result >= 0)
		learn_gso(egress, send, run->first.payload_length);
	account_send(egress, send, run, result);
	if (send->first + 1 < send->last) {
		send->first++;
		return submit_send(egress, send_index);
	}
	send->next_free = egress->free_send;
	egress->free_send = send_index;
	egress->sends_in_flight--;
	return release_run(egress, send->run);
}

/* Waits until every send has completed. */
int egress_settle(struct egress *egress)
{
	while (egress->sends_in_flight) {
		int status = reactor_wait(egress->reactor);

		if (status)
			return status;
	}
	return 0;
}

/* Puts the socket of an output into the table of registered files, or -1 takes it out. */
static int register_socket(struct egress *egress, uint32_t output_id, int fd)
{
	int status = io_uring_register_files_update(&egress->reactor->uring, output_id, &fd, 1);

	return status < 0 ? status : 0;
}

/* Carries out a command that has been checked. Returns 0, or -errno if the kernel refuses the socket. */
int egress_apply(struct egress *egress, const struct mcr_command *command, int fd)
{
	int status = 0;

	if (command->type == MCR_ADD_OUTPUT && tables_have(egress->tables, command->output.output_id))
		status = register_socket(egress, command->output.output_id, fd);
	if (command->type == MCR_DEL_OUTPUT && egress->tables->outputs[command->id].known)
		register_socket(egress, command->id, -1);
	if (!status)
		tables_apply(egress->tables, command);
	return status;
}
