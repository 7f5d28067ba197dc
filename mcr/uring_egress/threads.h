/* SPDX-License-Identifier: MIT */
/*
 * What passes between the ingress thread (pipes.c) and the egress threads (threads.c): descriptors one way, words
 * the other. Both are byte streams in kernel pipes.
 */
#ifndef MCR_THREADS_H
#define MCR_THREADS_H

#include "core.h"

/* A packet for an egress thread, or with rule_id 0 the head of a command that follows as it is. */
struct descriptor {
	uint64_t rx_time_ns;
	uint32_t frame_index;
	uint16_t rule_id;
	uint16_t frame_offset; /* of the Ethernet header in the frame */
	uint16_t payload_offset;
	uint16_t payload_length;
	uint16_t segment;
	uint16_t dport;
	uint8_t ip_offset;
	uint8_t ttl;
	uint8_t tos;
	int32_t fd; /* that came with the command, or -1 */
};

enum {
	COMMAND_SLOTS = sizeof(struct mcr_command) / sizeof(struct descriptor),
	/* A word in the return pipe is the index of a frame, or this and an errno: a command is done. */
	RETURN_ACK = 1U << 30,
};

_Static_assert(sizeof(struct descriptor) == 32, "struct descriptor: a page of a pipe holds whole ones");
_Static_assert(sizeof(struct mcr_command) % sizeof(struct descriptor) == 0, "a command is whole slots");
_Static_assert(1 + COMMAND_SLOTS <= PIPE_PACKETS, "a command fits where a batch fits");

/* An egress thread's words on their way into the return pipe: some being written, some waiting. */
struct returns {
	int fd;
	bool busy;
	uint32_t capacity;
	uint32_t *words;
	uint32_t count;
	uint32_t *writing;
	uint32_t bytes;
	uint32_t written;
};

struct egress_thread {
	struct reactor reactor;
	struct egress egress;
	struct tables tables;
	struct returns returns;
	struct worker *worker;
	uint32_t index;
	int fd; /* the pipe to read from */
	bool reading;
	uint32_t filled; /* bytes of slots */
	struct descriptor slots[PIPE_PACKETS];
	struct packet batch[PIPE_PACKETS];
	uint32_t batch_count;
	struct mcr_command command;
	uint32_t command_slots; /* that are still to come */
	int command_fd;
};

/* threads.c */
int threads_open(struct worker *worker);
int threads_start(struct worker *worker);
int returns_put(struct returns *returns, const uint32_t *words, uint32_t count);

/* pipes.c */
int pipes_open(struct worker *worker);
int pipes_await_threads(struct worker *worker);
int pipes_arm(struct worker *worker);
int pipes_relay(struct worker *worker);
int pipes_settle(struct worker *worker);
int pipes_command(struct worker *worker, int fd);
int pipes_written(struct worker *worker, uint32_t index, int result);
int pipes_returned(struct worker *worker, int result);

#endif /* MCR_THREADS_H */
