// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * Every map and every BPF program of MCR. A packet's way through this file is its order: parse, find
 * the rule, check; then either the worker path (leave metadata, redirect to the AF_XDP socket of the
 * receive queue) or the kernel path (rewrite and redirect, or clone to all and rewrite each clone).
 *
 * A packet that no rule wants is passed to the stack, byte for byte untouched. A packet that a rule
 * wants is never passed: it is redirected, or dropped and counted with exactly one reason.
 *
 * Compiled by BCC, which rewrites map.lookup() and the like in this file only. It is compiled a second time, with
 * MCR_TRACED set, when the first trace or capture begins: the programs of that time tell what they do, and take
 * over from these while it runs. Without one, a packet costs one more test of a word that is at hand.
 */
#include <uapi/linux/bpf.h>
#include <asm-generic/errno.h>
#define MCR_BPF 1
#include "relay_abi.h"
#include "relay_parse.h"
#include "relay_rewrite.h"
#include "relay_verifier.h"

#ifndef MCR_TRACED
#define MCR_TRACED 0
#endif

/* What to relay: an input stream and its rule. */
BPF_TABLE("hash", struct mcr_rule_key, struct mcr_rule_value, rules, MCR_MAX_RULE_KEYS);
/* Which lookups some rule needs, and the version of this layout. */
BPF_TABLE("array", u32, struct mcr_settings, settings, 1);
/* The AF_XDP sockets; the index is mcr_rule_value.xsk_base + receive queue. */
BPF_XSKMAP(xsks, MCR_MAX_XSKS);
/* What XDP counts; the index is the rule_id. */
BPF_TABLE("percpu_array", u32, struct mcr_rule_stats, rule_stats, MCR_MAX_RULES);
/* What the workers count: they map these and write them without a system call. */
BPF_F_TABLE("array", u32, struct mcr_rule_counters, rule_counters, MCR_MAX_RULES, BPF_F_MMAPABLE);
BPF_F_TABLE("array", u32, struct mcr_output_counters, output_counters, MCR_MAX_OUTPUTS, BPF_F_MMAPABLE);
BPF_F_TABLE("array", u32, struct mcr_worker_counters, worker_counters, MCR_MAX_WORKERS, BPF_F_MMAPABLE);
/* Worker path: latency of each rule; the index is the rule_id. */
BPF_F_TABLE("array", u32, struct mcr_latency, rule_latency, MCR_MAX_RULES, BPF_F_MMAPABLE);
/* Kernel path: what each output makes of a packet. */
BPF_TABLE("array", u32, struct mcr_kernel_output, kernel_outputs, MCR_MAX_OUTPUTS);
/* Kernel path: the egress interface of a rule's one output; the index is mcr_kernel_output.bulk. */
BPF_XDP_REDIRECT_MAP("devmap", struct bpf_devmap_val, devices, MCR_MAX_EGRESS);
/* Kernel path: the outputs of a fan-out, by egress interface. */
BPF_TABLE("array", u32, struct mcr_fan_out, fan_out_outputs, MCR_MAX_FAN_OUTS);
/* The device maps that clones go to. Fan-outs by the same interfaces share one. */
BPF_TABLE("devmap", u32, struct bpf_devmap_val, device_set_shape, MCR_MAX_OUTPUTS_PER_RULE);
BPF_ARRAY_OF_MAPS(device_sets, "device_set_shape", MCR_MAX_FAN_OUTS);
/* What each fan-out relayed to every one of its outputs. */
BPF_TABLE("percpu_array", u32, u64, fan_out_relayed, MCR_MAX_FAN_OUTS);
/* What the kernel path counts for each output; the index is the output_id. */
BPF_TABLE("percpu_array", u32, struct mcr_output_stats, output_stats, MCR_MAX_OUTPUTS);
/* Where the later fragments of a datagram belong. */
BPF_TABLE("lru_hash", struct mcr_fragment_key, u16, fragments, MCR_MAX_FRAGMENTED);
/* The egress interfaces of the kernel path, by ifindex; user space makes the entries. */
BPF_TABLE("hash", u32, struct mcr_egress_device, egress_devices, MCR_MAX_EGRESS);
BPF_TABLE("percpu_array", u32, struct mcr_bulk, bulks, MCR_MAX_EGRESS);
/* The interfaces whose driver hands over no metadata, by ifindex, as soon as one packet has shown it. */
BPF_TABLE("hash", u32, u32, no_metadata, MCR_MAX_INTERFACES);
/* What the supervisor settles: what dead workers had in hand, what retired fan-outs relayed. */
BPF_F_TABLE("array", u32, struct mcr_rule_counters, settled_rules, MCR_MAX_RULES, BPF_F_MMAPABLE);
BPF_F_TABLE("array", u32, struct mcr_output_counters, settled_outputs, MCR_MAX_OUTPUTS, BPF_F_MMAPABLE);

/* What this CPU does at the moment, which the tracepoints do not say. */
struct in_hand {
	u32 rule_id; /* of the packet that was redirected last */
	u32 output_id;
	u32 bulk; /* the last one that was begun */
	u32 open; /* bulks that hold frames */
};
BPF_TABLE("percpu_array", u32, struct in_hand, hands, 1);

struct checksum_scratch {
	u64 words[MCR_CHECKSUM_CHUNK / sizeof(u64)];
};
BPF_TABLE("percpu_array", u32, struct checksum_scratch, scratch, 1);

/* A trace or capture: its programs, what it wants, and what they and the workers tell. */
BPF_PROG_ARRAY(traced, 2);
BPF_PROG_ARRAY(traced_egress, 1);
enum { TRACED_BEGIN = 0, TRACED_RELAY = 1 };
BPF_TABLE("array", u32, struct mcr_tap, tap, 1);
BPF_RINGBUF_OUTPUT(tap_events, MCR_TAP_RING_PAGES);
BPF_F_TABLE("array", u32, struct mcr_tap_report, tap_reports, MCR_TAP_REPORTS, BPF_F_MMAPABLE);

/*
 * What the functions below return: an enum xdp_action, and in a trace above it the reason plus one of a rule's
 * drop, from which the trace learns what became of the packet. The kernel is told the action alone.
 */
enum { VERDICT_ACTION = 0xff, VERDICT_REASON = 8 };

/* BCC's own redirect_map() wants the map's name; this takes a map that was looked up. */
static long (*redirect_to)(void *map, u64 key, u64 flags) = (void *)BPF_FUNC_redirect_map;

/*
 * Lookups that no rule needs are skipped: the usual packet costs one. While a trace runs, mcr_relay hands over
 * here to the programs that do the same and more.
 */
static __always_inline struct mcr_rule_value *find_rule(struct xdp_md *ctx, const struct mcr_packet *packet)
{
	struct mcr_rule_value *rule = NULL;
	struct mcr_settings *wanted;
	struct mcr_rule_key key;
	u32 zero = 0;

	wanted = settings.lookup(&zero);
	if (!wanted)
		return NULL;
	if (!MCR_TRACED && wanted->lookups & MCR_TRACING)
		traced.call(ctx, TRACED_BEGIN); /* comes back only if there is no such program */
	if (wanted->lookups & MCR_HAS_SOURCE_PORT) {
		mcr_widen_key(&key, packet, 0);
		rule = rules.lookup(&key);
		if (rule)
			return rule;
	}
	if (wanted->lookups & MCR_HAS_ANY_PORT) {
		mcr_widen_key(&key, packet, 1);
		rule = rules.lookup(&key);
		if (rule)
			return rule;
	}
	if (wanted->lookups & MCR_HAS_SOURCE_STAR) {
		mcr_widen_key(&key, packet, 2);
		rule = rules.lookup(&key);
		if (rule)
			return rule;
	}
	if (wanted->lookups & MCR_HAS_ANY_STAR) {
		mcr_widen_key(&key, packet, 3);
		rule = rules.lookup(&key);
	}
	return rule;
}

static __always_inline void count_drop(struct mcr_rule_stats *stats, u32 reason)
{
	if (reason < MCR_DROP_REASONS)
		stats->dropped[reason]++;
}

static __always_inline int drop(struct mcr_rule_stats *stats, u32 reason)
{
	stats->last_seen_ns = bpf_ktime_get_coarse_ns();
	count_drop(stats, reason);
	return XDP_DROP | (MCR_TRACED ? (reason + 1) << VERDICT_REASON : 0);
}

static __always_inline void drop_output(u32 output_id, u32 reason)
{
	struct mcr_output_stats *stats = output_stats.lookup(&output_id);

	if (stats && reason < MCR_OUTPUT_DROP_REASONS)
		stats->dropped[reason]++;
}

static __always_inline void count_sent(u32 output_id, u16 payload_length)
{
	struct mcr_output_stats *stats = output_stats.lookup(&output_id);

	if (!stats)
		return;
	stats->sent_packets++;
	stats->sent_bytes += payload_length;
}

static __always_inline void empty_bulk(struct mcr_bulk *bulk)
{
	bulk->count = 0;
	bulk->seen = 0;
	bulk->passed = 0;
	bulk->by_egress = 0;
	bulk->bytes = 0;
	bulk->mixed = 0;
}

static __always_inline void begin_bulk(struct mcr_bulk *bulk, u32 index, u32 ifindex)
{
	u32 zero = 0;
	struct in_hand *hand = hands.lookup(&zero);

	bulk->begun_ns = bpf_ktime_get_coarse_ns();
	bulk->ifindex = ifindex;
	empty_bulk(bulk);
	if (!hand)
		return;
	hand->bulk = index;
	hand->open++;
}

static __always_inline void end_bulk(struct mcr_bulk *bulk)
{
	u32 zero = 0;
	struct in_hand *hand = hands.lookup(&zero);

	bulk->begun_ns = 0;
	if (hand)
		hand->open--;
}

/*
 * Remembers a frame that is rewritten and about to be redirected; mcr_devmap_xmit counts it when the device has taken
 * it, or not. Returns CLOCK_MONOTONIC to a tick, which is read once for each bulk.
 */
static __always_inline u64 log_frame(const struct mcr_kernel_output *output, u32 output_id,
				     u16 payload_length)
{
	u32 index = output->bulk, frame = output_id << 16 | payload_length, count;
	struct mcr_bulk *bulk = bulks.lookup(&index);

	if (!index || !bulk) { /* never so but in tests, of single frames that nobody flushes */
		count_sent(output_id, payload_length);
		return bpf_ktime_get_coarse_ns();
	}
	if (!bulk->begun_ns)
		begin_bulk(bulk, index, output->ifindex);
	count = bulk->count;
	if (count > MCR_BULK_FRAMES)
		return bulk->begun_ns; /* never so: the kernel flushes a full bulk */
	bulk->frames[mcr_bounded(count, MCR_BULK_SLOTS - 1)] = frame;
	bulk->count = count + 1;
	bulk->bytes += payload_length;
	bulk->mixed |= frame ^ bulk->frames[0];
	return bulk->begun_ns;
}

static __always_inline void fill_metadata(struct mcr_metadata *metadata, const struct mcr_packet *packet,
					  u32 rule_id, u16 flags, u64 now_ns)
{
	metadata->rx_time_ns = now_ns;
	metadata->rule_id = rule_id;
	metadata->payload_offset = packet->payload_offset;
	metadata->payload_length = packet->payload_length;
	metadata->ip_offset = packet->ip_offset;
	metadata->dport = packet->key.dport;
	metadata->ttl = packet->ttl;
	metadata->tos = packet->tos;
	metadata->flags = flags;
}

/* bpf_xdp_adjust_meta invalidates every packet pointer; none is used after it but the new ones. */
static __always_inline int leave_metadata(struct xdp_md *ctx, const struct mcr_metadata *values)
{
	struct mcr_metadata *metadata;
	int before = (long)ctx->data - (long)ctx->data_meta; /* left by an XDP program of another device */

	if (bpf_xdp_adjust_meta(ctx, before - (int)sizeof(*metadata)))
		return -1;
	metadata = (void *)(long)ctx->data_meta;
	if ((void *)(metadata + 1) > (void *)(long)ctx->data)
		return -1;
	*metadata = *values;
	return 0;
}

/*
 * As the first bytes of the packet itself, because not every driver hands over metadata (vmxnet3 does not), while
 * each has room for a longer header. Every packet pointer is invalid after it but the new one.
 */
static __always_inline int prepend_metadata(struct xdp_md *ctx, const struct mcr_metadata *values)
{
	struct mcr_metadata *metadata;

	if (bpf_xdp_adjust_head(ctx, -(int)sizeof(*metadata)))
		return -1;
	metadata = (void *)(long)ctx->data;
	if ((void *)(metadata + 1) > (void *)(long)ctx->data_end)
		return -1;
	*metadata = *values;
	return 0;
}

/* --- what a trace or capture is told */

/* In front of a marked clone: the egress program has to know which packet it tells of. */
struct traced_metadata {
	struct mcr_metadata metadata;
	u64 traced_ns;
};

#if MCR_TRACED
struct tap_scratch {
	struct mcr_tap_event event;
	u8 bytes[MCR_TAP_BYTES];
};
/* One for the packet, whose fate is known last, and one for its outputs. */
BPF_TABLE("percpu_array", u32, struct tap_scratch, tap_scratches, 2);
enum { TAP_PACKET = 0, TAP_OUTPUT = 1 };

/* Into the ring, without waking anybody: the supervisor looks by itself. */
static __always_inline void tap_tell(struct tap_scratch *told, u64 captured)
{
	u32 zero = 0;
	struct mcr_tap *wanted;

	if (captured > MCR_TAP_BYTES)
		return;
	told->event.captured = captured;
	if (!tap_events.ringbuf_output(told, sizeof(told->event) + captured, BPF_RB_NO_WAKEUP))
		return;
	wanted = tap.lookup(&zero);
	if (wanted)
		__sync_fetch_and_add(&wanted->lost, 1);
}

/* Takes up to `wanted` bytes of the frame as it is now. Returns how many. */
static __always_inline u64 tap_take(struct xdp_md *ctx, struct tap_scratch *told, u64 wanted)
{
	u64 length = bpf_xdp_get_buff_len(ctx), captured = wanted < length ? wanted : length, least = 1;

	told->event.length = length;
	if (captured > MCR_TAP_BYTES)
		captured = MCR_TAP_BYTES;
	mcr_opaque(captured);
	mcr_opaque(
		least); /* compared with zero, an older verifier would not see that the rest is at least 1 */
	if (captured < least || bpf_xdp_load_bytes(ctx, 0, told->bytes, captured))
		return 0;
	return captured;
}

/* What became of a marked packet at one output; reason: enum mcr_output_drop_reason or MCR_REWRITTEN. */
static __always_inline void tap_output(struct xdp_md *ctx, const struct mcr_metadata *metadata, u64 traced_ns,
				       u32 output_id, const struct mcr_kernel_output *output, int reason)
{
	u32 zero = 0, index = TAP_OUTPUT;
	u64 captured = 0;
	struct tap_scratch *told = tap_scratches.lookup(&index);
	struct mcr_tap *wanted = tap.lookup(&zero);

	if (!told || !wanted)
		return;
	__builtin_memset(&told->event, 0, sizeof(told->event));
	told->event.time_ns = traced_ns;
	told->event.done_ns = bpf_ktime_get_ns();
	told->event.key.ifindex = output->ifindex;
	told->event.rule_id = metadata->rule_id;
	told->event.output_id = output_id;
	told->event.cpu = bpf_get_smp_processor_id();
	if (metadata->flags & MCR_METADATA_PARTIAL)
		told->event.checksum_offset = metadata->payload_offset - MCR_UDP_LENGTH -
					      metadata->ip_offset + MCR_ETHERNET_LENGTH +
					      (output->vlan ? MCR_VLAN_LENGTH : 0);
	told->event.verdict = reason == MCR_REWRITTEN ? MCR_TAP_SENT : MCR_TAP_NOT_SENT;
	told->event.reason = reason == MCR_REWRITTEN ? 0 : reason;
	if (reason == MCR_REWRITTEN)
		captured = tap_take(ctx, told, wanted->bytes_after);
	tap_tell(told, captured);
}

static __always_inline int leave_traced_metadata(struct xdp_md *ctx, const struct mcr_metadata *values,
						 u64 traced_ns)
{
	struct traced_metadata *left;
	int before = (long)ctx->data - (long)ctx->data_meta;

	if (bpf_xdp_adjust_meta(ctx, before - (int)sizeof(*left)))
		return -1;
	left = (void *)(long)ctx->data_meta;
	if ((void *)(left + 1) > (void *)(long)ctx->data)
		return -1;
	left->metadata = *values;
	left->traced_ns = traced_ns;
	return 0;
}
#else
#define tap_output(ctx, metadata, traced_ns, output_id, output, reason) ((void)0)
#define leave_traced_metadata(ctx, values, traced_ns) -1
#endif

/* --- the worker path */

static __always_inline int relay_to_worker(struct xdp_md *ctx, struct mcr_rule_stats *stats, u32 xsk,
					   const struct mcr_metadata *metadata)
{
	u32 zero = 0;
	struct in_hand *hand;
	int action;

	stats->last_seen_ns = metadata->rx_time_ns;
	if (prepend_metadata(ctx, metadata))
		return drop(stats, MCR_DROP_NO_METADATA);
	action = xsks.redirect_map(xsk, XDP_DROP); /* XDP_DROP comes back when the map has no socket there */
	if (action != XDP_REDIRECT)
		return drop(stats, MCR_DROP_NO_WORKER);
	stats->redirected_packets++; /* mcr_refused takes back what the socket refuses */
	hand = hands.lookup(&zero);
	if (hand)
		hand->rule_id = metadata->rule_id;
	return action;
}

/* --- the kernel path */

/*
 * The plain sum of the pseudo header, which is what a sender on this host leaves in the checksum field for
 * the device to complete (CHECKSUM_PARTIAL in the kernel's include/linux/skbuff.h).
 */
static __always_inline int pseudo_sum(u8 *ip, u8 *udp, void *data_end, u16 *result)
{
	u32 rest = *(mcr_word16 *)(udp + 4) + mcr_swap16(MCR_PROTOCOL_UDP);

	if (*ip >> 4 == 4) {
		*result = mcr_fold(rest + mcr_sum(ip + 12, 4));
		return 0;
	}
	if ((void *)(ip + MCR_IPV6_LENGTH) > data_end)
		return -1;
	*result = mcr_fold(rest + mcr_sum(ip + 8, 16));
	return 0;
}

/* The sum over the UDP header, as it is, and payload; in chunks, because of bpf_csum_diff's limit. */
static __always_inline int sum_datagram(struct xdp_md *ctx, u32 offset, u32 length, u16 *result)
{
	u32 zero = 0, whole = length / MCR_CHECKSUM_CHUNK;
	u64 tail = length & (MCR_CHECKSUM_CHUNK - 1), least = 1;
	struct checksum_scratch *chunk = scratch.lookup(&zero);
	s64 sum = 0;

	if (!chunk || whole > MCR_CHECKSUM_CHUNKS)
		return -1;
	for (u32 i = 0; i < MCR_CHECKSUM_CHUNKS; i++) {
		mcr_opaque(i);
		if (i >= whole)
			break;
		if (bpf_xdp_load_bytes(ctx, offset, chunk->words, MCR_CHECKSUM_CHUNK))
			return -1;
		sum = bpf_csum_diff(0, 0, (__be32 *)chunk->words, MCR_CHECKSUM_CHUNK, mcr_fold(sum));
		offset += MCR_CHECKSUM_CHUNK;
	}
	if (tail) {
		__builtin_memset(chunk->words, 0, sizeof(chunk->words));
		mcr_opaque(tail);
		mcr_opaque(least); /* as in tap_take */
		if (tail < least || bpf_xdp_load_bytes(ctx, offset, chunk->words, tail))
			return -1;
		sum = bpf_csum_diff(0, 0, (__be32 *)chunk->words, MCR_CHECKSUM_CHUNK, mcr_fold(sum));
	}
	*result = mcr_fold(sum);
	return 0;
}

/*
 * A checksum field that equals the pseudo header's sum is partial, or by a chance of 1 in 65536 complete. In
 * native mode nobody will complete it, so it is completed here, which is right in both cases. In generic
 * mode the stack will complete a partial one: then, and only then, it is left and told by *flags.
 */
static __always_inline int settle_checksum(struct xdp_md *ctx, const struct mcr_packet *packet,
					   struct mcr_rule_value *rule, u16 *flags)
{
	void *data = (void *)(long)ctx->data, *data_end = (void *)(long)ctx->data_end;
	u32 ip_offset = packet->ip_offset, udp_offset = packet->payload_offset - MCR_UDP_LENGTH;
	u16 sum, complete, pseudo, field;
	u8 *ip, *udp;

	if (ip_offset > MCR_MAX_IP_OFFSET || udp_offset > MCR_UDP_OFFSET_MASK)
		return -1;
	ip = data + mcr_bounded(ip_offset, MCR_IP_OFFSET_MASK);
	udp = data + mcr_bounded(udp_offset, MCR_UDP_OFFSET_MASK);
	if ((void *)(ip + 20) > data_end || (void *)(udp + MCR_UDP_LENGTH) > data_end)
		return -1;
	field = *(u16 *)(udp + 6);
	if (pseudo_sum(ip, udp, data_end, &pseudo))
		return -1;
	if (field != pseudo || packet->drop_reason == MCR_DROP_FRAGMENT)
		return 0;
	if (sum_datagram(ctx, udp_offset, packet->payload_length + MCR_UDP_LENGTH, &sum))
		return -1;
	/* sum holds the field itself, which is the pseudo header's sum: so nothing is missing in it. */
	complete = (u16)~sum;
	if (!complete)
		complete = 0xffff;
	if (rule->flags & MCR_RULE_GENERIC) {
		if (complete != field)
			rule->partial_seen = 1;
		if (rule->partial_seen)
			*flags |= MCR_METADATA_PARTIAL;
		return 0;
	}
	data = (void *)(long)ctx->data;
	data_end = (void *)(long)ctx->data_end;
	udp = data + mcr_bounded(udp_offset, MCR_UDP_OFFSET_MASK);
	if ((void *)(udp + MCR_UDP_LENGTH) > data_end)
		return -1;
	*(u16 *)(udp + 6) = complete;
	return 0;
}

/* Rewrites the frame for an output, whose Ethernet header may be longer or shorter than the one it came with. */
static __always_inline int rewrite(struct xdp_md *ctx, const struct mcr_metadata *metadata,
				   const struct mcr_kernel_output *output)
{
	void *data = (void *)(long)ctx->data, *data_end = (void *)(long)ctx->data_end;
	int grow = MCR_ETHERNET_LENGTH + (output->vlan ? MCR_VLAN_LENGTH : 0) - metadata->ip_offset;
	bool ipv6;
	u8 *ip;

	if (metadata->ip_offset > MCR_MAX_IP_OFFSET)
		return -1;
	ip = data + mcr_bounded(metadata->ip_offset, MCR_IP_OFFSET_MASK);
	if ((void *)(ip + 1) > data_end)
		return -1;
	ipv6 = *ip >> 4 == 6;
	if (mcr_rewrite_ip(data, data_end, metadata, output) != MCR_REWRITTEN)
		return -1;
	if (grow && bpf_xdp_adjust_head(ctx, -grow))
		return -1;
	data = (void *)(long)ctx->data;
	data_end = (void *)(long)ctx->data_end;
	return mcr_rewrite_ethernet(data, data_end, output, ipv6) == MCR_REWRITTEN ? 0 : -1;
}

/* Our egress program would take what an XDP program of another device left for our own. */
static __always_inline int strip_metadata(struct xdp_md *ctx)
{
	int length = (long)ctx->data - (long)ctx->data_meta; /* negative where the driver has no metadata */

	return length > 0 ? bpf_xdp_adjust_meta(ctx, length) : 0;
}

/* In generic mode the device is handed the packet at once, and no tracepoint tells what it did with it. */
static __always_inline void count_generic(u32 output_id, u16 payload_length)
{
	struct in_hand *hand;
	u32 zero = 0;

	count_sent(output_id, payload_length);
	hand = hands.lookup(&zero);
	if (hand)
		hand->output_id = output_id;
}

/*
 * The usual rule has one output: no clone, no second program. Only where some fan-out leaves by the same interface
 * does the device ask for mcr_egress: the kernel runs on all frames of a bulk the egress program that its first one
 * asked for, or none, so that these frames must pass through it unharmed. They have no metadata.
 */
static __always_inline int relay_to_one(struct xdp_md *ctx, struct mcr_rule_stats *stats,
					struct mcr_rule_value *rule, const struct mcr_packet *packet,
					const struct mcr_metadata *metadata, u64 traced_ns)
{
	u32 output_id = rule->output_id;
	struct mcr_kernel_output *output = kernel_outputs.lookup(&output_id);
	struct mcr_output_stats *counts = output_stats.lookup(&output_id);
	bool generic = rule->flags & MCR_RULE_GENERIC;
	int reason, action = XDP_DROP;

	if (!output || !output->ifindex || !counts)
		return drop(stats, MCR_DROP_NO_OUTPUT);
	stats->relayed_packets++;
	stats->relayed_bytes += packet->payload_length;
	counts->relayed_packets++;
	reason = mcr_admit(output, packet->ttl, packet->ip_length);
	if (reason == MCR_REWRITTEN && (strip_metadata(ctx) || rewrite(ctx, metadata, output)))
		reason = MCR_OUTPUT_DROP_SEND_ERROR;
	if (reason == MCR_REWRITTEN) {
		action = generic ? bpf_redirect(output->ifindex, 0)
				 : devices.redirect_map(output->bulk, XDP_DROP);
		if (action != XDP_REDIRECT) /* the kernel empties the slot of a device that goes */
			reason = MCR_OUTPUT_DROP_LINK_DOWN;
	}
	if (traced_ns)
		tap_output(ctx, metadata, traced_ns, output_id, output, reason);
	if (reason == MCR_REWRITTEN && !generic) {
		stats->last_seen_ns = log_frame(output, output_id, packet->payload_length);
		return action;
	}
	stats->last_seen_ns = bpf_ktime_get_coarse_ns();
	if (reason == MCR_REWRITTEN)
		count_generic(output_id, packet->payload_length);
	else
		drop_output(output_id, reason);
	return action;
}

static __always_inline u32 output_in_slot(const struct mcr_fan_out *all, u32 slot)
{
	return all->output_ids[mcr_bounded(slot, MCR_FAN_OUT_SLOTS - 1)];
}

/* The output of a fan-out that leaves by an interface, nearly always in the first slot that is looked at. */
static __always_inline struct mcr_kernel_output *find_output(u32 fan_out, u32 ifindex, u32 *output_id)
{
	struct mcr_fan_out *all = fan_out_outputs.lookup(&fan_out);

	if (!all)
		return NULL;
	for (u32 i = 0; i < MCR_MAX_OUTPUTS_PER_RULE; i++) {
		struct mcr_kernel_output *output;

		*output_id = output_in_slot(all, ifindex + i);
		if (!*output_id)
			break;
		output = kernel_outputs.lookup(output_id);
		if (output && output->ifindex == ifindex)
			return output;
	}
	return NULL;
}

/*
 * The kernel leaves out, without a word, every device whose MTU the frame exceeds by more than its slack for
 * a VLAN tag. Those outputs' drops are counted here; the egress program counts the rest.
 */
static __always_inline void count_left_out(struct xdp_md *ctx, const struct mcr_metadata *metadata,
					   u32 fan_out, u32 frame_length, u64 traced_ns)
{
	struct mcr_fan_out *all = fan_out_outputs.lookup(&fan_out);

	if (!all)
		return;
	for (u32 i = 0; i < MCR_FAN_OUT_SLOTS; i++) {
		u32 output_id = output_in_slot(all, i);
		struct mcr_kernel_output *output;

		if (!output_id)
			continue;
		output = kernel_outputs.lookup(&output_id);
		if (!output || frame_length <= output->mtu + MCR_ETHERNET_LENGTH + MCR_VLAN_LENGTH)
			continue;
		drop_output(output_id, MCR_OUTPUT_DROP_TOO_LARGE);
		if (traced_ns)
			tap_output(ctx, metadata, traced_ns, output_id, output, MCR_OUTPUT_DROP_TOO_LARGE);
	}
}

static __always_inline int relay_to_many(struct xdp_md *ctx, struct mcr_rule_stats *stats,
					 struct mcr_rule_value *rule, u32 frame_length,
					 const struct mcr_metadata *metadata, u64 traced_ns)
{
	u32 fan_out = rule->fan_out, device_set = rule->device_set;
	void *all = device_sets.lookup(&device_set);
	u64 *relayed = fan_out_relayed.lookup(&fan_out);

	if (!all || !relayed)
		return drop(stats, MCR_DROP_NO_OUTPUT);
	if (bpf_xdp_get_buff_len(ctx) != ctx->data_end - ctx->data)
		return drop(stats,
			    MCR_DROP_OVERSIZE); /* the kernel cannot clone a frame of several buffers */
	if (traced_ns ? leave_traced_metadata(ctx, metadata, traced_ns) : leave_metadata(ctx, metadata))
		return drop(stats, MCR_DROP_NO_METADATA);
	stats->last_seen_ns = bpf_ktime_get_coarse_ns();
	stats->relayed_packets++;
	stats->relayed_bytes += metadata->payload_length;
	*relayed += 1;
	if (frame_length > rule->smallest_mtu + MCR_ETHERNET_LENGTH + MCR_VLAN_LENGTH)
		count_left_out(ctx, metadata, fan_out, frame_length, traced_ns);
	return redirect_to(all, 0, BPF_F_BROADCAST);
}

static __always_inline int relay_in_kernel(struct xdp_md *ctx, struct mcr_rule_stats *stats,
					   struct mcr_rule_value *rule, const struct mcr_packet *packet,
					   u32 frame_length, bool later_fragment, u64 traced_ns)
{
	struct mcr_metadata metadata;
	u16 flags = (later_fragment ? MCR_METADATA_LATER_FRAGMENT : 0) |
		    (traced_ns ? MCR_METADATA_TRACED : 0);

	if (!later_fragment && settle_checksum(ctx, packet, rule, &flags))
		return drop(stats, MCR_DROP_BAD_CHECKSUM);
	fill_metadata(&metadata, packet, rule->rule_id, flags, rule->fan_out); /* nobody asks for the time */
	if (rule->output_id)
		return relay_to_one(ctx, stats, rule, packet, &metadata, traced_ns);
	return relay_to_many(ctx, stats, rule, frame_length, &metadata, traced_ns);
}

/* What is on its way to a device on this CPU; NULL if the device is not accounted for. */
static __always_inline struct mcr_bulk *find_bulk(u32 ifindex, u32 *index)
{
	u32 zero = 0;
	struct in_hand *hand = hands.lookup(&zero);
	struct mcr_egress_device *device;
	struct mcr_bulk *bulk;

	if (hand && hand->open) { /* nearly always the one that was begun last */
		*index = hand->bulk;
		bulk = bulks.lookup(index);
		if (bulk && bulk->ifindex == ifindex && bulk->begun_ns)
			return bulk;
	}
	device = egress_devices.lookup(&ifindex);
	if (!device)
		return NULL;
	*index = device->bulk;
	return bulks.lookup(index);
}

/*
 * In mcr_egress: the bulk that is being flushed. From its first frame on the order in which frames pass here counts,
 * which is that in which the device gets them.
 */
static __always_inline struct mcr_bulk *flushed_bulk(u32 ifindex)
{
	u32 index = 0;
	struct mcr_bulk *bulk = find_bulk(ifindex, &index);

	if (!bulk)
		return NULL;
	if (!bulk->begun_ns)
		begin_bulk(bulk, index, ifindex);
	if (!bulk->by_egress) { /* its log counts from here on */
		bulk->by_egress = 1;
		bulk->bytes = 0;
		bulk->mixed = 0;
	}
	return bulk;
}

static __always_inline void log_passed(struct mcr_bulk *bulk, u32 frame)
{
	u32 passed = bulk->passed;

	if (passed >= MCR_BULK_FRAMES)
		return; /* never so: a bulk has no more */
	bulk->frames[mcr_bounded(MCR_BULK_SLOTS + passed, 2 * MCR_BULK_SLOTS - 1)] = frame;
	bulk->passed = passed + 1;
	bulk->bytes += frame & 0xffff;
	bulk->mixed |= frame ^ bulk->frames[MCR_BULK_SLOTS];
}

/* A frame that relay_to_one has rewritten and logged. */
static __always_inline int pass_rewritten(u32 ifindex)
{
	struct mcr_bulk *bulk = flushed_bulk(ifindex);
	u32 seen;

	if (!bulk)
		return XDP_PASS;
	seen = bulk->seen;
	if (seen >= bulk->count || seen > MCR_BULK_FRAMES)
		return XDP_PASS; /* never so: it has been logged */
	bulk->seen = seen + 1;
	log_passed(bulk, bulk->frames[mcr_bounded(seen, MCR_BULK_SLOTS - 1)]);
	return XDP_PASS;
}

/* Runs on each clone, on its way out of one device. Where it drops one, mcr_devmap_xmit finds no trace of it. */
int mcr_egress(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *data_end = (void *)(long)ctx->data_end;
	struct mcr_metadata *left = (void *)(long)ctx->data_meta, metadata;
	struct traced_metadata *traced_left = (void *)left;
	struct mcr_kernel_output *output;
	struct mcr_bulk *bulk;
	u32 output_id;
	int reason = MCR_OUTPUT_DROP_SEND_ERROR;
	u64 traced_ns = 0;

	if ((void *)(left + 1) > data)
		return pass_rewritten(ctx->egress_ifindex);
	metadata = *left;
	if (MCR_TRACED) {
		if ((void *)(traced_left + 1) > data)
			return XDP_DROP;
		traced_ns = traced_left->traced_ns;
	} else if (metadata.flags & MCR_METADATA_TRACED) {
		traced_egress.call(ctx, 0); /* its twin, compiled with MCR_TRACED */
	}
	bulk = flushed_bulk(ctx->egress_ifindex);
	output = find_output(metadata.fan_out, ctx->egress_ifindex, &output_id);
	if (!output)
		return XDP_DROP;
	if (metadata.ip_offset > MCR_MAX_IP_OFFSET)
		return XDP_DROP;
	/* The next device must not take our metadata for its own. */
	if (!bpf_xdp_adjust_meta(ctx, MCR_TRACED ? sizeof(*traced_left) : sizeof(metadata))) {
		/* Frames of several buffers are not cloned. */
		reason = mcr_admit(output, metadata.ttl, data_end - data - metadata.ip_offset);
		if (reason == MCR_REWRITTEN && rewrite(ctx, &metadata, output))
			reason = MCR_OUTPUT_DROP_SEND_ERROR;
	}
	if (traced_ns)
		tap_output(ctx, &metadata, traced_ns, output_id, output, reason);
	if (reason != MCR_REWRITTEN) {
		drop_output(output_id, reason);
		return XDP_DROP;
	}
	if (bulk)
		log_passed(bulk, output_id << 16 | metadata.payload_length);
	else
		count_sent(output_id, metadata.payload_length);
	return XDP_PASS; /* in a devmap program: send */
}

/* --- what became of redirects: tracepoints, which tell of every program and of every network namespace */

/* The offsets come from the running kernel's BTF. */
static __always_inline bool is_our_program(u64 program)
{
	struct mcr_settings *own;
	u32 zero = 0, id = 0;
	u64 aux = 0;

	if (bpf_probe_read_kernel(&aux, sizeof(aux), (void *)(program + MCR_PROGRAM_AUX)))
		return false;
	if (bpf_probe_read_kernel(&id, sizeof(id), (void *)(aux + MCR_PROGRAM_ID)))
		return false;
	own = settings.lookup(&zero);
	return own && own->program_id == id;
}

static __always_inline u32 redirect_reason(int error)
{
	switch (-error) {
	case ENOBUFS:
		return MCR_DROP_RECEIVE_RING_FULL;
	case ENOMEM:
		return MCR_DROP_FILL_RING_EMPTY;
	case ENXIO: /* the socket has just been closed */
		return MCR_DROP_NO_WORKER;
	default:
		return MCR_DROP_REDIRECT_FAILED;
	}
}

static __always_inline u32 device_reason(int error)
{
	switch (-error) {
	case 0:
		return MCR_OUTPUT_DROP_DEVICE_FULL;
	case ENETDOWN:
	case ENXIO:	 /* the peer of a veth is down */
	case EINVAL:	 /* the interface is gone */
	case EOPNOTSUPP: /* it does not take redirected frames, or not yet, or no longer */
		return MCR_OUTPUT_DROP_LINK_DOWN;
	case EMSGSIZE:
		return MCR_OUTPUT_DROP_TOO_LARGE;
	default:
		return MCR_OUTPUT_DROP_SEND_ERROR;
	}
}

/* By the log that counts. */
static __always_inline u32 logged(const struct mcr_bulk *bulk, u32 index)
{
	u32 slot = index + (bulk->by_egress ? MCR_BULK_SLOTS : 0);

	return bulk->frames[mcr_bounded(slot, 2 * MCR_BULK_SLOTS - 1)];
}

/* An AF_XDP socket did not take the packet that mcr_relay has just redirected on this CPU. */
static __always_inline void count_refused(const struct in_hand *hand, int error)
{
	u32 rule_id = hand->rule_id;
	struct mcr_rule_stats *stats = rule_stats.lookup(&rule_id);

	if (!stats)
		return;
	stats->redirected_packets--;
	count_drop(stats, redirect_reason(error));
}

/* Nor did the device of a rule's one output: the packet is the last one that was logged for it. */
static __always_inline void count_undelivered(u32 index, int error)
{
	struct mcr_bulk *bulk = bulks.lookup(&index);
	u32 last, frame;

	if (!bulk || !bulk->begun_ns || !bulk->count)
		return;
	last = bulk->count - 1;
	frame = bulk->frames[mcr_bounded(last, MCR_BULK_SLOTS - 1)];
	drop_output(frame >> 16, device_reason(error));
	bulk->count = last;
	bulk->bytes -= frame & 0xffff;
	if (!last)
		end_bulk(bulk);
}

/* The same in generic mode, where there are no bulks. */
static __always_inline void count_undelivered_generic(const struct in_hand *hand, int error)
{
	u32 output_id = hand->output_id;
	struct mcr_output_stats *stats = output_stats.lookup(&output_id);

	if (stats)
		stats->sent_packets--;
	drop_output(output_id, device_reason(error));
}

/*
 * Raw tracepoint xdp_redirect_err, with arguments dev, program, target, error, map type, map id, index. It
 * comes on the same CPU right after the program returned. Of a failed fan-out it does not say which devices got
 * the packet: what the others miss is settled when their counters are at rest (mcr/accounting.py).
 */
int mcr_refused(struct bpf_raw_tracepoint_args *ctx)
{
	u32 map_type = ctx->args[4], zero = 0;
	struct in_hand *hand = hands.lookup(&zero);
	int error = (int)ctx->args[3];

	if (!hand || !is_our_program(ctx->args[1]))
		return 0;
	if (map_type == BPF_MAP_TYPE_XSKMAP)
		count_refused(hand, error);
	else if (map_type == BPF_MAP_TYPE_DEVMAP && ctx->args[6])
		count_undelivered((u32)ctx->args[6], error); /* the index of a fan-out is 0 */
	else if (map_type == BPF_MAP_TYPE_UNSPEC)
		count_undelivered_generic(hand, error);
	return 0;
}

static __always_inline void add_sent(u32 output_id, u32 packets, u32 bytes)
{
	struct mcr_output_stats *stats = output_stats.lookup(&output_id);

	if (!stats)
		return;
	stats->sent_packets += packets;
	stats->sent_bytes += bytes;
}

/* Frame by frame: of the first `count` frames the device took `sent`. */
static __always_inline void count_each(const struct mcr_bulk *bulk, u32 count, u32 sent, u32 reason)
{
	for (u32 i = 0; i < MCR_BULK_FRAMES; i++) {
		u32 frame = logged(bulk, i);

		mcr_opaque(i);
		if (i >= count)
			break;
		if (i < sent)
			add_sent(frame >> 16, 1, frame & 0xffff);
		else
			drop_output(frame >> 16, reason);
	}
}

/* Usually the device takes all of a bulk, and all of it is of one output. bytes: of the first `count` frames. */
static __always_inline void count_flushed(const struct mcr_bulk *bulk, u32 count, u32 bytes, u32 sent,
					  u32 reason)
{
	if (sent >= count && bulk->mixed <= 0xffff)
		add_sent(logged(bulk, 0) >> 16, count, bytes);
	else
		count_each(bulk, count, sent, reason);
}

/*
 * A bulk that is flushed because it is full leaves the frame in hand, which is logged already and will be the first of
 * the next bulk. Zero: there is none.
 */
static __always_inline u32 frame_in_hand(const struct mcr_bulk *bulk, u32 handed)
{
	u32 flushed = bulk->by_egress ? bulk->seen : handed, count = bulk->count;

	if (count <= flushed || count > MCR_BULK_FRAMES + 1)
		return 0;
	return bulk->frames[mcr_bounded(count - 1, MCR_BULK_SLOTS - 1)];
}

/*
 * The kernel's own word on what became of a bulk of redirected frames: raw tracepoint xdp_devmap_xmit, with
 * arguments from_dev, to_dev, sent, drops, err. What a device does not take are the last frames; drops also
 * counts what mcr_egress dropped. Only our own frames of this CPU and poll are logged, so that another namespace's
 * device of the same number finds an empty log.
 */
int mcr_devmap_xmit(struct bpf_raw_tracepoint_args *ctx)
{
	u32 sent = (u32)ctx->args[2], handed = sent + (u32)ctx->args[3];
	u32 ifindex = 0, zero = 0, in_hand, index = 0, count, bytes;
	u32 reason = device_reason((int)ctx->args[4]);
	struct in_hand *hand = hands.lookup(&zero);
	struct mcr_egress_device *device;
	struct mcr_bulk *bulk;

	if (!hand || !hand->open)
		return 0; /* somebody else's redirect */
	if (bpf_probe_read_kernel(&ifindex, sizeof(ifindex), (void *)(ctx->args[1] + MCR_DEVICE_IFINDEX)))
		return 0;
	bulk = find_bulk(ifindex, &index);
	if (!bulk || !bulk->begun_ns)
		return 0;
	in_hand = frame_in_hand(bulk, handed);
	count = bulk->by_egress ? bulk->passed : bulk->count - (in_hand ? 1 : 0);
	bytes = bulk->by_egress ? bulk->bytes : bulk->bytes - (in_hand & 0xffff);
	count_flushed(bulk, count, bytes, sent, reason);
	if (count > sent) {
		device = egress_devices.lookup(&ifindex);
		if (device)
			__sync_fetch_and_add(&device->lost, count - sent);
	}
	if (!in_hand) {
		end_bulk(bulk);
		return 0;
	}
	empty_bulk(bulk);
	bulk->frames[0] = in_hand;
	bulk->count = 1;
	bulk->bytes = in_hand & 0xffff;
	return 0;
}

/* --- the way in */

static __always_inline void name_datagram(struct mcr_fragment_key *key, const struct mcr_packet *packet)
{
	key->ifindex = packet->key.ifindex;
	key->vlan = packet->key.vlan;
	key->vlan_outer = packet->key.vlan_outer;
	key->identification = packet->identification;
	__builtin_memcpy(key->saddr, packet->key.saddr, 16);
	__builtin_memcpy(key->daddr, packet->key.daddr, 16);
}

/* Identifications come again: what an earlier datagram of a rule left must not claim those of another port. */
static __always_inline void forget_fragments(const struct mcr_packet *packet)
{
	struct mcr_fragment_key key = {};

	name_datagram(&key, packet);
	fragments.delete(&key);
}

/* Only the first fragment of a datagram names its port: later ones find it by the datagram's own name. */
static __always_inline int follow_fragments(struct mcr_packet *packet, bool later)
{
	struct mcr_fragment_key key = {};
	u16 *dport;

	name_datagram(&key, packet);
	if (!later) {
		fragments.update(&key, &packet->key.dport);
		return 0;
	}
	dport = fragments.lookup(&key);
	if (!dport)
		return -1;
	packet->key.dport = *dport;
	return 0;
}

/*
 * The data that is mapped is usually the whole frame. Only a packet that seems cut off is worth asking for the
 * length of all the frame's buffers.
 */
static __always_inline int parse_frame(struct xdp_md *ctx, struct mcr_packet *packet)
{
	void *data = (void *)(long)ctx->data, *data_end = (void *)(long)ctx->data_end;
	int parsed = mcr_parse(data, data_end, MCR_ANY_LENGTH, 0, packet);
	u32 ip_end = packet->ip_offset + packet->ip_length;

	if (parsed != MCR_PARSED_OTHER && ip_end > data_end - data && ip_end > bpf_xdp_get_buff_len(ctx)) {
		packet->drop_reason = MCR_DROP_TRUNCATED;
		packet->payload_length = 0;
	}
	return parsed;
}

/* A driver without metadata says so with each packet, by a data_meta behind data. */
static __always_inline void note_metadata(struct xdp_md *ctx)
{
	u32 ifindex = ctx->ingress_ifindex;

	if ((long)ctx->data - (long)ctx->data_meta < 0 && !no_metadata.lookup(&ifindex))
		no_metadata.update(&ifindex, &ifindex);
}

/* Whether the frame is of a stream that a rule could name. *packet is then complete but for its rule. */
static __always_inline bool identify(struct xdp_md *ctx, struct mcr_packet *packet, bool *later_fragment)
{
	int parsed = parse_frame(ctx, packet);

	note_metadata(ctx);
	if (parsed == MCR_PARSED_OTHER)
		return false; /* not UDP, or cut off before its ports: no rule can name it */
	packet->key.ifindex = ctx->ingress_ifindex;
	*later_fragment = parsed == MCR_PARSED_LATER_FRAGMENT;
	if (*later_fragment && follow_fragments(packet, true))
		return false; /* its first fragment was not ours, or is yet to come */
	return true;
}

/* From here a packet that has a rule is never passed. traced_ns: what a trace knows the packet by, or 0. */
static __always_inline int relay(struct xdp_md *ctx, struct mcr_rule_value *rule, struct mcr_packet *packet,
				 bool later_fragment, u64 traced_ns)
{
	struct mcr_metadata metadata;
	struct mcr_rule_stats *stats;
	u32 rule_id, frame_length;
	u32 xsk;

	if (!rule) {
		if (packet->drop_reason == MCR_DROP_FRAGMENT && !later_fragment)
			forget_fragments(packet);
		return XDP_PASS;
	}
	rule_id = rule->rule_id;
	stats = rule_stats.lookup(&rule_id);
	if (!stats)
		return XDP_PASS; /* never so: a rule_id is below MCR_MAX_RULES */
	stats->packets++;
	stats->bytes += packet->payload_length;
	if (packet->drop_reason == MCR_DROP_FRAGMENT && !later_fragment)
		follow_fragments(packet, false);
	if (packet->drop_reason != MCR_NO_DROP &&
	    !(packet->drop_reason == MCR_DROP_FRAGMENT && rule->flags & MCR_RULE_KERNEL))
		return drop(stats, packet->drop_reason);
	frame_length = packet->ip_offset + packet->ip_length;
	if (frame_length > rule->frame_limit)
		return drop(stats,
			    MCR_DROP_OVERSIZE); /* merged by GRO, or too long for a frame of the pool */
	if (rule->flags & MCR_RULE_KERNEL)
		return relay_in_kernel(ctx, stats, rule, packet, frame_length, later_fragment, traced_ns);
	fill_metadata(&metadata, packet, rule_id, traced_ns ? MCR_METADATA_TRACED : 0,
		      traced_ns ? traced_ns : bpf_ktime_get_ns());
	/* What follows an interface's own sockets are another's; nobody has the one that is out of bounds. */
	xsk = ctx->rx_queue_index < MCR_MAX_QUEUES ? rule->xsk_base + ctx->rx_queue_index : MCR_MAX_XSKS;
	return relay_to_worker(ctx, stats, xsk, &metadata);
}

#if !MCR_TRACED

int mcr_relay(struct xdp_md *ctx)
{
	struct mcr_packet packet;
	bool later_fragment;

	if (!identify(ctx, &packet, &later_fragment))
		return XDP_PASS;
	return relay(ctx, find_rule(ctx, &packet), &packet, later_fragment, 0);
}

/*
 * Some drivers transmit redirected frames only while they have an XDP program of their own, such as virtio_net. This is
 * the one for egress interfaces that are not attached: it leaves every packet to the stack.
 */
int mcr_pass(struct xdp_md *ctx)
{
	return XDP_PASS;
}

#else /* with a trace or capture running */

/* Zero where the addresses are equal, or the wanted one is any. Without a branch, for the verifier's sake. */
static __always_inline u32 tap_differs(const u8 address[16], const u8 wanted[16])
{
	const u32 *a = (const u32 *)address, *w = (const u32 *)wanted;
	u32 any = w[0] | w[1] | w[2] | w[3];

	return any ? (a[0] ^ w[0]) | (a[1] ^ w[1]) | (a[2] ^ w[2]) | (a[3] ^ w[3]) : 0;
}

static __always_inline bool tap_matches(const struct mcr_tap *wanted, const struct mcr_rule_key *key,
					const struct mcr_rule_value *rule)
{
	u32 differs = (key->ifindex ^ wanted->key.ifindex) | tap_differs(key->daddr, wanted->key.daddr) |
		      tap_differs(key->saddr, wanted->key.saddr);

	if (wanted->rule_id)
		return rule && rule->rule_id == wanted->rule_id;
	if (wanted->key.dport)
		differs |= key->dport ^ wanted->key.dport;
	if (wanted->key.vlan)
		differs |= key->vlan ^ wanted->key.vlan;
	if (wanted->key.vlan_outer)
		differs |= key->vlan_outer ^ wanted->key.vlan_outer;
	return !differs;
}

/*
 * The first of the two programs that take the place of mcr_relay while a trace or capture runs: it looks whether the
 * packet is wanted, and notes what it is. They are two, and parse twice, for the verifier's limits.
 */
int mcr_trace_begin(struct xdp_md *ctx)
{
	u32 zero = 0, index = TAP_PACKET, cpu = bpf_get_smp_processor_id();
	struct tap_scratch *told = tap_scratches.lookup(&index);
	struct mcr_tap *wanted = tap.lookup(&zero);
	u64 now_ns = bpf_ktime_get_ns();
	struct mcr_rule_value *rule;
	struct mcr_packet packet;
	bool later_fragment;

	if (!told || !wanted || !identify(ctx, &packet, &later_fragment))
		return XDP_PASS;
	__builtin_memset(&told->event, 0, sizeof(told->event));
	rule = find_rule(ctx, &packet);
	if (now_ns <= wanted->deadline_ns && wanted->taken < wanted->limit &&
	    tap_matches(wanted, &packet.key, rule)) {
		__sync_fetch_and_add(&wanted->taken, 1);
		told->event.time_ns = (now_ns & ~63ULL) | (cpu & 63);
		told->event.key = packet.key;
		told->event.rule_id = rule ? rule->rule_id : 0;
		told->event.queue = ctx->rx_queue_index;
		told->event.cpu = cpu;
		told->event.ttl = packet.ttl;
		told->event.tos = packet.tos;
		told->event.captured = tap_take(ctx, told, wanted->bytes_before);
	}
	traced.call(ctx, TRACED_RELAY);
	return XDP_PASS; /* never so: the two are put in place together */
}

/* The second: mcr_relay, which marks the packet if it is wanted, and tells what became of it. */
int mcr_relay_traced(struct xdp_md *ctx)
{
	u32 index = TAP_PACKET, reason;
	struct tap_scratch *told = tap_scratches.lookup(&index);
	struct mcr_rule_value *rule;
	struct mcr_packet packet;
	bool later_fragment;
	int verdict;

	if (!told || !identify(ctx, &packet, &later_fragment))
		return XDP_PASS;
	rule = find_rule(ctx, &packet);
	verdict = relay(ctx, rule, &packet, later_fragment, told->event.time_ns);
	if (!told->event.time_ns)
		return verdict & VERDICT_ACTION;
	told->event.done_ns = bpf_ktime_get_ns();
	reason = verdict >> VERDICT_REASON;
	told->event.reason = reason ? reason - 1 : 0;
	if (reason)
		told->event.verdict = MCR_TAP_DROPPED;
	else if (rule && verdict != XDP_PASS)
		told->event.verdict = rule->flags & MCR_RULE_KERNEL ? MCR_TAP_RELAYED : MCR_TAP_TO_WORKER;
	tap_tell(told, told->event.captured);
	return verdict & VERDICT_ACTION;
}

#endif
