// SPDX-License-Identifier: MIT
/*
 * The ingress thread's side of the egress threads: packets and commands go out as descriptors, one pipe for each
 * thread; frames and acknowledgements come back through one pipe for them all. Only this thread counts who still
 * has a frame.
 *
 * A pipe that is full takes no packet, and the outputs behind it have dropped it (`pipe_full`): the others are not
 * held up. A command waits for room, in io_uring and not here. A pipe is a stream of bytes, and a write may end
 * anywhere: what has been begun is finished before anything else goes into that pipe.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "threads.h"

enum { RETURN_WORDS = 2048, FREED_FRAMES = 256 };

enum pipe_state {
	PIPE_READY = 0,
	PIPE_WRITING, /* packets, as many as there is room for: the answer is about to come */
	PIPE_OWING,   /* bytes that must go: they wait for room */
};

struct pipe {
	int fd;
	enum pipe_state state;
	uint32_t staged; /* slots */
	uint32_t bytes;	 /* of the slots, to be written */
	uint32_t written;
	struct descriptor slots[PIPE_PACKETS];
};

struct pipes {
	uint32_t count;
	struct pipe to[MCR_MAX_EGRESS_THREADS];
	uint8_t threads[MCR_MAX_RULES]; /* a bit for each thread that has an output of the rule */
	uint8_t *references;		/* threads that have the frame */
	uint8_t *queues;		/* that the frame came from */

	int return_fd;
	uint32_t returned; /* bytes of words */
	uint32_t words[RETURN_WORDS];

	uint32_t freed[FREED_FRAMES]; /* of one queue, to be given back together */
	uint32_t freed_count;
	uint16_t freed_queue;

	uint32_t relayed_rule; /* the rule of the packets that are to be counted */
	uint32_t relayed_packets;
	uint64_t relayed_bytes;
};

/* --- set-up */

/*
 * Pages fill one by one, and a write does not always begin in the last one's rest: a pipe is sure to hold half of
 * its size, less a page that is being read and one that is being written (pipe_write() in fs/pipe.c).
 */
static uint32_t sure_size(uint32_t bytes)
{
	return 2 * bytes + 2 * (uint32_t)sysconf(_SC_PAGESIZE);
}

/* Before kernel 6.4 io_uring hands each access to a pipe to a helper that may block. */
static int check_nowait(struct worker *worker, const int *ends)
{
	uint32_t word = 0;
	struct iovec vector = {&word, sizeof(word)};

	if (pwritev2(ends[1], &vector, 1, -1, RWF_NOWAIT) != sizeof(word) ||
	    read(ends[0], &word, sizeof(word)) != sizeof(word))
		return worker_fail(worker, ENOSYS, "egress threads need kernel 6.4");
	return 0;
}

static int open_pipe(struct worker *worker, int ends[2], uint32_t size, uint32_t *granted)
{
	int status;

	if (pipe2(ends, O_CLOEXEC))
		return worker_fail(worker, errno, "pipe: %s", strerror(errno));
	status = fcntl(ends[1], F_SETPIPE_SZ, size);
	if (status < 0)
		status = fcntl(ends[1], F_GETPIPE_SZ); /* above fs.pipe-max-size: what there is */
	*granted = (uint32_t)status;
	return check_nowait(worker, ends);
}

/* Every thread may have every frame: there must always be room to give it back. */
static int open_return_pipe(struct worker *worker, int *write_end)
{
	uint32_t threads = worker->setup.egress_threads, granted = 0;
	uint32_t needed = sure_size(threads * (worker->setup.frame_count + 1) * sizeof(uint32_t));
	int ends[2], status = open_pipe(worker, ends, needed, &granted);

	if (!status && granted < needed)
		return worker_fail(worker, EPERM, "the return pipe needs %u bytes and got %u", needed,
				   granted);
	worker->pipes->return_fd = ends[0];
	*write_end = ends[1];
	return status;
}

int pipes_open(struct worker *worker)
{
	uint32_t count = worker->setup.egress_threads, frames = worker->setup.frame_count;
	struct pipes *pipes = calloc(1, sizeof(*pipes));
	int write_end = -1, status = 0;

	worker->pipes = pipes;
	if (!pipes)
		return worker_fail(worker, ENOMEM, "no memory");
	pipes->count = count;
	pipes->references = calloc(frames, sizeof(*pipes->references));
	pipes->queues = calloc(frames, sizeof(*pipes->queues));
	if (!pipes->references || !pipes->queues)
		return worker_fail(worker, ENOMEM, "no memory");
	status = open_return_pipe(worker, &write_end);
	for (uint32_t i = 0; i < count && !status; i++) {
		/* Half the pool: a thread that is behind leaves the other half to the others. */
		uint32_t wanted = frames / 2 * sizeof(struct descriptor), granted = 0;
		int ends[2];

		status = open_pipe(worker, ends, wanted, &granted);
		worker->counters->pipe_bytes = granted;
		worker->threads[i].fd = ends[0];
		worker->threads[i].returns.fd = write_end;
		pipes->to[i].fd = ends[1];
	}
	return status;
}

/* Each thread says that it runs, before there is a loop to hear it. */
int pipes_await_threads(struct worker *worker)
{
	for (uint32_t i = 0; i < worker->pipes->count; i++) {
		uint32_t word = 0;

		if (read(worker->pipes->return_fd, &word, sizeof(word)) != sizeof(word) || word != RETURN_ACK)
			return worker_fail(worker, EPROTO, "an egress thread did not start");
	}
	return 0;
}

/* --- frames that come back */

static int give_freed(struct worker *worker)
{
	struct pipes *pipes = worker->pipes;
	uint32_t count = pipes->freed_count;

	pipes->freed_count = 0;
	return count ? frames_give(worker, pipes->freed, count, FRAME_IN_FLIGHT, pipes->freed_queue) : 0;
}

/* One thread less has the frame. */
static int unreference(struct worker *worker, uint32_t frame)
{
	struct pipes *pipes = worker->pipes;
	int status = 0;

	if (frame >= worker->setup.frame_count || !pipes->references[frame])
		return worker_fail(worker, EPROTO, "frame %u came back too often", frame);
	if (--pipes->references[frame])
		return 0;
	if (pipes->freed_count == FREED_FRAMES || pipes->queues[frame] != pipes->freed_queue)
		status = give_freed(worker);
	pipes->freed_queue = pipes->queues[frame];
	pipes->freed[pipes->freed_count++] = frame;
	return status;
}

/* Reads the return pipe, always. */
int pipes_arm(struct worker *worker)
{
	struct pipes *pipes = worker->pipes;
	struct io_uring_sqe *sqe = reactor_sqe(&worker->reactor);

	if (!sqe)
		return -ENOSPC;
	io_uring_prep_read(sqe, pipes->return_fd, (char *)pipes->words + pipes->returned,
			   sizeof(pipes->words) - pipes->returned, (uint64_t)-1);
	reactor_tag(sqe, COMPLETION_RETURN, 0);
	return 0;
}

int pipes_returned(struct worker *worker, int result)
{
	struct pipes *pipes = worker->pipes;
	uint32_t count, whole;
	int status = 0;

	if (result <= 0 && result != -EINTR && result != -EAGAIN)
		return worker_fail(worker, EPROTO, "the return pipe: %s", strerror(-result));
	pipes->returned += result > 0 ? (uint32_t)result : 0;
	count = pipes->returned / sizeof(pipes->words[0]);
	whole = count * sizeof(pipes->words[0]);
	for (uint32_t i = 0; i < count && !status; i++) {
		uint32_t word = pipes->words[i];

		if (word < RETURN_ACK) {
			status = unreference(worker, word);
			continue;
		}
		status = give_freed(worker); /* what the command had to wait for comes first */
		if (!status)
			status = commands_acknowledge(worker, -(int)(word - RETURN_ACK));
	}
	if (!status)
		status = give_freed(worker);
	pipes->returned -= whole;
	memmove(pipes->words, (char *)pipes->words + whole, pipes->returned);
	return status ? status : pipes_arm(worker);
}

/* --- packets and commands that go out */

static int write_pipe(struct worker *worker, uint32_t index, enum pipe_state state)
{
	struct pipe *pipe = &worker->pipes->to[index];
	struct io_uring_sqe *sqe = reactor_sqe(&worker->reactor);

	if (!sqe)
		return -ENOSPC;
	io_uring_prep_write(sqe, pipe->fd, (char *)pipe->slots + pipe->written, pipe->bytes - pipe->written,
			    (uint64_t)-1);
	if (state == PIPE_WRITING)
		sqe->rw_flags = RWF_NOWAIT;
	reactor_tag(sqe, COMPLETION_PIPE, index);
	pipe->state = state;
	return 0;
}

static void count_pipe_full(struct worker *worker, uint32_t index, uint32_t rule_id, uint32_t frame,
			    uint32_t datagrams)
{
	const struct rule *rule = &worker->tables.rules[rule_id];

	for (uint32_t i = 0; i < rule->output_count; i++) {
		uint32_t output_id = rule->output_ids[i];

		if (output_id % worker->pipes->count != index)
			continue;
		counter_add(&worker->output_counters[output_id].dropped[MCR_OUTPUT_DROP_PIPE_FULL],
			    datagrams);
		if (tap_wanted(worker))
			tap_refuse(worker, frame, rule_id, output_id, MCR_OUTPUT_DROP_PIPE_FULL);
	}
}

/* The packets that found no room, from a slot on. */
static int drop_staged(struct worker *worker, uint32_t index, uint32_t first)
{
	struct pipe *pipe = &worker->pipes->to[index];
	int status = 0;

	for (uint32_t i = first; i < pipe->staged && !status; i++) {
		const struct descriptor *slot = &pipe->slots[i];

		count_pipe_full(worker, index, slot->rule_id, slot->frame_index,
				count_datagrams(slot->payload_length, slot->segment));
		status = unreference(worker, slot->frame_index);
	}
	return status ? status : give_freed(worker);
}

int pipes_written(struct worker *worker, uint32_t index, int result)
{
	struct pipe *pipe = &worker->pipes->to[index];

	if (result < 0 && result != -EAGAIN && result != -EINTR)
		return worker_fail(worker, -result, "the pipe to egress thread %u: %s", index,
				   strerror(-result));
	pipe->written += result > 0 ? (uint32_t)result : 0;
	if (pipe->state == PIPE_WRITING && pipe->written < pipe->bytes) {
		uint32_t begun = (pipe->written + sizeof(*pipe->slots) - 1) / sizeof(*pipe->slots);
		int status = drop_staged(worker, index, begun);

		if (status)
			return status;
		pipe->bytes = begun * sizeof(*pipe->slots);
	}
	if (pipe->written < pipe->bytes)
		return write_pipe(worker, index, PIPE_OWING);
	pipe->state = PIPE_READY;
	pipe->staged = 0;
	return 0;
}

/* Waits until it is known which packets found room in their pipes. */
int pipes_settle(struct worker *worker)
{
	for (uint32_t i = 0; i < worker->pipes->count; i++)
		while (worker->pipes->to[i].state == PIPE_WRITING) {
			int status = reactor_wait(&worker->reactor);

			if (status)
				return status;
		}
	return 0;
}

/* Consecutive packets of one rule are counted together. */
static void count_relayed(struct worker *worker, uint32_t next_rule)
{
	struct pipes *pipes = worker->pipes;

	if (pipes->relayed_packets)
		rules_count_relayed(worker, pipes->relayed_rule, pipes->relayed_packets,
				    pipes->relayed_bytes);
	pipes->relayed_rule = next_rule;
	pipes->relayed_packets = 0;
	pipes->relayed_bytes = 0;
}

static void stage(struct worker *worker, struct pipe *pipe, const struct packet *packet)
{
	size_t start = (size_t)packet->frame_index * worker->setup.frame_size;

	pipe->slots[pipe->staged++] = (struct descriptor){
		.rx_time_ns = packet->rx_time_ns,
		.frame_index = packet->frame_index,
		.rule_id = packet->rule_id,
		.frame_offset = (uint16_t)(packet->frame - (worker->pool + start)),
		.payload_offset = packet->payload_offset,
		.payload_length = packet->payload_length,
		.segment = packet->segment,
		.ip_offset = packet->ip_offset,
		.dport = packet->dport,
		.ttl = packet->ttl,
		.tos = packet->tos,
		.fd = -1,
	};
}

/* Puts the packet into the hands of every thread that has an output of its rule. */
static int hand_over(struct worker *worker, const struct packet *packet)
{
	struct pipes *pipes = worker->pipes;
	const struct rule *rule = &worker->tables.rules[packet->rule_id];
	uint32_t datagrams = count_datagrams(packet->payload_length, packet->segment);
	int status;

	if (!rule->known || !rule->output_count) {
		enum mcr_drop_reason reason = rule->known ? MCR_DROP_NO_OUTPUT : MCR_DROP_UNKNOWN_RULE;

		counter_add(&worker->rule_counters[packet->rule_id].dropped[reason], datagrams);
		if (tap_wanted(worker))
			tap_drop(worker, packet, reason);
		return frames_give(worker, &packet->frame_index, 1, FRAME_RECEIVE, packet->queue);
	}
	if (packet->rule_id != pipes->relayed_rule)
		count_relayed(worker, packet->rule_id);
	pipes->relayed_packets += datagrams;
	pipes->relayed_bytes += packet->payload_length;
	status = frames_move(worker, packet->frame_index, FRAME_RECEIVE, FRAME_IN_FLIGHT);
	pipes->queues[packet->frame_index] = (uint8_t)packet->queue;
	pipes->references[packet->frame_index] = 1; /* ours, meanwhile */
	for (uint32_t i = 0; i < pipes->count; i++) {
		if (!(pipes->threads[packet->rule_id] & 1U << i))
			continue;
		if (pipes->to[i].state == PIPE_OWING) {
			count_pipe_full(worker, i, packet->rule_id, packet->frame_index, datagrams);
			continue;
		}
		stage(worker, &pipes->to[i], packet);
		pipes->references[packet->frame_index]++;
	}
	return status ? status : unreference(worker, packet->frame_index);
}

/* Relays the batch; the writes are prepared, not yet submitted, when this returns. */
int pipes_relay(struct worker *worker)
{
	struct pipes *pipes = worker->pipes;
	int status = pipes_settle(worker);

	for (uint32_t i = 0; i < worker->batch_count && !status; i++)
		status = hand_over(worker, &worker->batch[i]);
	count_relayed(worker, 0);
	if (!status)
		status = give_freed(worker);
	for (uint32_t i = 0; i < pipes->count && !status; i++) {
		struct pipe *pipe = &pipes->to[i];

		if (!pipe->staged || pipe->state != PIPE_READY)
			continue;
		pipe->bytes = pipe->staged * sizeof(*pipe->slots);
		pipe->written = 0;
		status = write_pipe(worker, i, PIPE_WRITING);
	}
	return status;
}

static void note_threads(struct pipes *pipes, const struct mcr_set_rule *rule)
{
	uint8_t threads = 0;

	for (uint32_t i = 0; i < rule->output_count; i++)
		threads |= 1U << rule->output_ids[i] % pipes->count;
	pipes->threads[rule->rule_id] = threads;
}

/*
 * Sends the command that is being handled to every thread, behind the packets that came before it; each
 * acknowledges it. The pipes are settled.
 */
int pipes_command(struct worker *worker, int fd)
{
	struct pipes *pipes = worker->pipes;
	int status = 0;

	if (worker->command.type == MCR_SET_RULE)
		note_threads(pipes, &worker->command.rule);
	worker->acks_awaited = pipes->count; /* before the waits below, in which the first may come */
	for (uint32_t i = 0; i < pipes->count && !status; i++) {
		struct pipe *pipe = &pipes->to[i];

		while (pipe->state != PIPE_READY && !status) /* the rest of one descriptor */
			status = reactor_wait(&worker->reactor);
		pipe->slots[0] = (struct descriptor){.fd = fd};
		memcpy(&pipe->slots[1], &worker->command, sizeof(worker->command));
		pipe->staged = 1 + COMMAND_SLOTS;
		pipe->bytes = pipe->staged * sizeof(*pipe->slots);
		pipe->written = 0;
		if (!status)
			status = write_pipe(worker, i, PIPE_OWING);
	}
	return status;
}
