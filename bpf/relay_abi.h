/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/*
 * The one copy of every struct and limit that the XDP program, the worker's C core and Python share.
 *
 * Python reads this file through cffi, which knows no preprocessor: constants are enums, and a line
 * that starts with '#' or with _Static_assert is invisible to it. Addresses are 16 bytes, IPv4 as
 * v4-mapped IPv6 (RFC 4291 section 2.5.5.2). Ports are in host byte order unless a name says otherwise.
 * MCR_ABI_VERSION is a hash over all of this and the maps of relay_kern.c, made by the build (mcr/abi.py): pinned
 * state and workers of another version are refused, never guessed at.
 */
#ifndef MCR_RELAY_ABI_H
#define MCR_RELAY_ABI_H

#include <linux/types.h>

enum mcr_limit {
	MCR_MAX_RULES = 4096,	  /* rule_id 1 .. MCR_MAX_RULES - 1; 0 means none */
	MCR_MAX_RULE_KEYS = 8192, /* while rules change, those of before and those of after */
	MCR_MAX_OUTPUTS = 8192,	  /* output_id 1 .. MCR_MAX_OUTPUTS - 1; 0 means none */
	MCR_MAX_OUTPUTS_PER_RULE = 64,
	MCR_MAX_INTERFACES = 64,    /* attached interfaces of one instance */
	MCR_MAX_WORKERS = 64,	    /* worker slots of one instance, whatever their interfaces */
	MCR_MAX_EGRESS_THREADS = 8, /* of one worker */
	MCR_MAX_QUEUES = 64,	    /* receive queues that one worker can drain */
	MCR_MAX_XSKS = 4096,	    /* AF_XDP sockets of one instance: every queue of every interface */
	MCR_PACKET_FRAME = 17 *
			   4096, /* bytes, of AF_PACKET: for the largest IP packet, and what comes with it */
	MCR_MAX_FRAGMENTED = 16384, /* datagrams whose later fragments are awaited */
	MCR_MAX_EGRESS = 1024,	    /* egress interfaces of the kernel path, less one: bulk 0 means none */
	MCR_MAX_FAN_OUTS = 8192,    /* one for each rule, and while rules change the one of before */
	MCR_FAN_OUT_SLOTS = 128,    /* of its outputs: a power of two, and no more than half of them used */
	MCR_BULK_FRAMES = 16,	    /* DEV_MAP_BULK_SIZE of the kernel's devmap.c */
	MCR_BULK_SLOTS = 32,	    /* a power of two above it */
	MCR_LATENCY_FIRST_BITS = 9, /* latency below 2^9 ns is not told apart */
	MCR_LATENCY_STEP_BITS = 3,  /* 2^3 buckets for each octave */
	MCR_LATENCY_BUCKETS = 185,  /* 1 + 23 octaves: up to 4.3 s */
	MCR_MAX_VLAN_TAGS = 2,
	MCR_TAP_RING_PAGES = 512,   /* of the events of a trace or capture, for each instance */
	MCR_TAP_BYTES = 9216,	    /* of one packet that a capture can take: beyond every jumbo frame */
	MCR_TAP_REPORTS = 4096,	    /* of workers, that the supervisor has not read yet */
	MCR_TAP_WORKER_CPU = 65535, /* in an event: a worker tells it, not a BPF program */
	MCR_MAX_IPV6_EXTENSIONS = 6,
};

/* Why a packet that matched a rule was not relayed. Every lost packet has exactly one reason. */
enum mcr_drop_reason {
	MCR_DROP_FRAGMENT = 0,	   /* an IP fragment: a datagram's ports are only in its first one */
	MCR_DROP_TRUNCATED = 1,	   /* the IP packet is longer than the frame that carried it */
	MCR_DROP_BAD_LENGTH = 2,   /* the UDP length contradicts the IP length */
	MCR_DROP_OVERSIZE = 3,	   /* larger than the interface MTU or a frame of the pool */
	MCR_DROP_NO_WORKER = 4,	   /* no AF_XDP socket serves the receive queue */
	MCR_DROP_NO_METADATA = 5,  /* the driver left no room for metadata */
	MCR_DROP_UNKNOWN_RULE = 6, /* the worker no longer knows the rule */
	MCR_DROP_NO_OUTPUT = 7,	   /* every output is absent or not in place yet */
	MCR_DROP_BAD_CHECKSUM =
		8, /* of the IPv4 header; of UDP, where it is verified or cannot be completed */
	/* The four below happen between the XDP program and the worker's batch, or in a worker's hands. */
	MCR_DROP_RECEIVE_RING_FULL = 9, /* AF_XDP: the worker was behind */
	MCR_DROP_FILL_RING_EMPTY = 10,	/* AF_XDP: no frame was free */
	MCR_DROP_REDIRECT_FAILED = 11,	/* the kernel refused the redirect for another reason */
	MCR_DROP_WORKER_DIED = 12,	/* it was in the hands of a worker that was killed or failed */
	MCR_DROP_TTL_EXPIRED = 13,	/* it arrived with TTL 0 */
	MCR_DROP_REASONS = 14,
};

/* Why a relayed packet was not sent by one output. */
enum mcr_output_drop_reason {
	MCR_OUTPUT_DROP_SOCKET_FULL = 0, /* the socket's send buffer is full (EAGAIN, ENOBUFS) */
	MCR_OUTPUT_DROP_UNREACHABLE = 1, /* no route, host or network (ENETUNREACH, EHOSTUNREACH) */
	MCR_OUTPUT_DROP_LINK_DOWN = 2,	 /* the egress interface is down or gone (ENETDOWN, ENODEV) */
	MCR_OUTPUT_DROP_TTL_EXPIRED = 3, /* ttl=decrement reached zero */
	MCR_OUTPUT_DROP_TOO_LARGE = 4,	 /* the datagram does not fit, even in fragments (EMSGSIZE) */
	MCR_OUTPUT_DROP_DENIED = 5,	 /* the firewall or a policy refused it (EPERM, EACCES) */
	MCR_OUTPUT_DROP_SEND_ERROR = 6,	 /* any other error of the send */
	MCR_OUTPUT_DROP_PIPE_FULL = 7,	 /* the pipe to the output's egress thread was full */
	MCR_OUTPUT_DROP_WORKER_DIED = 8, /* the send had not completed when the worker died */
	MCR_OUTPUT_DROP_DEVICE_FULL = 9, /* kernel path: the egress device took no more frames */
	MCR_OUTPUT_DROP_REASONS = 10,
};

/* The settings word lets the usual packet skip the rule lookups that no rule needs. */
enum mcr_setting {
	MCR_HAS_SOURCE_PORT = 1, /* some rule has a source and a port */
	MCR_HAS_ANY_PORT = 2,	 /* some rule has a port and any source */
	MCR_HAS_SOURCE_STAR = 4, /* some rule has a source and any port */
	MCR_HAS_ANY_STAR = 8,	 /* some rule has any source and any port */
	MCR_TRACING = 16,	 /* a trace or a capture is running */
};

struct mcr_settings {
	__u32 abi_version;
	__u32 lookups;	  /* enum mcr_setting */
	__u32 program_id; /* of mcr_relay: a tracepoint tells of every program's redirects */
	__u32 reserved;
};

/* The key of an input stream. Zero means: no tag, any port, any source. */
struct mcr_rule_key {
	__u32 ifindex;
	__u16 vlan;	  /* the tag next to the IP header */
	__u16 vlan_outer; /* the 802.1ad tag around it */
	__u16 dport;
	__u16 reserved;
	__u8 daddr[16];
	__u8 saddr[16];
};

/* How a rule's packets travel. */
enum mcr_rule_flag {
	MCR_RULE_KERNEL = 1,  /* the kernel path; else the worker path */
	MCR_RULE_GENERIC = 2, /* the program runs in generic mode, where checksums may be partial */
};

struct mcr_rule_value {
	__u32 rule_id;
	__u32 xsk_base;	    /* worker path: the AF_XDP socket is xsk_base + receive queue */
	__u32 frame_limit;  /* the longest frame, in bytes from the Ethernet header, to take */
	__u32 flags;	    /* enum mcr_rule_flag */
	__u32 output_id;    /* kernel path: the only output, or 0 where there are several */
	__u32 smallest_mtu; /* kernel path: of all the outputs' interfaces, bytes */
	__u32 partial_seen; /* written by XDP: a sender on this host leaves checksums to the device */
	__u32 fan_out;	    /* kernel path: the several outputs */
	__u32 device_set;   /* kernel path: the device map that leads to all of them */
};

/* What the kernel path makes of a packet for one output; the index is the output_id. */
struct mcr_kernel_output {
	__u32 ifindex; /* of the egress interface, 0 where there is no such output */
	__u32 mtu;     /* of the egress interface, bytes */
	__u32 bulk;    /* of the egress interface, as in mcr_egress_device */
	__u16 flags;   /* enum mcr_output_flag */
	__u16 dport;
	__u16 vlan; /* the tag to push, or 0 */
	__u8 ttl;
	__u8 dscp;
	__u8 mac_destination[6];
	__u8 mac_source[6];
	__u8 saddr[16];
	__u8 daddr[16];
};

/*
 * The outputs that a rule sends to by one device map, each by another interface. An output is in the first slot from
 * ifindex modulo MCR_FAN_OUT_SLOTS on that was free, since a devmap program is told only the interface. A fan-out
 * never changes: a rule whose outputs change gets another one, so that what was relayed by each is counted by itself.
 */
struct mcr_fan_out {
	__u32 output_ids[MCR_FAN_OUT_SLOTS]; /* 0: none */
};

/* A fragmented datagram (RFC 791, RFC 8200 section 4.5). The value is its destination port. */
struct mcr_fragment_key {
	__u32 ifindex;
	__u16 vlan;
	__u16 vlan_outer;
	__u32 identification;
	__u8 saddr[16];
	__u8 daddr[16];
};

/* An egress interface of the kernel path; the key is its ifindex. */
struct mcr_egress_device {
	__u64 lost; /* frames that the device did not take, each in its output's drops too */
	__u32 bulk; /* the index in `bulks`, from 1 */
	__u32 reserved;
};

/*
 * The frames on their way to one device on one CPU, in order, until the kernel tells what became of them. Those that
 * are rewritten before the redirect are logged there: at most one more than a bulk, the frame in hand, whose coming
 * makes the kernel flush the full bulk. Clones are rewritten, and logged, by mcr_egress in the flush, which then logs
 * the others again, for the order: from slot MCR_BULK_SLOTS on.
 */
struct mcr_bulk {
	__u64 begun_ns;	 /* CLOCK_MONOTONIC to a tick, when the first of them came; 0: there are none */
	__u32 ifindex;	 /* of the device */
	__u32 count;	 /* of those logged before the redirect */
	__u32 seen;	 /* of these, by mcr_egress */
	__u32 passed;	 /* of those logged by mcr_egress */
	__u32 by_egress; /* 1: mcr_egress runs on them, and its log counts */
	__u32 bytes;	 /* of payload of all of them in the log that counts */
	__u32 mixed;	 /* what their entries differ in from the first one */
	__u32 reserved;
	__u32 frames[2 * MCR_BULK_SLOTS]; /* output_id << 16 | payload length */
};

enum mcr_metadata_flag {
	MCR_METADATA_LATER_FRAGMENT = 1, /* no UDP header follows the IP header */
	MCR_METADATA_PARTIAL = 2,	 /* the UDP checksum is only the pseudo header's sum */
	MCR_METADATA_TRACED = 4,	 /* whoever handles the packet tells what becomes of it */
};

/*
 * Written by XDP in front of the frame; the worker, and the egress program, read it and not the headers. For the worker
 * it is the first bytes of what AF_XDP receives, for the egress program it is XDP's own kind of metadata.
 */
struct mcr_metadata {
	union {
		__u64 rx_time_ns; /* worker path: CLOCK_MONOTONIC at the XDP hook */
		__u64 fan_out;	  /* kernel path */
	};
	__u32 rule_id;
	__u16 payload_offset; /* from the Ethernet header */
	__u16 payload_length;
	__u16 ip_offset;
	__u16 dport;
	__u8 ttl;    /* or hop limit */
	__u8 tos;    /* or traffic class: DSCP and ECN */
	__u16 flags; /* enum mcr_metadata_flag */
};

/* Kept by XDP, one copy for each CPU. */
struct mcr_rule_stats {
	__u64 packets; /* that matched the rule; bytes counts their UDP payload */
	__u64 bytes;
	__u64 last_seen_ns;    /* CLOCK_MONOTONIC */
	__u64 relayed_packets; /* by the kernel path */
	__u64 relayed_bytes;
	__u64 redirected_packets; /* that a worker's AF_XDP socket took */
	__u64 dropped[MCR_DROP_REASONS];
};

/* Kept by the kernel path, one copy for each CPU; the index is the output_id. */
struct mcr_output_stats {
	__u64 relayed_packets; /* of a rule with this output alone; else fan_out_relayed has them */
	__u64 sent_packets;
	__u64 sent_bytes;
	__u64 dropped[MCR_OUTPUT_DROP_REASONS];
};

/* Kept by a worker; the index is the rule_id. `received` is the AF_PACKET ingress's own count,
 * which has no XDP program to count for it. */
struct mcr_rule_counters {
	__u64 received_packets;
	__u64 received_bytes;
	__u64 last_seen_ns;
	__u64 relayed_packets;
	__u64 relayed_bytes;
	__u64 dropped[MCR_DROP_REASONS];
};

/* Kept by a worker; the index is the output_id. */
struct mcr_output_counters {
	__u64 relayed_packets; /* handed to this output: sent or dropped, or still under way */
	__u64 sent_packets;
	__u64 sent_bytes;
	__u64 dropped[MCR_OUTPUT_DROP_REASONS];
	__u64 last_error; /* errno of the last failed send, 0 if none failed */
};

/*
 * The time from the XDP hook, or from the AF_PACKET receive, to the completed send, for each packet and
 * output, none left out; the index is the rule_id. Bucket 0 is below 512 ns; then every octave has 8 buckets of equal width,
 * so that none is wider than an eighth of what it stands for; the last one has no upper bound.
 */
struct mcr_latency {
	__u64 count;
	__u64 sum_ns;
	__u64 max_ns;
	__u64 buckets[MCR_LATENCY_BUCKETS];
};

/* Kept by a worker; the index is its slot. The four frame states always add up to the pool. */
struct mcr_worker_counters {
	__u64 frames_fill;
	__u64 frames_receive;
	__u64 frames_in_flight;
	__u64 frames_free;
	__u64 batches;
	__u64 packets;
	__u64 waits;		 /* times the worker slept */
	__u64 receive_ring_full; /* AF_XDP: packets lost because the worker was behind */
	__u64 fill_ring_empty;	 /* AF_XDP: packets lost because no frame was free */
	__u64 socket_dropped;	 /* AF_PACKET: packets lost before the worker saw them */
	__u64 pipe_bytes;	 /* of each pipe to an egress thread, as the kernel granted it; 0 without */
};

/* The one trace or capture that may run: which packets, how many, and what it found. */
struct mcr_tap {
	__u64 deadline_ns;  /* CLOCK_MONOTONIC; after it nothing is told, should nobody have ended it */
	__u64 limit;	    /* packets */
	__u64 taken;	    /* packets, counted by XDP; CPUs side by side may pass the limit by one each */
	__u64 lost;	    /* events that found the ring full */
	__u32 rule_id;	    /* of the packets wanted; 0 takes the key instead */
	__u32 bytes_before; /* of each packet, as it arrived, that go with its event */
	__u32 bytes_after;  /* of each packet, as an output sent it, that go with that event */
	struct mcr_rule_key key; /* zero is any, but for ifindex and daddr */
};

enum mcr_tap_verdict {
	MCR_TAP_PASSED = 0,    /* to the stack: no rule wants it */
	MCR_TAP_DROPPED = 1,   /* reason: enum mcr_drop_reason */
	MCR_TAP_TO_WORKER = 2, /* the worker's events say what became of it */
	MCR_TAP_RELAYED = 3,   /* kernel path: the outputs' events say what became of it */
	MCR_TAP_SENT = 4,      /* by an output, which is all that the two below are about */
	MCR_TAP_NOT_SENT = 5,  /* reason: enum mcr_output_drop_reason */
};

/*
 * What became of a packet, or of its copy for one output; `captured` bytes of it follow. All events of a packet
 * have its time_ns, which no two packets share: the low 6 bits of it are the CPU's number.
 */
struct mcr_tap_event {
	__u64 time_ns; /* CLOCK_MONOTONIC at the XDP hook */
	__u64 done_ns; /* CLOCK_MONOTONIC of what is told */
	struct mcr_rule_key key;
	__u32 rule_id;	 /* 0: no rule */
	__u32 output_id; /* 0: the packet itself, as it arrived */
	__u32 queue;
	__u32 cpu;
	__u32 length; /* of the frame */
	__u32 captured;
	__u32 error;	       /* errno of a send */
	__u16 segment;	       /* bytes of payload of each datagram, where the frame holds several */
	__u16 checksum_offset; /* of a UDP header whose checksum is partial, or 0 */
	__u8 verdict;	       /* enum mcr_tap_verdict */
	__u8 reason;
	__u8 ttl;
	__u8 tos;
};

/*
 * What workers tell of marked packets, in a ring of slots 1 .. MCR_TAP_REPORTS - 1. A writer takes the next number by
 * adding to slot 0's, and its slot is valid once it bears that number; nobody waits for the reader.
 */
struct mcr_tap_report {
	__u64 number; /* from 1 on; 0 while it is being written; of slot 0: the last one taken */
	__u64 wanted; /* of slot 0: set by the supervisor while a trace runs */
	struct mcr_tap_event event;
};

enum mcr_ingress {
	MCR_INGRESS_XSK = 1,
	MCR_INGRESS_PACKET = 2,
};

enum mcr_zero_copy {
	MCR_ZERO_COPY_AUTO = 0,
	MCR_ZERO_COPY_ON = 1,
	MCR_ZERO_COPY_OFF = 2,
};

/* From the supervisor to a worker, one message each. Every command is acknowledged. */
enum mcr_command_type {
	MCR_SETUP =
		1, /* first and once; descriptors: rule, output, worker counters, latency, reports [, AF_PACKET socket] */
	MCR_ADD_OUTPUT = 2, /* adds or replaces; descriptor: the UDP socket */
	MCR_DEL_OUTPUT = 3,
	MCR_SET_RULE = 4, /* adds or replaces; its outputs must be known */
	MCR_DEL_RULE = 5,
	MCR_PING = 6,	  /* refreshes the worker counters; the first one opens the AF_PACKET ingress */
	MCR_SHUTDOWN = 7, /* drains and ends; the acknowledgement is the last message */
};

struct mcr_setup {
	__u32 abi_version;
	__u32 ingress; /* enum mcr_ingress */
	__u32 ifindex;
	__u32 queue_first;
	__u32 queue_count;
	__u32 frame_count; /* a power of two */
	__u32 frame_size;  /* bytes: 2048 or 4096; MCR_PACKET_FRAME with AF_PACKET */
	__u32 zero_copy;   /* enum mcr_zero_copy */
	__u32 busy_poll;
	__u32 worker_slot;
	__u32 user_id; /* to become after set-up; 0 stays who it is */
	__u32 group_id;
	__u32 verify_checksums;			/* of UDP, where the device has not done it */
	__u32 egress_threads;			/* 0: the ingress thread sends */
	__s32 cpus[1 + MCR_MAX_EGRESS_THREADS]; /* of the ingress thread, then the egress threads; -1: any */
	char interface[16];
};

enum mcr_output_flag {
	MCR_OUTPUT_KEEP_PORT = 1,	/* destination port of the packet, not of the output */
	MCR_OUTPUT_PRESERVE_DSCP = 2,	/* DSCP of the packet, not of the output */
	MCR_OUTPUT_DECREMENT_TTL = 4,	/* TTL of the packet less one */
	MCR_OUTPUT_PRESERVE_SOURCE = 8, /* source address of the packet */
};

struct mcr_add_output {
	__u32 output_id;
	__u32 flags;  /* enum mcr_output_flag */
	__u16 family; /* AF_INET or AF_INET6 */
	__u16 dport;
	__u32 scope_id;	 /* interface index of an IPv6 link-local or multicast destination, or 0 */
	__u32 gso_limit; /* the largest payload that fits the egress MTU unfragmented, in bytes */
	__u8 dscp;	 /* already set on the socket unless MCR_OUTPUT_PRESERVE_DSCP */
	__u8 reserved[3];
	__u8 daddr[16];
};

struct mcr_set_rule {
	struct mcr_rule_key key; /* used by the AF_PACKET ingress, which finds its rules itself */
	__u32 rule_id;
	__u32 frame_limit; /* as in mcr_rule_value */
	__u32 output_count;
	__u32 output_ids[MCR_MAX_OUTPUTS_PER_RULE];
};

struct mcr_command {
	__u32 type;	/* enum mcr_command_type */
	__u32 sequence; /* comes back in the reply */
	union {
		struct mcr_setup setup;
		struct mcr_add_output output;
		struct mcr_set_rule rule;
		__u32 id; /* of MCR_DEL_OUTPUT and MCR_DEL_RULE */
	};
};

/* From a worker to the supervisor. The reply to MCR_SETUP carries the AF_XDP sockets, one descriptor
 * for each queue, for the supervisor to put into the XSKMAP once the rules are in place. */
struct mcr_reply {
	__u32 type;	   /* of the command */
	__u32 sequence;	   /* of the command */
	__s32 status;	   /* 0 or -errno */
	__u32 zero_copy;   /* of MCR_SETUP: 1 if the driver bound the sockets in zero-copy mode */
	char message[112]; /* cause of a failure, NUL-terminated */
};

_Static_assert(MCR_MAX_XSKS == MCR_MAX_INTERFACES * MCR_MAX_QUEUES, "every queue has its slot");
_Static_assert(MCR_LATENCY_BUCKETS == 1 + (32 - MCR_LATENCY_FIRST_BITS) * (1 << MCR_LATENCY_STEP_BITS),
	       "every octave has its buckets");
_Static_assert(2 * MCR_MAX_OUTPUTS_PER_RULE <= MCR_FAN_OUT_SLOTS, "struct mcr_fan_out");
_Static_assert(sizeof(struct mcr_settings) == 16, "struct mcr_settings");
_Static_assert(sizeof(struct mcr_rule_key) == 44, "struct mcr_rule_key");
_Static_assert(sizeof(struct mcr_rule_value) == 36, "struct mcr_rule_value");
_Static_assert(sizeof(struct mcr_kernel_output) == 64, "struct mcr_kernel_output");
_Static_assert(sizeof(struct mcr_fragment_key) == 44, "struct mcr_fragment_key");
_Static_assert(sizeof(struct mcr_metadata) == 24,
	       "struct mcr_metadata: at most 32 on kernel 6.1, a multiple of 4");
_Static_assert(sizeof(struct mcr_rule_stats) == 160, "struct mcr_rule_stats");
_Static_assert(sizeof(struct mcr_rule_counters) == 152, "struct mcr_rule_counters");
_Static_assert(sizeof(struct mcr_output_counters) == 112, "struct mcr_output_counters");
_Static_assert(sizeof(struct mcr_worker_counters) == 88, "struct mcr_worker_counters");
_Static_assert(sizeof(struct mcr_tap) == 88, "struct mcr_tap");
_Static_assert(sizeof(struct mcr_tap_event) == 96, "struct mcr_tap_event");
_Static_assert(sizeof(struct mcr_fan_out) == 512, "struct mcr_fan_out");
_Static_assert(sizeof(struct mcr_egress_device) == 16, "struct mcr_egress_device");
_Static_assert(sizeof(struct mcr_bulk) == 296, "struct mcr_bulk");
_Static_assert(sizeof(struct mcr_output_stats) == 104, "struct mcr_output_stats");
_Static_assert(sizeof(struct mcr_latency) == 1504, "struct mcr_latency");
_Static_assert(sizeof(struct mcr_tap_report) == 112, "struct mcr_tap_report");
_Static_assert(sizeof(struct mcr_setup) == 108, "struct mcr_setup");
_Static_assert(sizeof(struct mcr_add_output) == 40, "struct mcr_add_output");
_Static_assert(sizeof(struct mcr_set_rule) == 312, "struct mcr_set_rule");
_Static_assert(sizeof(struct mcr_command) == 320, "struct mcr_command");
_Static_assert(sizeof(struct mcr_reply) == 128, "struct mcr_reply");

#endif /* MCR_RELAY_ABI_H */
