// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * The source and the sink of the benchmark, at the XDP hook, where neither is the bottleneck.
 *
 * `generate` is run by BPF_PROG_TEST_RUN with BPF_F_TEST_XDP_LIVE_FRAMES, once for each packet: it writes the
 * whole header, since the pages come back as the relay left them, waits until the packet is due and redirects
 * it to the source's own end of a veth pair. `sink` and `stack_sink` count what arrives by stream and drop it;
 * what is not of the benchmark goes on to the stack.
 *
 * Each runs on one CPU at a time: the generator in its caller, a sink in the NAPI of its one receive queue.
 * So nothing here is atomic. Compiled by BCC, which gives Python the structs as well.
 */
#include <uapi/linux/bpf.h>

#define HEADER_BYTES 42	     /* Ethernet, IPv4 without options, UDP */
#define STAMP_BYTES 16	     /* sequence number and time, where the payload begins */
#define ETHERNET_IPV4 0x0008 /* in network byte order */
#define IPV4_WITHOUT_OPTIONS 0x45
#define PROTOCOL_UDP 17
#define OFFSET_GROUP_MAC 3 /* of the 23 bits that RFC 1112 section 6.4 takes from the group */
#define OFFSET_ETHERTYPE 12
#define OFFSET_IP 14
#define OFFSET_PROTOCOL 23
#define OFFSET_CHECKSUM 24
#define OFFSET_GROUP 30
#define OFFSET_PORT 36

#define TCX_NEXT -1 /* linux/bpf.h from 6.6 on */
#define TCX_DROP 2
#define MAX_INPUTS 8	    /* interfaces that the source sends from at once */
#define MAX_INTERFACES 1024 /* interface indices of one namespace */
#define MAX_STREAMS 65536   /* streams times interfaces of one benchmark */
#define LATENCY_STEP_BITS 4 /* 16 buckets of equal width for each octave of nanoseconds */
#define LATENCY_BUCKETS 1024
#define DUE_SHIFT 8    /* due times are kept in 1/256 ns */
#define MAX_SPINS 8192 /* some 200 us: below 5,000 packets/s the pace is not kept */
#define MAX_BEHIND_NS                                                                                        \
	20000	       /* a later packet moves the schedule: what was missed is not caught up in a burst */
#define TRIAL_SHIFT 40 /* sequence numbers begin with the number of the trial */
#define CLOCK_EVERY 64 /* packets, where there is no pace to keep */
#define SINK_CLOCK_EVERY 16

struct generator {
	u64 count; /* packets to send; those after them are dropped */
	u64 sent;
	u64 sequence; /* of the current round of the streams */
	u64 interval; /* between packets, in 1/256 ns; 0 is flat out */
	u64 due;      /* of the next packet, in 1/256 ns of CLOCK_MONOTONIC */
	u64 first_ns;
	u64 last_ns;
	u64 waited_ns;		   /* for due times: CPU time that no packet cost */
	u64 header[6];		   /* HEADER_BYTES of it, for the first stream */
	u32 checksum_base;	   /* sum of the IP header's words without checksum and destination */
	u32 group;		   /* of the first stream, in host byte order */
	u32 ifindexes[MAX_INPUTS]; /* to send from: stream n by number n modulo inputs */
	u32 inputs;
	u32 input; /* of the next packet */
	u32 streams;
	u32 stream;   /* of the next packet */
	u16 port;     /* of the first stream, in host byte order */
	u16 by_group; /* streams differ in group, else in port */
};

/* What to expect on an interface, and what came; streams == 0 is nothing. */
struct sink {
	u32 group;
	u32 streams;
	u32 first_arrival; /* index of the first stream's order */
	u16 port;
	u16 by_group;
	u64 timed; /* the time and the latency of each packet */
	u64 packets;
	u64 first_ns;
	u64 last_ns; /* of every SINK_CLOCK_EVERY-th packet unless timed */
};

/* next_sequence begins with the number of the trial: what comes late from an earlier one is not counted. */
struct order {
	u64 next_sequence;
	u64 missing; /* sequence numbers that were jumped over; `late` fills some of them */
	u64 late;    /* out of order, or twice */
};

BPF_TABLE("array", u32, struct generator, generators, 1);
BPF_TABLE("array", u32, u32, stopped, 1); /* 1: a paced generator sends no more */
BPF_TABLE("array", u32, struct sink, sinks, MAX_INTERFACES);
BPF_TABLE("array", u32, struct order, orders, MAX_STREAMS);
BPF_TABLE("percpu_array", u32, u64, latencies, LATENCY_BUCKETS);
BPF_TABLE("percpu_array", u32, u64, longest_ns, 1);

static __always_inline u16 swap16(u16 value)
{
	return __builtin_bswap16(value);
}

static __always_inline void keep_pace(struct generator *generator)
{
	u64 due_ns = generator->due >> DUE_SHIFT;
	u64 now_ns = bpf_ktime_get_ns();
	int spin;

	if (!generator->sent) {
		generator->first_ns = now_ns;
		generator->due = now_ns << DUE_SHIFT;
	} else if (now_ns > due_ns + MAX_BEHIND_NS) {
		generator->due = now_ns << DUE_SHIFT;
	} else if (now_ns < due_ns) {
		generator->waited_ns -= now_ns;
#pragma clang loop unroll(disable)
		for (spin = 0; spin < MAX_SPINS && now_ns < due_ns; spin++)
			now_ns = bpf_ktime_get_ns();
		generator->waited_ns += now_ns;
	}
	generator->due += generator->interval;
	generator->last_ns = now_ns;
}

static __always_inline void look_at_clock(struct generator *generator)
{
	if (!generator->sent)
		generator->first_ns = bpf_ktime_get_ns();
	if (generator->sent % CLOCK_EVERY == 0 || generator->sent + 1 == generator->count)
		generator->last_ns = bpf_ktime_get_ns();
}

/* Patches the destination group, and with it the MAC address and the IP checksum. */
static __always_inline void write_group(void *frame, const struct generator *generator, u32 group)
{
	u32 sum = generator->checksum_base + (group >> 16) + (group & 0xffff);

	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	*(u8 *)(frame + OFFSET_GROUP_MAC) = group >> 16 & 0x7f;
	*(u16 *)(frame + OFFSET_GROUP_MAC + 1) = swap16(group);
	*(u16 *)(frame + OFFSET_CHECKSUM) = swap16(~sum);
	*(u32 *)(frame + OFFSET_GROUP) = __builtin_bswap32(group);
}

static __always_inline void write_frame(void *frame, const struct generator *generator)
{
	u64 *words = frame;

	words[0] = generator->header[0];
	words[1] = generator->header[1];
	words[2] = generator->header[2];
	words[3] = generator->header[3];
	words[4] = generator->header[4];
	*(u16 *)(frame + 40) = (u16)generator->header[5];
	if (generator->by_group)
		write_group(frame, generator, generator->group + generator->stream);
	else
		*(u16 *)(frame + OFFSET_PORT) = swap16(generator->port + generator->stream);
	*(u64 *)(frame + HEADER_BYTES) = generator->sequence;
	*(u64 *)(frame + HEADER_BYTES + 8) = generator->last_ns;
}

static __always_inline void next_stream(struct generator *generator)
{
	generator->sent++;
	generator->stream++;
	generator->input++;
	if (generator->input >= generator->inputs)
		generator->input = 0;
	if (generator->stream >= generator->streams) {
		generator->stream = 0;
		generator->input = 0;
		generator->sequence++;
	}
}

int generate(struct xdp_md *ctx)
{
	void *frame = (void *)(long)ctx->data;
	struct generator *generator;
	u32 zero = 0, ifindex, *stop;

	generator = generators.lookup(&zero);
	stop = stopped.lookup(&zero);
	if (!generator || !stop || frame + HEADER_BYTES + STAMP_BYTES > (void *)(long)ctx->data_end)
		return XDP_ABORTED;
	if (generator->sent >= generator->count || *stop)
		return XDP_DROP;
	if (generator->interval)
		keep_pace(generator);
	else
		look_at_clock(generator);
	write_frame(frame, generator);
	ifindex = generator->ifindexes[generator->input & (MAX_INPUTS - 1)];
	next_stream(generator);
	return bpf_redirect(ifindex, 0);
}

/* The number of the packet's stream among those expected, or one that is too large. */
static __always_inline u32 stream_of(void *frame, const struct sink *expected)
{
	u32 group = __builtin_bswap32(*(u32 *)(frame + OFFSET_GROUP));
	u16 port = swap16(*(u16 *)(frame + OFFSET_PORT));

	if (expected->by_group)
		return port == expected->port ? group - expected->group : ~0U;
	return group == expected->group ? (u32)port - expected->port : ~0U;
}

static __always_inline u32 log2_of(u64 value)
{
	u32 bits = 0;

	if (value >> 32) {
		value >>= 32;
		bits += 32;
	}
	if (value >> 16) {
		value >>= 16;
		bits += 16;
	}
	if (value >> 8) {
		value >>= 8;
		bits += 8;
	}
	if (value >> 4) {
		value >>= 4;
		bits += 4;
	}
	if (value >> 2) {
		value >>= 2;
		bits += 2;
	}
	return bits + (value >> 1);
}

/* Below 2^LATENCY_STEP_BITS ns a bucket is one nanosecond. */
static __always_inline void count_latency(u64 took_ns)
{
	u32 octave = log2_of(took_ns | 1), bucket = took_ns, zero = 0;
	u64 *counter;

	if (octave >= LATENCY_STEP_BITS)
		bucket = ((octave - LATENCY_STEP_BITS) << LATENCY_STEP_BITS) +
			 (took_ns >> (octave - LATENCY_STEP_BITS));
	counter = latencies.lookup(&bucket);
	if (counter)
		(*counter)++;
	counter = longest_ns.lookup(&zero);
	if (counter && took_ns > *counter)
		*counter = took_ns;
}

static __always_inline void count(struct sink *sink, struct order *order, const u64 *stamp)
{
	u64 sequence = stamp[0];

	if (sequence >> TRIAL_SHIFT != order->next_sequence >> TRIAL_SHIFT)
		return;
	if (sink->timed || sink->packets % SINK_CLOCK_EVERY == 0)
		sink->last_ns = bpf_ktime_get_ns();
	if (sink->timed)
		count_latency(sink->last_ns - stamp[1]);
	if (!sink->packets)
		sink->first_ns = sink->last_ns;
	sink->packets++;
	if (sequence < order->next_sequence) {
		order->late++;
		return;
	}
	order->missing += sequence - order->next_sequence;
	order->next_sequence = sequence + 1;
}

/* Counts a packet if it is of the benchmark; 0 if it is not. */
static __always_inline int take(void *frame, void *end, u32 ifindex)
{
	struct sink *expected;
	struct order *order;
	u32 stream, index;

	expected = sinks.lookup(&ifindex);
	if (!expected || frame + HEADER_BYTES + STAMP_BYTES > end)
		return 0;
	if (*(u16 *)(frame + OFFSET_ETHERTYPE) != ETHERNET_IPV4 ||
	    *(u8 *)(frame + OFFSET_IP) != IPV4_WITHOUT_OPTIONS ||
	    *(u8 *)(frame + OFFSET_PROTOCOL) != PROTOCOL_UDP)
		return 0;
	stream = stream_of(frame, expected);
	if (stream >= expected->streams)
		return 0;
	index = expected->first_arrival + stream;
	order = orders.lookup(&index);
	if (!order)
		return 0; /* never so: the benchmark hands out indices below MAX_STREAMS */
	count(expected, order, frame + HEADER_BYTES);
	return 1;
}

int sink(struct xdp_md *ctx)
{
	int taken = take((void *)(long)ctx->data, (void *)(long)ctx->data_end, ctx->ingress_ifindex);

	return taken ? XDP_DROP : XDP_PASS;
}

/*
 * At the stack's ingress, for relays that send packets of the stack's own kind: on a veth, XDP would copy each
 * of those first, on the relay's CPU. Their payload may lie outside the linear part.
 */
int stack_sink(struct __sk_buff *skb)
{
	/* The verifier wants the stamp aligned. */
	struct {
		u8 unused[6];
		u8 frame[HEADER_BYTES + STAMP_BYTES];
	} copy __attribute__((aligned(8)));

	if (bpf_skb_load_bytes(skb, 0, copy.frame, sizeof(copy.frame)))
		return TCX_NEXT;
	return take(copy.frame, copy.frame + sizeof(copy.frame), skb->ifindex) ? TCX_DROP : TCX_NEXT;
}
