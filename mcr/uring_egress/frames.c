// SPDX-License-Identifier: MIT
/* The frame pool's book-keeping: every frame has one owner, and the four states add up to the pool. */
#include <errno.h>

#include "core.h"

int frames_move(struct worker *worker, uint32_t frame, enum frame_owner from, enum frame_owner to)
{
	if (frame >= worker->setup.frame_count)
		return worker_fail(worker, EPROTO, "frame %u is outside the pool", frame);
	if (worker->owners[frame] != from)
		return worker_fail(worker, EPROTO, "frame %u belongs to state %u instead of %u", frame,
				   worker->owners[frame], from);
	worker->owners[frame] = to;
	worker->owned[from]--;
	worker->owned[to]++;
	return 0;
}

/* Hands frames back to the kernel to receive into. */
int frames_give(struct worker *worker, const uint32_t *frames, uint32_t count, enum frame_owner from,
		uint16_t queue)
{
	for (uint32_t i = 0; i < count; i++) {
		int status = frames_move(worker, frames[i], from, FRAME_FILL);

		if (status)
			return status;
	}
	return worker->ingress->give(worker, frames, count, queue);
}

/* The kernel moves frames from a fill ring to a receive ring without telling: the rings' levels tell. */
void frames_count(struct worker *worker, uint32_t in_receive_rings)
{
	uint32_t kernel = worker->owned[FRAME_FILL];

	if (in_receive_rings > kernel)
		in_receive_rings = kernel;
	worker->counters->frames_fill = kernel - in_receive_rings;
	worker->counters->frames_receive = worker->owned[FRAME_RECEIVE] + in_receive_rings;
	worker->counters->frames_in_flight = worker->owned[FRAME_IN_FLIGHT];
	worker->counters->frames_free = worker->owned[FRAME_FREE];
}
