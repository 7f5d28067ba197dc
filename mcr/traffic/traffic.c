// SPDX-License-Identifier: MIT
/*
 * The core of the test source and the test sink: payloads, pacing, and the analysis of what arrives.
 *
 * It works on sockets that Python opened and returns to Python every slice, so that Ctrl-C works. It never
 * opens a socket, prints, or loses a packet without counting it.
 */
#include "traffic.h"

#include <assert.h>
#include <endian.h>
#include <errno.h>
#include <linux/sock_diag.h>
#include <netinet/in.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#define NS_PER_SECOND 1000000000ull
#define NS_PER_US 1000ull

enum {
	SEQUENCE_BYTES = 8,
	HEADER_BYTES = 16,
	/* A sleep shorter than this costs more than it saves. */
	SHORTEST_SLEEP_US = 60,
	/* Packets due closer together than the shortest sleep are sent in groups this far apart. */
	GROUP_US = 200,
	RETRY_US = 100,
	/* Answers "unreachable" to one packet before it is an error. */
	MAX_REFUSALS = 1000,
	/* Above the largest payload, and a multiple of no cache's size: slots that start 64 KiB apart would
	 * share a handful of cache sets. */
	SLOT_BYTES = 65536 + 33 * 64,
	CONTROL_BYTES = 2 * CMSG_SPACE(sizeof(int)),
	/* The histogram is exact to one part in 2^LINEAR_BITS of the value. */
	LINEAR_BITS = 6,
	BUCKETS = (64 - LINEAR_BITS + 1) << LINEAR_BITS,
};

/* A million packets per second take nine years to get here: anything above is somebody else's payload. */
static const uint64_t sequence_limit = 1ull << 48;

static uint64_t clock_ns(clockid_t clock)
{
	struct timespec now;

	clock_gettime(clock, &now);
	return (uint64_t)now.tv_sec * NS_PER_SECOND + (uint64_t)now.tv_nsec;
}

static uint64_t load_be64(const uint8_t *bytes)
{
	uint64_t value;

	memcpy(&value, bytes, sizeof(value));
	return be64toh(value);
}

/* The fill is little-endian 64-bit words, each the one before plus a constant: cheap to write and to check. */
static uint64_t fill_word(uint64_t sequence, size_t index)
{
	return (sequence + 1) * 0x9e3779b97f4a7c15ull + index * 0xd1b54a32d192ed03ull;
}

void mcr_payload_write(uint8_t *payload, size_t length, uint64_t sequence, uint64_t time_ns)
{
	uint64_t header[2] = {htobe64(sequence), htobe64(time_ns)};
	size_t fill = length > HEADER_BYTES ? length - HEADER_BYTES : 0;
	uint64_t word;

	memcpy(payload, header, length < HEADER_BYTES ? length : HEADER_BYTES);
	for (size_t i = 0; i < fill / 8; i++) {
		word = htole64(fill_word(sequence, i));
		memcpy(payload + HEADER_BYTES + i * 8, &word, 8);
	}
	word = htole64(fill_word(sequence, fill / 8));
	if (fill % 8)
		memcpy(payload + HEADER_BYTES + fill / 8 * 8, &word, fill % 8);
}

int mcr_payload_is_intact(const uint8_t *payload, size_t length)
{
	size_t fill = length > HEADER_BYTES ? length - HEADER_BYTES : 0;
	uint64_t sequence, difference = 0, word;

	assert(length >= SEQUENCE_BYTES);
	sequence = load_be64(payload);
	if (sequence >= sequence_limit)
		return 0;
	for (size_t i = 0; i < fill / 8; i++) {
		memcpy(&word, payload + HEADER_BYTES + i * 8, 8);
		difference |= le64toh(word) ^ fill_word(sequence, i);
	}
	word = htole64(fill_word(sequence, fill / 8));
	return !difference && !memcmp(payload + HEADER_BYTES + fill / 8 * 8, &word, fill % 8);
}

struct mcr_source {
	struct mcr_source_config config;
	struct mcr_source_counts counts;
	int fd;
	double interval_ns;
	uint64_t group;	      /* packets that fall due together */
	uint64_t earliest_ns; /* a source that is behind catches up at no more than twice its rate */
	uint64_t sequence;    /* of the next payload */
	uint32_t size_index;  /* of the next payload */
	uint32_t prepared;    /* packets in the burst */
	uint32_t sent;	      /* of these */
	uint32_t refusals;    /* of the packet to be sent next */
	size_t sent_offset;   /* payload bytes of the burst that are sent */
	size_t run_offset;    /* sent_offset at the start of the run */
	struct mmsghdr *messages;
	struct iovec *payloads;
	uint8_t *buffer;
};

static uint32_t largest_size(const struct mcr_source_config *config)
{
	uint32_t largest = 1;

	for (uint32_t i = 0; i < config->size_count; i++)
		if (config->sizes[i] > largest)
			largest = config->sizes[i];
	return largest;
}

static bool config_is_valid(const struct mcr_source_config *config)
{
	return config->rate >= 0 && config->burst >= 1 && config->burst <= MCR_MAX_BURST &&
	       config->size_count >= 1 && config->size_count <= MCR_MAX_SIZES &&
	       largest_size(config) <= MCR_MAX_PAYLOAD;
}

static uint64_t packets_per_group(const struct mcr_source_config *config, double interval_ns)
{
	double group = GROUP_US * NS_PER_US / interval_ns;

	if (interval_ns >= SHORTEST_SLEEP_US * NS_PER_US || group < 1)
		return 1;
	return group < config->burst ? (uint64_t)group : config->burst;
}

int mcr_source_open(int fd, const struct mcr_source_config *config, struct mcr_source **out)
{
	struct mcr_source *source;

	if (!config_is_valid(config))
		return -EINVAL;
	source = calloc(1, sizeof(*source));
	if (!source)
		return -ENOMEM;
	source->fd = fd;
	source->config = *config;
	if (config->rate > 0) {
		source->interval_ns = NS_PER_SECOND / config->rate;
		source->group = packets_per_group(config, source->interval_ns);
	}
	source->messages = calloc(config->burst, sizeof(*source->messages));
	source->payloads = calloc(config->burst, sizeof(*source->payloads));
	source->buffer = malloc((size_t)config->burst * largest_size(config));
	if (!source->messages || !source->payloads || !source->buffer) {
		mcr_source_close(source);
		return -ENOMEM;
	}
	*out = source;
	return 0;
}

static uint64_t source_remaining(const struct mcr_source *source)
{
	return source->config.count ? source->config.count - source->counts.packets : UINT64_MAX;
}

static bool source_is_done(const struct mcr_source *source, uint64_t now_ns)
{
	uint64_t duration_ns = source->config.duration_ns;

	return !source_remaining(source) ||
	       (duration_ns && now_ns - source->counts.started_ns >= duration_ns);
}

static uint64_t least(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

/* When the next group of packets is due. */
static uint64_t source_due_ns(const struct mcr_source *source)
{
	uint64_t last = source->counts.packets + least(source->group, source_remaining(source)) - 1;
	uint64_t due_ns = source->counts.started_ns + (uint64_t)((double)last * source->interval_ns);

	return due_ns > source->earliest_ns ? due_ns : source->earliest_ns;
}

/* Packets to send now, at least one: the group, and more if the source is behind. */
static uint32_t source_burst(const struct mcr_source *source, uint64_t now_ns)
{
	uint64_t burst = least(source->config.burst, source_remaining(source));
	uint64_t due;

	if (!source->interval_ns)
		return (uint32_t)burst;
	due = (uint64_t)((double)(now_ns - source->counts.started_ns) / source->interval_ns) + 1;
	due = due > source->counts.packets ? due - source->counts.packets : 1;
	return (uint32_t)least(due, burst);
}

static void source_prepare(struct mcr_source *source, uint32_t packets)
{
	uint64_t time_ns = clock_ns(CLOCK_REALTIME);
	uint8_t *payload = source->buffer;

	assert(packets >= 1 && packets <= source->config.burst);
	for (uint32_t i = 0; i < packets; i++) {
		uint32_t size = source->config.sizes[source->size_index];

		mcr_payload_write(payload, size, source->sequence, time_ns);
		source->payloads[i] = (struct iovec){.iov_base = payload, .iov_len = size};
		source->messages[i].msg_hdr.msg_iov = &source->payloads[i];
		source->messages[i].msg_hdr.msg_iovlen = 1;
		payload += size;
		source->sequence += size >= SEQUENCE_BYTES;
		source->size_index = (source->size_index + 1) % source->config.size_count;
	}
	source->prepared = packets;
	source->sent = 0;
	source->sent_offset = source->run_offset = 0;
}

static void sleep_until(uint64_t due_ns)
{
	struct timespec due = {.tv_sec = (time_t)(due_ns / NS_PER_SECOND),
			       .tv_nsec = (long)(due_ns % NS_PER_SECOND)};

	clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &due, NULL);
}

/* Returns no later than deadline_ns, and earlier after a signal. */
static void source_wait(uint64_t now_ns, uint64_t due_ns, uint64_t deadline_ns)
{
	due_ns = least(due_ns, deadline_ns);
	if (due_ns >= now_ns + SHORTEST_SLEEP_US * NS_PER_US) {
		sleep_until(due_ns);
		return;
	}
	while (clock_ns(CLOCK_MONOTONIC) < due_ns)
		;
}

static int source_refused(struct mcr_source *source, int error)
{
	switch (error) {
	case EINTR:
		return 0;
	case EAGAIN:
	case ENOBUFS:
	case ENOMEM:
		source->counts.retries++;
		sleep_until(clock_ns(CLOCK_MONOTONIC) + RETRY_US * NS_PER_US);
		return 0;
	case ECONNREFUSED:
	case EHOSTUNREACH:
		/* The answer to an earlier packet; this one has not been sent yet. */
		source->counts.unreachable++;
		return ++source->refusals < MAX_REFUSALS ? 0 : -error;
	default:
		return -error;
	}
}

static int source_flush(struct mcr_source *source)
{
	int sent = sendmmsg(source->fd, source->messages + source->sent, source->prepared - source->sent, 0);

	if (sent < 0)
		return source_refused(source, errno);
	source->refusals = 0;
	for (int i = 0; i < sent; i++) {
		size_t size = source->payloads[source->sent++].iov_len;

		source->sent_offset += size;
		source->counts.bytes += size;
	}
	source->counts.packets += (uint64_t)sent;
	source->counts.last_ns = clock_ns(CLOCK_MONOTONIC);
	return 0;
}

static int source_step(struct mcr_source *source, uint64_t now_ns, uint64_t deadline_ns)
{
	uint64_t due_ns;
	uint32_t packets;

	if (source->sent < source->prepared)
		return source_flush(source);
	if (source->interval_ns) {
		due_ns = source_due_ns(source);
		if (due_ns > now_ns) {
			source_wait(now_ns, due_ns, deadline_ns);
			return 0;
		}
	}
	packets = source_burst(source, now_ns);
	source->earliest_ns = now_ns + (uint64_t)(packets * source->interval_ns / 2);
	source_prepare(source, packets);
	return source_flush(source);
}

int mcr_source_run(struct mcr_source *source, uint64_t slice_ns)
{
	uint64_t now_ns = clock_ns(CLOCK_MONOTONIC);
	uint64_t deadline_ns = now_ns + slice_ns;
	int status;

	if (!source->counts.started_ns)
		source->counts.started_ns = source->counts.last_ns = now_ns;
	source->run_offset = source->sent_offset;
	while (!source_is_done(source, now_ns)) {
		if (now_ns >= deadline_ns ||
		    (source->config.digest && source->sent_offset > source->run_offset))
			return 1;
		status = source_step(source, now_ns, deadline_ns);
		if (status)
			return status;
		now_ns = clock_ns(CLOCK_MONOTONIC);
	}
	return 0;
}

const struct mcr_source_counts *mcr_source_counts(const struct mcr_source *source)
{
	return &source->counts;
}

size_t mcr_source_sent(const struct mcr_source *source, const uint8_t **payloads)
{
	assert(source->sent_offset >= source->run_offset);
	*payloads = source->buffer + source->run_offset;
	return source->sent_offset - source->run_offset;
}

void mcr_source_close(struct mcr_source *source)
{
	if (!source)
		return;
	free(source->messages);
	free(source->payloads);
	free(source->buffer);
	free(source);
}

struct mcr_sink {
	struct mcr_sink_counts counts;
	int fd;
	bool has_only_source;
	uint8_t only_source[16];
	struct mmsghdr messages[MCR_SINK_BATCH];
	struct iovec payloads[MCR_SINK_BATCH];
	struct sockaddr_in6 names[MCR_SINK_BATCH]; /* as large as any address of a UDP socket */
	_Alignas(struct cmsghdr) uint8_t controls[MCR_SINK_BATCH][CONTROL_BYTES];
	uint64_t histogram[BUCKETS];
	uint64_t
		window[MCR_SINK_WINDOW / 64]; /* one bit per sequence number in (highest - window, highest] */
	uint8_t *slots;
	uint8_t *received; /* the payloads of a run without gaps, or NULL */
	size_t received_bytes;
};

int mcr_sink_open(int fd, const uint8_t *only_source, int digest, struct mcr_sink **out)
{
	struct mcr_sink *sink = calloc(1, sizeof(*sink));

	if (!sink)
		return -ENOMEM;
	sink->fd = fd;
	if (only_source) {
		sink->has_only_source = true;
		memcpy(sink->only_source, only_source, sizeof(sink->only_source));
	}
	sink->slots = malloc((size_t)MCR_SINK_BATCH * SLOT_BYTES);
	sink->received = digest ? malloc((size_t)MCR_SINK_BATCH * SLOT_BYTES) : NULL;
	if (!sink->slots || (digest && !sink->received)) {
		mcr_sink_close(sink);
		return -ENOMEM;
	}
	for (size_t i = 0; i < MCR_SINK_BATCH; i++) {
		sink->payloads[i] = (struct iovec){.iov_base = sink->slots + i * SLOT_BYTES,
						   .iov_len = SLOT_BYTES};
		sink->messages[i].msg_hdr = (struct msghdr){.msg_iov = &sink->payloads[i],
							    .msg_iovlen = 1,
							    .msg_name = &sink->names[i],
							    .msg_control = sink->controls[i]};
	}
	*out = sink;
	return 0;
}

/* The kernel wrote what it used over what it may use. */
static void sink_rearm(struct mcr_sink *sink, uint32_t used)
{
	for (uint32_t i = 0; i < used; i++) {
		sink->messages[i].msg_hdr.msg_namelen = sizeof(sink->names[i]);
		sink->messages[i].msg_hdr.msg_controllen = CONTROL_BYTES;
	}
}

/* False if the packet has no IP address, as on a local socket. */
static bool source_address(const struct msghdr *header, uint8_t address[16])
{
	const struct sockaddr_in6 *name6 = header->msg_name;
	const struct sockaddr_in *name4 = header->msg_name;

	if (header->msg_namelen >= sizeof(*name6) && name6->sin6_family == AF_INET6) {
		memcpy(address, &name6->sin6_addr, 16);
		return true;
	}
	if (header->msg_namelen >= sizeof(*name4) && name4->sin_family == AF_INET) {
		memset(address, 0, 10);
		memset(address + 10, 0xff, 2);
		memcpy(address + 12, &name4->sin_addr, 4);
		return true;
	}
	return false;
}

static void count_source(struct mcr_sink_counts *counts, const uint8_t address[16])
{
	for (uint32_t i = 0; i < counts->source_count; i++)
		if (!memcmp(counts->sources[i], address, 16))
			return;
	if (counts->source_count == MCR_SINK_SOURCES) {
		counts->other_sources++;
		return;
	}
	memcpy(counts->sources[counts->source_count++], address, 16);
}

/* ip(7): the TTL is an int, the TOS a byte; ipv6(7): the hop limit and the traffic class are ints. */
static void count_header_fields(struct mcr_sink_counts *counts, struct msghdr *header)
{
	for (struct cmsghdr *item = CMSG_FIRSTHDR(header); item; item = CMSG_NXTHDR(header, item)) {
		bool v4 = item->cmsg_level == IPPROTO_IP, v6 = item->cmsg_level == IPPROTO_IPV6;
		int value = 0;

		if (item->cmsg_len >= CMSG_LEN(sizeof(value)))
			memcpy(&value, CMSG_DATA(item), sizeof(value));
		else if (item->cmsg_len >= CMSG_LEN(1))
			value = *CMSG_DATA(item);
		if ((v4 && item->cmsg_type == IP_TTL) || (v6 && item->cmsg_type == IPV6_HOPLIMIT))
			counts->ttl_seen[value & 0xff] = 1;
		else if ((v4 && item->cmsg_type == IP_TOS) || (v6 && item->cmsg_type == IPV6_TCLASS))
			counts->dscp_seen[(value & 0xff) >> 2] = 1;
	}
}

static uint64_t *window_word(struct mcr_sink *sink, uint64_t sequence)
{
	return &sink->window[sequence % MCR_SINK_WINDOW / 64];
}

/* Moves the window up, forgetting what falls out of it. */
static void window_advance(struct mcr_sink *sink, uint64_t sequence)
{
	uint64_t next = sink->counts.highest + 1;

	if (sequence - sink->counts.highest >= MCR_SINK_WINDOW)
		memset(sink->window, 0, sizeof(sink->window));
	else
		for (; next <= sequence; next++)
			*window_word(sink, next) &= ~(1ull << next % 64);
	sink->counts.highest = sequence;
}

static void count_sequence(struct mcr_sink *sink, uint64_t sequence)
{
	struct mcr_sink_counts *counts = &sink->counts;
	uint64_t bit = 1ull << sequence % 64;
	bool first = !counts->distinct, behind = !first && sequence < counts->highest;

	if (behind && counts->highest - sequence >= MCR_SINK_WINDOW) {
		counts->stale++;
		return;
	}
	if (first)
		counts->highest = counts->lowest = sequence;
	else if (sequence > counts->highest)
		window_advance(sink, sequence);
	if (*window_word(sink, sequence) & bit) {
		counts->duplicates++;
		return;
	}
	*window_word(sink, sequence) |= bit;
	counts->distinct++;
	counts->reordered += behind;
	if (sequence < counts->lowest)
		counts->lowest = sequence;
}

/* Values below 2^LINEAR_BITS have a bucket each; above, each power of two has 2^LINEAR_BITS buckets. */
static uint32_t bucket_of(uint64_t value)
{
	uint32_t shift;

	if (value < 1u << LINEAR_BITS)
		return (uint32_t)value;
	shift = 63 - (uint32_t)__builtin_clzll(value) - LINEAR_BITS;
	return ((shift + 1) << LINEAR_BITS) + (uint32_t)((value >> shift) - (1u << LINEAR_BITS));
}

/* The largest value of a bucket. */
static uint64_t bucket_top(uint32_t bucket)
{
	uint32_t shift;

	if (bucket < 1u << LINEAR_BITS)
		return bucket;
	shift = (bucket >> LINEAR_BITS) - 1;
	return ((((uint64_t)bucket & ((1u << LINEAR_BITS) - 1)) + (1u << LINEAR_BITS) + 1) << shift) - 1;
}

static void count_latency(struct mcr_sink *sink, uint64_t sent_ns, uint64_t now_ns)
{
	struct mcr_sink_counts *counts = &sink->counts;
	uint64_t latency_ns = now_ns - sent_ns;

	if (sent_ns > now_ns) {
		counts->latency_negative++;
		return;
	}
	if (!counts->latencies++ || latency_ns < counts->latency_min_ns)
		counts->latency_min_ns = latency_ns;
	if (latency_ns > counts->latency_max_ns)
		counts->latency_max_ns = latency_ns;
	sink->histogram[bucket_of(latency_ns)]++;
}

static void count_payload(struct mcr_sink *sink, const uint8_t *payload, size_t length, uint64_t now_ns)
{
	struct mcr_sink_counts *counts = &sink->counts;

	if (!counts->packets++ || length < counts->size_min)
		counts->size_min = length;
	if (length > counts->size_max)
		counts->size_max = length;
	counts->bytes += length;
	if (length < SEQUENCE_BYTES) {
		counts->unsequenced++;
		return;
	}
	if (!mcr_payload_is_intact(payload, length)) {
		counts->corrupt++;
		return;
	}
	count_sequence(sink, load_be64(payload));
	if (length >= HEADER_BYTES)
		count_latency(sink, load_be64(payload + SEQUENCE_BYTES), now_ns);
}

static void sink_take(struct mcr_sink *sink, uint32_t index, uint64_t now_ns)
{
	struct msghdr *header = &sink->messages[index].msg_hdr;
	const uint8_t *payload = sink->payloads[index].iov_base;
	size_t length = sink->messages[index].msg_len;
	uint8_t address[16];

	if (source_address(header, address)) {
		if (sink->has_only_source && memcmp(address, sink->only_source, sizeof(address))) {
			sink->counts.ignored++;
			return;
		}
		count_source(&sink->counts, address);
	}
	count_header_fields(&sink->counts, header);
	count_payload(sink, payload, length, now_ns);
	if (sink->received) {
		memcpy(sink->received + sink->received_bytes, payload, length);
		sink->received_bytes += length;
	}
}

/* One batch, at least one packet unless the receive timeout passes. Returns its packets or -errno. */
static int sink_batch(struct mcr_sink *sink, uint32_t limit)
{
	uint64_t counted = sink->counts.packets, now_ns;
	int taken;

	sink_rearm(sink, limit);
	taken = recvmmsg(sink->fd, sink->messages, limit, MSG_WAITFORONE, NULL);
	if (taken < 0)
		return errno == EAGAIN || errno == EINTR ? 0 : -errno;
	assert((uint32_t)taken <= limit);
	now_ns = clock_ns(CLOCK_REALTIME);
	for (int i = 0; i < taken; i++)
		sink_take(sink, (uint32_t)i, now_ns);
	if (sink->counts.packets != counted) {
		sink->counts.last_ns = clock_ns(CLOCK_MONOTONIC);
		if (!counted)
			sink->counts.first_ns = sink->counts.last_ns;
	}
	return taken;
}

int mcr_sink_run(struct mcr_sink *sink, uint64_t packets, uint64_t slice_ns)
{
	uint64_t deadline_ns = clock_ns(CLOCK_MONOTONIC) + slice_ns;
	int total = 0, taken;

	sink->received_bytes = 0;
	while (sink->counts.packets < packets) {
		taken = sink_batch(sink, (uint32_t)least(packets - sink->counts.packets, MCR_SINK_BATCH));
		if (taken < 0)
			return taken;
		total += taken;
		if (!taken || sink->received || clock_ns(CLOCK_MONOTONIC) >= deadline_ns)
			break;
	}
	return total;
}

const struct mcr_sink_counts *mcr_sink_counts(const struct mcr_sink *sink)
{
	return &sink->counts;
}

size_t mcr_sink_received(const struct mcr_sink *sink, const uint8_t **payloads)
{
	*payloads = sink->received;
	return sink->received_bytes;
}

uint64_t mcr_sink_latency_ns(const struct mcr_sink *sink, uint32_t permille)
{
	uint64_t wanted = (sink->counts.latencies * permille + 999) / 1000, seen = 0;

	for (uint32_t bucket = 0; bucket < BUCKETS; bucket++) {
		seen += sink->histogram[bucket];
		if (seen >= wanted && seen)
			return least(bucket_top(bucket), sink->counts.latency_max_ns);
	}
	return 0;
}

int64_t mcr_sink_socket_dropped(const struct mcr_sink *sink)
{
	/* The counter behind SO_RXQ_OVFL, which would tell it only with the next packet that fits. */
	uint32_t memory[SK_MEMINFO_VARS] = {};
	socklen_t length = sizeof(memory);

	if (getsockopt(sink->fd, SOL_SOCKET, SO_MEMINFO, memory, &length))
		return -errno;
	return memory[SK_MEMINFO_DROPS];
}

void mcr_sink_close(struct mcr_sink *sink)
{
	if (!sink)
		return;
	free(sink->slots);
	free(sink->received);
	free(sink);
}
