/* SPDX-License-Identifier: MIT */
/*
 * What the test source and the test sink share with Python.
 *
 * Python reads this file through cffi, which knows no preprocessor: constants are enums, and a line that
 * starts with '#' is invisible to it.
 *
 * A payload is: the sequence number (8 bytes, big-endian), CLOCK_REALTIME in ns (8 bytes, big-endian), then a
 * fill that only the sequence number decides. A shorter payload is a prefix of that; one of fewer than 8
 * bytes carries no sequence number and uses none up.
 */
#ifndef MCR_TRAFFIC_H
#define MCR_TRAFFIC_H

#include <stddef.h>
#include <stdint.h>

enum mcr_traffic_limit {
	MCR_MAX_PAYLOAD = 65507, /* bytes: the largest UDP payload in IPv4 */
	MCR_MAX_SIZES = 64,
	MCR_MAX_BURST = 1024, /* sendmmsg(2) takes no more */
	MCR_SINK_BATCH = 64,
	MCR_SINK_SOURCES = 8,
	MCR_SINK_WINDOW = 4194304, /* sequence numbers; a power of two */
};

struct mcr_source_config {
	double rate;	      /* packets per second; 0 is as fast as possible */
	uint64_t count;	      /* packets; 0 is no limit */
	uint64_t duration_ns; /* 0 is no limit */
	uint32_t burst;	      /* packets per system call, at most */
	uint32_t digest;      /* 1: one run sends one burst, whose payloads mcr_source_sent() gives */
	uint32_t size_count;
	uint32_t sizes[MCR_MAX_SIZES]; /* payload bytes, used in turn */
};

struct mcr_source_counts {
	uint64_t packets;
	uint64_t bytes;	      /* of payload */
	uint64_t retries;     /* times the socket or the queue was full; each packet was sent again */
	uint64_t unreachable; /* times the network answered that nobody is there */
	uint64_t started_ns;  /* CLOCK_MONOTONIC */
	uint64_t last_ns;
};

struct mcr_sink_counts {
	uint64_t packets; /* all that arrived from the right source */
	uint64_t bytes;
	uint64_t ignored;     /* from another source than the stream's */
	uint64_t unsequenced; /* too short for a sequence number */
	uint64_t corrupt;     /* the fill does not belong to the sequence number */
	uint64_t distinct;
	uint64_t duplicates;
	uint64_t reordered; /* RFC 4737 section 3: a smaller sequence number than one before it */
	uint64_t stale;	    /* so late that nothing tells whether it is a duplicate */
	uint64_t lowest;
	uint64_t highest;
	uint64_t size_min;
	uint64_t size_max;
	uint64_t latencies;	   /* packets with a latency */
	uint64_t latency_negative; /* sent in the future: the clocks disagree */
	uint64_t latency_min_ns;
	uint64_t latency_max_ns;
	uint64_t first_ns; /* CLOCK_MONOTONIC */
	uint64_t last_ns;
	uint64_t other_sources; /* packets from sources beyond those listed */
	uint32_t source_count;
	uint8_t sources[MCR_SINK_SOURCES][16]; /* IPv4 as v4-mapped */
	uint8_t ttl_seen[256];
	uint8_t dscp_seen[64];
};

struct mcr_source;
struct mcr_sink;

/* Writes one payload of length bytes. */
void mcr_payload_write(uint8_t *payload, size_t length, uint64_t sequence, uint64_t time_ns);
/* 1 if the fill is that of the payload's own sequence number, else 0. Needs at least 8 bytes. */
int mcr_payload_is_intact(const uint8_t *payload, size_t length);

/* fd: a connected datagram socket, kept by the caller. Returns 0 or -errno. */
int mcr_source_open(int fd, const struct mcr_source_config *config, struct mcr_source **source);
/* Sends for about slice_ns. Returns 1 if there is more to do, 0 if done, -errno if sending cannot go on. */
int mcr_source_run(struct mcr_source *source, uint64_t slice_ns);
const struct mcr_source_counts *mcr_source_counts(const struct mcr_source *source);
/* The payloads that the last run sent, one after the other, if digest is set. Valid until the next run. */
size_t mcr_source_sent(const struct mcr_source *source, const uint8_t **payloads);
void mcr_source_close(struct mcr_source *source);

/*
 * fd: a bound datagram socket with a receive timeout, kept by the caller. only_source: 16 bytes, or NULL for
 * any. digest: 1 if a run takes one batch, whose payloads mcr_sink_received() gives. Returns 0 or -errno.
 */
int mcr_sink_open(int fd, const uint8_t *only_source, int digest, struct mcr_sink **sink);
/*
 * Receives until packets have arrived in all, for about slice_ns, or until the receive timeout. Returns the
 * packets of this run, ignored ones included, or -errno.
 */
int mcr_sink_run(struct mcr_sink *sink, uint64_t packets, uint64_t slice_ns);
const struct mcr_sink_counts *mcr_sink_counts(const struct mcr_sink *sink);
/* The payloads of the last run in order of arrival, if digest is set. Valid until the next run. */
size_t mcr_sink_received(const struct mcr_sink *sink, const uint8_t **payloads);
/* The latency that permille of the packets do not exceed, at most 1.6 % too high. */
uint64_t mcr_sink_latency_ns(const struct mcr_sink *sink, uint32_t permille);
/* Packets that the kernel threw away because the socket's buffer was full, or -errno. */
int64_t mcr_sink_socket_dropped(const struct mcr_sink *sink);
void mcr_sink_close(struct mcr_sink *sink);

#endif /* MCR_TRAFFIC_H */
