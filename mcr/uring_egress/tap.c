// SPDX-License-Identifier: MIT
/*
 * What the worker tells of packets that a trace has marked: what became of each at each output. The mark and the
 * time are in the metadata in front of the frame, which is ours until its run is released. Nothing here runs
 * without a trace, waits, or changes what becomes of a packet; threads may call it side by side.
 */
#include <string.h>
#include <time.h>

#include "core.h"

enum { HEADROOM = 256 }; /* XDP_PACKET_HEADROOM: where a driver, or the copying, puts a packet in its frame */

/* The metadata of a marked packet, NULL for any other one. */
static const struct mcr_metadata *marked(const struct worker *worker, uint32_t frame, uint32_t rule_id)
{
	const uint8_t *start = worker->pool + (size_t)frame * worker->setup.frame_size + HEADROOM;
	const struct mcr_metadata *metadata = (const struct mcr_metadata *)start;

	if (worker->setup.ingress != MCR_INGRESS_XSK)
		return NULL;
	if (xsk_zero_copy(worker))
		metadata--; /* the driver had put the packet there before XDP put this in front of it */
	if (!(metadata->flags & MCR_METADATA_TRACED) || metadata->rule_id != rule_id)
		return NULL;
	return metadata;
}

/* A slot is taken, written, and only then bears its number; one that is written over is no longer valid. */
static void report(struct worker *worker, const struct mcr_tap_event *event)
{
	uint64_t number = __atomic_add_fetch(&worker->reports[0].number, 1, __ATOMIC_RELAXED);
	struct mcr_tap_report *slot = &worker->reports[1 + (number - 1) % (MCR_TAP_REPORTS - 1)];

	__atomic_store_n(&slot->number, 0, __ATOMIC_RELAXED);
	__atomic_thread_fence(__ATOMIC_RELEASE);
	memcpy(&slot->event, event, sizeof(*event));
	__atomic_store_n(&slot->number, number, __ATOMIC_RELEASE);
}

static void tell(struct worker *worker, const struct mcr_metadata *metadata, uint32_t output_id,
		 enum mcr_tap_verdict verdict, uint32_t reason, int error)
{
	struct mcr_tap_event event = {
		.time_ns = metadata->rx_time_ns,
		.rule_id = metadata->rule_id,
		.output_id = output_id,
		.cpu = MCR_TAP_WORKER_CPU,
		.error = (uint32_t)error,
		.verdict = verdict,
		.reason = reason,
	};
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	event.done_ns = (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
	report(worker, &event);
}

static void tell_range(struct worker *worker, const struct run *run, uint32_t first, uint32_t count,
		       uint32_t output_id, enum mcr_tap_verdict verdict, uint32_t reason, int error)
{
	for (uint32_t i = first; i < first + count; i++) {
		const struct mcr_metadata *metadata = marked(worker, run->frames[i], run->first.rule_id);

		if (metadata)
			tell(worker, metadata, output_id, verdict, reason, error);
	}
}

/* A send has completed; error is 0 or its errno, which reason then stands for. */
void tap_send(struct worker *worker, const struct send *send, const struct run *run, int error,
	      enum mcr_output_drop_reason reason)
{
	tell_range(worker, run, send->first, send->count, send->output_id,
		   error ? MCR_TAP_NOT_SENT : MCR_TAP_SENT, error ? reason : 0, error);
}

/* The whole run is dropped for an output before it is sent. */
void tap_skip(struct worker *worker, const struct run *run, uint32_t output_id,
	      enum mcr_output_drop_reason reason)
{
	tell_range(worker, run, 0, run->count, output_id, MCR_TAP_NOT_SENT, reason, 0);
}

/* One packet of a rule is dropped for an output before it is in a run. */
void tap_refuse(struct worker *worker, uint32_t frame, uint32_t rule_id, uint32_t output_id,
		enum mcr_output_drop_reason reason)
{
	const struct mcr_metadata *metadata = marked(worker, frame, rule_id);

	if (metadata)
		tell(worker, metadata, output_id, MCR_TAP_NOT_SENT, reason, 0);
}

/* The packet is dropped by its rule. */
void tap_drop(struct worker *worker, const struct packet *packet, enum mcr_drop_reason reason)
{
	const struct mcr_metadata *metadata = marked(worker, packet->frame_index, packet->rule_id);

	if (metadata)
		tell(worker, metadata, 0, MCR_TAP_DROPPED, reason, 0);
}
