// SPDX-License-Identifier: MIT
/*
 * Reads what a trace or capture is told: the ring of the BPF programs through libbpf, and the workers' ring of
 * reports, whose memory they share. It never waits, never makes a writer wait, and believes nothing that a worker
 * has written but plain values.
 */
#include <bpf/libbpf.h>
#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include "bpf_calls.h"
#include "relay_abi.h"

enum {
	REPORT_SLOTS = MCR_TAP_REPORTS - 1,
	LARGEST_EVENT = sizeof(struct mcr_tap_event) + MCR_TAP_BYTES,
};

struct mcr_tap_reader {
	struct ring_buffer *events;
	struct mcr_tap_report *reports;
	size_t reports_size;
	uint64_t last; /* number of the report that was read last */
	uint64_t missed;
	uint8_t *to; /* while reading */
	size_t room;
};

/* Called by libbpf for each event. A negative answer ends the reading behind this event. */
static int copy_event(void *context, void *data, size_t size)
{
	struct mcr_tap_reader *reader = context;

	if (size < sizeof(struct mcr_tap_event) || size > reader->room)
		return -EPROTO; /* never so: the caller leaves room for the largest one */
	memcpy(reader->to, data, size);
	reader->to += size;
	reader->room -= size;
	return reader->room < LARGEST_EVENT ? -ENOSPC : 0;
}

/* Whether the report of that number was read whole. */
static bool copy_report(struct mcr_tap_reader *reader, uint64_t number)
{
	const struct mcr_tap_report *report = &reader->reports[1 + (number - 1) % REPORT_SLOTS];
	struct mcr_tap_event event;

	if (__atomic_load_n(&report->number, __ATOMIC_ACQUIRE) != number)
		return false;
	memcpy(&event, &report->event, sizeof(event));
	__atomic_thread_fence(__ATOMIC_ACQUIRE);
	if (__atomic_load_n(&report->number, __ATOMIC_RELAXED) != number)
		return false;
	event.captured = 0;
	memcpy(reader->to, &event, sizeof(event));
	reader->to += sizeof(event);
	reader->room -= sizeof(event);
	return true;
}

static void read_reports(struct mcr_tap_reader *reader)
{
	uint64_t taken = __atomic_load_n(&reader->reports[0].number, __ATOMIC_ACQUIRE);

	if (taken - reader->last > REPORT_SLOTS) {
		reader->missed += taken - reader->last - REPORT_SLOTS;
		reader->last = taken - REPORT_SLOTS;
	}
	while (reader->last != taken && reader->room >= sizeof(struct mcr_tap_event)) {
		uint64_t number = reader->last + 1;

		if (!copy_report(reader, number)) {
			if (__atomic_load_n(&reader->reports[0].number, __ATOMIC_ACQUIRE) - number <
			    REPORT_SLOTS)
				return; /* it is still being written */
			reader->missed++;
		}
		reader->last = number;
	}
}

struct mcr_tap_reader *mcr_tap_open(int events_fd, int reports_fd)
{
	struct mcr_tap_reader *reader = calloc(1, sizeof(*reader));
	size_t page = sysconf(_SC_PAGESIZE);

	if (!reader)
		return NULL;
	reader->reports_size = (MCR_TAP_REPORTS * sizeof(*reader->reports) + page - 1) / page * page;
	reader->reports = mmap(NULL, reader->reports_size, PROT_READ | PROT_WRITE, MAP_SHARED, reports_fd, 0);
	if (reader->reports == MAP_FAILED) {
		free(reader);
		return NULL;
	}
	reader->events = ring_buffer__new(events_fd, copy_event, reader, NULL);
	if (!reader->events) {
		mcr_tap_close(reader);
		return NULL;
	}
	reader->last = __atomic_load_n(&reader->reports[0].number, __ATOMIC_ACQUIRE);
	return reader;
}

long mcr_tap_read(struct mcr_tap_reader *reader, void *buffer, size_t size)
{
	int status = 0;

	reader->to = buffer;
	reader->room = size;
	if (size >= LARGEST_EVENT)
		status = ring_buffer__consume(reader->events);
	if (status < 0 && status != -ENOSPC)
		return status;
	read_reports(reader);
	return reader->to - (uint8_t *)buffer;
}

void mcr_tap_want_reports(struct mcr_tap_reader *reader, int wanted)
{
	__atomic_store_n(&reader->reports[0].wanted, (uint64_t)wanted, __ATOMIC_RELEASE);
}

uint64_t mcr_tap_missed(const struct mcr_tap_reader *reader)
{
	return reader->missed;
}

void mcr_tap_close(struct mcr_tap_reader *reader)
{
	ring_buffer__free(reader->events);
	munmap(reader->reports, reader->reports_size);
	free(reader);
}
