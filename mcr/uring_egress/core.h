/* SPDX-License-Identifier: MIT */
/*
 * The worker's C core, inside. A packet's way: an ingress back end (ingress_xsk.c, ingress_packet.c) puts
 * packets into the batch; egress.c sorts the batch by rule, cuts it into runs, sends each run to every output
 * and gives the frames back when the last send of their run has completed. worker.c is the loop round it.
 *
 * With egress threads the batch goes another way round: pipes.c writes a descriptor of each packet into the
 * pipe of every thread that has outputs of its rule; threads.c reads them there, and has an egress of its own;
 * the frames come back as numbers through one return pipe, and pipes.c counts who still has them. Commands go
 * the same way, between the packets.
 *
 * Each thread has one reactor (an io_uring), which is the only place where it waits. A thread owns its
 * structs. All that threads share is the pool, which only the kernel writes, the counters, which are added to
 * atomically, and what the set-up left and nobody changes; hence there is no lock.
 *
 * Everything is allocated by the set-up and nothing after it. Functions return 0 or -errno and leave the cause
 * in their reactor's message; an error ends the worker, because it means that something happened which cannot.
 * What can happen is counted.
 */
#ifndef MCR_CORE_H
#define MCR_CORE_H

#include <liburing.h>
#include <netinet/in.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "api.h"
#include "relay_abi.h"
#include "relay_parse.h"

enum {
	/* Taken from the ingress at once: the more, the longer the runs of streams that interleave. */
	BATCH_PACKETS = 4096,
	/* Put into pipes, or taken from one, at once: what a thread holds beside its pipe is not the others' to use. */
	PIPE_PACKETS = 256,
	SUBMIT_PACKETS = 256, /* of a batch, whose sends are submitted together */
	RUN_PACKETS = 64,     /* that are put together: UDP_MAX_SEGMENTS of kernel 6.1 */
	RUN_DATAGRAMS = 128,  /* that one super-packet may hold: UDP_MAX_SEGMENTS since kernel 6.9 */
	RUN_BYTES = 65487,    /* the largest UDP payload over IPv6 without a jumbogram */
	RUN_SLOTS = 512,
	SEND_SLOTS = 1024, /* also the submission queue's size */
	COMPLETION_SLOTS = 16384,
	RULE_SLOTS = 8192, /* of the AF_PACKET ingress's own rule table: a power of two, half full at most */
	CONTROL_BYTES = 128, /* of one send: UDP_SEGMENT, TOS, TTL and PKTINFO */
	COMMAND_FDS = 6,
	CACHE_LINE_BYTES = 64,
	MESSAGE_BYTES = 128,
	GSO_RETRY_S = 10, /* after segments were refused, until they are tried again */
	NONE = UINT32_MAX,
};

/* Who owns a frame. */
enum frame_owner {
	FRAME_FREE = 0,
	FRAME_FILL,	 /* the kernel may write it, or has written it and we have not looked */
	FRAME_RECEIVE,	 /* in the batch */
	FRAME_IN_FLIGHT, /* in a run, or in the hands of egress threads */
};

/* What a completion is about: the low byte of its user_data; the rest is an index. */
enum completion_kind {
	COMPLETION_SEND = 1,
	COMPLETION_COMMAND,
	COMPLETION_POLL,    /* an AF_XDP socket has packets */
	COMPLETION_PACKET,  /* AF_PACKET: one received packet */
	COMPLETION_PIPE,    /* the ingress thread's write to an egress thread */
	COMPLETION_RETURN,  /* the ingress thread's read of the return pipe */
	COMPLETION_READ,    /* an egress thread's read of its pipe */
	COMPLETION_RETURNED /* an egress thread's write to the return pipe */
};

/* One thread's io_uring. */
struct reactor {
	struct io_uring uring;
	int (*complete)(struct reactor *reactor, enum completion_kind kind, uint32_t index, int result,
			uint32_t flags);
	uint64_t now_ns; /* when the completions were taken that are being handled; 0 before it is asked */
	char message[MESSAGE_BYTES];
};

struct packet {
	uint8_t *frame; /* the Ethernet header */
	uint64_t rx_time_ns;
	uint32_t frame_index;
	uint32_t next; /* the next packet of the same rule in this batch, or NONE */
	uint16_t rule_id;
	uint16_t segment; /* of a super-packet: payload of each of its datagrams but the last; else 0 */
	uint16_t queue;
	uint16_t payload_offset;
	uint16_t payload_length;
	uint16_t dport;
	uint8_t ip_offset;
	uint8_t ttl;
	uint8_t tos;
	bool verified; /* its UDP checksum, by the device that it came from */
};

/*
 * Datagrams of one rule with one payload size (the last may be shorter) that are sent together: those of up to
 * RUN_PACKETS packets, or of one super-packet.
 */
struct run {
	struct iovec payloads[RUN_DATAGRAMS];
	uint64_t rx_times_ns[RUN_DATAGRAMS];
	uint32_t frames[RUN_PACKETS];
	struct packet first; /* its size, TTL, TOS, port and source are those of the whole run */
	uint32_t references; /* sends that have not completed */
	uint32_t bytes;
	uint32_t next_free;
	uint16_t count; /* of datagrams */
	uint16_t frame_count;
};

struct send {
	struct msghdr message;
	union {
		char bytes[CONTROL_BYTES];
		struct cmsghdr align;
	} control;
	struct sockaddr_in6 destination; /* or sockaddr_in; used when the port is the packet's own */
	uint32_t run;
	uint32_t output_id;
	uint32_t next_free;
	uint16_t first; /* datagram of the run */
	uint16_t count; /* datagrams in this send; more than one is UDP_SEGMENT */
	uint16_t last;	/* while a run is sent one by one: the end of it */
};

struct output {
	bool known;
	uint32_t flags;	      /* enum mcr_output_flag */
	uint32_t gso_limit;   /* larger payloads go one by one, for the kernel to fragment */
	uint32_t gso_refused; /* so do those of this size or more until gso_retry_ns; 0 for none */
	uint64_t gso_retry_ns;
	socklen_t destination_length;
	union {
		struct sockaddr_in ipv4;
		struct sockaddr_in6 ipv6;
		struct sockaddr any;
	} destination;
};

struct rule {
	bool known;
	struct mcr_rule_key key;
	uint32_t frame_limit;
	uint32_t output_count;
	uint32_t output_ids[MCR_MAX_OUTPUTS_PER_RULE];
	uint32_t flags; /* of all its outputs together: what a run must have in common */
	uint32_t head;	/* of its packets in this batch */
	uint32_t tail;
};

/*
 * What one thread knows of the rules and outputs. Outputs are shared out by their id: the ones of these tables
 * are those whose id leaves `share` when divided by `shares`. The ingress thread's tables have them all.
 */
struct tables {
	struct rule *rules;
	struct output *outputs;
	uint32_t share;
	uint32_t shares;
};

struct worker;
struct returns;

/* The sending half. There is one for each egress thread, or one that belongs to the ingress thread. */
struct egress {
	struct worker *worker; /* of which an egress thread uses the pool, the set-up and the counters */
	struct reactor *reactor;
	struct tables *tables;
	struct returns *returns; /* where an egress thread puts frames; NULL: right back to the ingress */
	struct packet *batch;
	uint32_t active_rules[BATCH_PACKETS];
	struct run *runs;
	uint32_t free_run;
	struct send *sends;
	uint32_t free_send;
	uint32_t sends_in_flight;
	uint32_t prepared; /* packets whose sends have not been submitted */
};

struct ingress {
	/* Opens what it reads from. AF_XDP fills sockets[] with descriptors for the supervisor. */
	int (*open)(struct worker *worker, int *sockets, uint32_t *socket_count);
	/* Fills the batch with what has arrived. */
	int (*take)(struct worker *worker);
	/* Gives frames to the kernel to write the next packets into. */
	int (*give)(struct worker *worker, const uint32_t *frames, uint32_t count, uint16_t queue);
	/* Asks for a completion when something arrives. */
	int (*arm)(struct worker *worker);
	int (*complete)(struct worker *worker, uint32_t index, int result, uint32_t flags);
	/* Takes in nothing new; what has arrived can still be taken. */
	int (*stop)(struct worker *worker);
	/* Brings what the sockets lost, and the frames that wait in receive rings, into the counters. */
	void (*count)(struct worker *worker);
};

extern const struct ingress ingress_xsk;
extern const struct ingress ingress_packet;

struct xsk_state;
struct packet_state;
struct pipes;
struct egress_thread;

/* The ingress thread, and what all threads share. */
struct worker {
	struct reactor reactor;
	struct mcr_setup setup;
	int command_fd;
	bool stopping;
	bool started;	    /* the first PING has come: every rule is known */
	bool command_ready; /* handled between batches: a batch must see one set of rules */
	int command_result;
	bool dying; /* somebody is saying the last words; atomic */

	uint8_t *pool;
	uint8_t *owners; /* enum frame_owner, one for each frame */
	uint32_t owned[FRAME_IN_FLIGHT + 1];

	const struct ingress *ingress;
	struct xsk_state *xsk;
	struct packet_state *packet;
	struct packet *batch;
	uint32_t batch_count;

	struct tables tables;
	uint32_t *rule_table; /* rule_id by key, 0 where empty */
	uint32_t lookups;     /* enum mcr_setting: the kinds of key that some rule has */

	struct egress egress;	       /* without egress threads */
	struct pipes *pipes;	       /* to them, and back; NULL without */
	struct egress_thread *threads; /* setup.egress_threads */

	struct mcr_rule_counters *rule_counters;
	struct mcr_output_counters *output_counters;
	struct mcr_worker_counters *counters; /* the ingress thread's alone */
	struct mcr_latency *latency;
	struct mcr_tap_report *reports; /* of all workers; slot 0 says whether any are wanted */

	struct mcr_command command;
	struct iovec command_vector;
	struct msghdr command_message;
	char command_control[CMSG_SPACE(COMMAND_FDS * sizeof(int))];
	int command_fds[COMMAND_FDS]; /* that came with the command, until it is acknowledged */
	uint32_t command_fd_count;
	uint32_t acks_awaited; /* from egress threads */
	int command_status;
};

#define container_of(pointer, type, member) ((type *)((char *)(pointer)-offsetof(type, member)))

/* How many datagrams a packet holds, which is one unless it is a super-packet with segments. */
static inline uint32_t count_datagrams(uint16_t payload_length, uint16_t segment)
{
	return segment ? (payload_length + segment - 1U) / segment : 1;
}

/* Counters have several writers: threads, and the workers of one interface. */
static inline void counter_add(__u64 *counter, uint64_t amount)
{
	__atomic_fetch_add(counter, amount, __ATOMIC_RELAXED);
}

static inline void counter_set(__u64 *counter, uint64_t value)
{
	__atomic_store_n(counter, value, __ATOMIC_RELAXED);
}

/* reactor.c */
int reactor_open(struct reactor *reactor, uint32_t flags);
int reactor_enable(struct reactor *reactor);
int reactor_fail(struct reactor *reactor, int error, const char *format, ...)
	__attribute__((format(printf, 3, 4)));
struct io_uring_sqe *reactor_sqe(struct reactor *reactor);
int reactor_reap(struct reactor *reactor);
int reactor_submit_and_reap(struct reactor *reactor);
int reactor_wait(struct reactor *reactor);
int reactor_wait_briefly(struct reactor *reactor);
uint64_t clock_ns(void);

#define worker_fail(worker, ...) reactor_fail(&(worker)->reactor, __VA_ARGS__)

/* Says what the completion will be about; after the preparation, which clears it. */
static inline void reactor_tag(struct io_uring_sqe *sqe, enum completion_kind kind, uint32_t index)
{
	io_uring_sqe_set_data64(sqe, kind | (uint64_t)index << 8);
}

/* When the completions were taken that are being handled: one look at the clock for them all. */
static inline uint64_t reactor_now_ns(struct reactor *reactor)
{
	if (!reactor->now_ns)
		reactor->now_ns = clock_ns();
	return reactor->now_ns;
}

/* How many packets the ingress takes at once. */
static inline uint32_t batch_limit(const struct worker *worker)
{
	return worker->pipes ? PIPE_PACKETS : BATCH_PACKETS;
}

/* worker.c */
int worker_complete(struct reactor *reactor, enum completion_kind kind, uint32_t index, int result,
		    uint32_t flags);
_Noreturn void worker_die(struct worker *worker, const char *last_words);

/* setup.c */
int setup_worker(struct worker *worker, int *sockets, uint32_t *socket_count);

/* confine.c */
int confine_privileges(struct worker *worker);
int confine_system_calls(struct worker *worker);

/* frames.c */
int frames_move(struct worker *worker, uint32_t frame, enum frame_owner from, enum frame_owner to);
int frames_give(struct worker *worker, const uint32_t *frames, uint32_t count, enum frame_owner from,
		uint16_t queue);
void frames_count(struct worker *worker, uint32_t in_receive_rings);

/* rules.c */
int tables_open(struct tables *tables, uint32_t share, uint32_t shares);
bool tables_have(const struct tables *tables, uint32_t output_id);
void tables_apply(struct tables *tables, const struct mcr_command *command);
uint32_t hash_words(const void *key, size_t size); /* a multiple of 4 bytes */
void rules_index(struct worker *worker, uint32_t added);
uint32_t rules_find(const struct worker *worker, const struct mcr_packet *packet);
void rules_count_relayed(struct worker *worker, uint32_t rule_id, uint32_t packets, uint64_t bytes);

/* commands.c */
int commands_arm(struct worker *worker);
int commands_handle(struct worker *worker, int result);
int commands_acknowledge(struct worker *worker, int status);
int commands_receive_setup(struct worker *worker);
int commands_reply(struct worker *worker, int status, const int *fds, uint32_t fd_count, uint32_t zero_copy);

/* egress.c */
int egress_open(struct egress *egress, struct worker *worker, struct reactor *reactor, struct tables *tables,
		struct returns *returns);
int egress_relay(struct egress *egress, struct packet *packets, uint32_t count);
int egress_complete(struct egress *egress, uint32_t send_index, int result);
int egress_apply(struct egress *egress, const struct mcr_command *command, int fd);
int egress_settle(struct egress *egress);

/* checksum.c: takes what was damaged on its way out of the batch. */
int checksum_verify(struct worker *worker);

/* latency.c */
void latency_add(struct mcr_latency *latency, const uint64_t *rx_times_ns, uint32_t count, uint64_t now_ns);

/* tap.c */
void tap_send(struct worker *worker, const struct send *send, const struct run *run, int error,
	      enum mcr_output_drop_reason reason);
void tap_skip(struct worker *worker, const struct run *run, uint32_t output_id,
	      enum mcr_output_drop_reason reason);
void tap_refuse(struct worker *worker, uint32_t frame, uint32_t rule_id, uint32_t output_id,
		enum mcr_output_drop_reason reason);
void tap_drop(struct worker *worker, const struct packet *packet, enum mcr_drop_reason reason);

/* A trace is running: the one test that its absence costs. */
static inline bool tap_wanted(const struct worker *worker)
{
	return __builtin_expect(__atomic_load_n(&worker->reports[0].wanted, __ATOMIC_RELAXED) != 0, 0);
}

/* The driver bound at least one AF_XDP socket without copying. */
bool xsk_zero_copy(const struct worker *worker);

#endif /* MCR_CORE_H */
