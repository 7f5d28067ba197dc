// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * Every map and every BPF program of MCR. A packet's way through this file is its order: parse, find
 * the rule, check, leave metadata for the worker, redirect to the AF_XDP socket of the receive queue.
 *
 * A packet that no rule wants is passed to the stack, byte for byte untouched. A packet that a rule
 * wants is never passed: it is redirected, or dropped and counted with exactly one reason.
 *
 * Compiled by BCC, which rewrites map.lookup() and the like in this file only.
 */
#include <uapi/linux/bpf.h>
#include "relay_abi.h"
#include "relay_parse.h"

/* What to relay: an input stream and its rule. */
BPF_TABLE("hash", struct mcr_rule_key, struct mcr_rule_value, rules, MCR_MAX_RULES);
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

/* Lookups that no rule needs are skipped: the usual packet costs one. */
static __always_inline struct mcr_rule_value *find_rule(const struct mcr_packet *packet)
{
	struct mcr_rule_value *rule = NULL;
	struct mcr_settings *wanted;
	struct mcr_rule_key key;
	u32 zero = 0;

	wanted = settings.lookup(&zero);
	if (!wanted)
		return NULL;
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

static __always_inline int drop(struct mcr_rule_stats *stats, u32 reason)
{
	if (reason < MCR_DROP_REASONS)
		stats->dropped[reason]++;
	return XDP_DROP;
}

/* bpf_xdp_adjust_meta invalidates every packet pointer; none is used after it but the new ones. */
static __always_inline int leave_metadata(struct xdp_md *ctx, const struct mcr_packet *packet, u32 rule_id,
					  u64 now_ns)
{
	struct mcr_metadata *metadata;
	int before = (long)ctx->data - (long)ctx->data_meta; /* left by an XDP program of another device */

	if (bpf_xdp_adjust_meta(ctx, before - (int)sizeof(*metadata)))
		return -1;
	metadata = (void *)(long)ctx->data_meta;
	if ((void *)(metadata + 1) > (void *)(long)ctx->data)
		return -1;
	metadata->rx_time_ns = now_ns;
	metadata->rule_id = rule_id;
	metadata->payload_offset = packet->payload_offset;
	metadata->payload_length = packet->payload_length;
	metadata->ip_offset = packet->ip_offset;
	metadata->dport = packet->key.dport;
	metadata->ttl = packet->ttl;
	metadata->tos = packet->tos;
	metadata->reserved = 0;
	return 0;
}

int mcr_relay(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data;
	void *data_end = (void *)(long)ctx->data_end;
	u32 frame_length = bpf_xdp_get_buff_len(ctx);
	struct mcr_rule_stats *stats;
	struct mcr_rule_value *rule;
	struct mcr_packet packet;
	u32 rule_id, xsk;
	int action;

	if (!mcr_parse(data, data_end, frame_length, 0, &packet))
		return XDP_PASS; /* not UDP, or cut off before its ports: no rule can name it */
	packet.key.ifindex = ctx->ingress_ifindex;
	rule = find_rule(&packet);
	if (!rule)
		return XDP_PASS;
	rule_id = rule->rule_id;
	stats = rule_stats.lookup(&rule_id);
	if (!stats)
		return XDP_PASS; /* never so: a rule_id is below MCR_MAX_RULES */
	stats->packets++;
	stats->bytes += packet.payload_length;
	stats->last_seen_ns = bpf_ktime_get_ns();
	if (packet.drop_reason != MCR_NO_DROP)
		return drop(stats, packet.drop_reason);
	if (frame_length > rule->frame_limit)
		return drop(stats,
			    MCR_DROP_OVERSIZE); /* merged by GRO, or too long for a frame of the pool */
	xsk = rule->xsk_base + ctx->rx_queue_index;
	if (leave_metadata(ctx, &packet, rule_id, stats->last_seen_ns))
		return drop(stats, MCR_DROP_NO_METADATA);
	action = xsks.redirect_map(xsk, XDP_DROP); /* XDP_DROP comes back when the map has no socket there */
	if (action != XDP_REDIRECT)
		return drop(stats, MCR_DROP_NO_WORKER);
	return action;
}
