/* SPDX-License-Identifier: MIT */
/* What Python calls of libbpf beside its plain functions. Everything returns 0, a descriptor, or -errno. */
#ifndef MCR_BPF_CALLS_H
#define MCR_BPF_CALLS_H

#include <stddef.h>
#include <stdint.h>
#include "relay_abi.h"

enum mcr_program_kind {
	MCR_PROGRAM_XDP = 1,
	MCR_PROGRAM_DEVMAP = 2, /* runs on each frame that a device map redirects */
	MCR_PROGRAM_RAW_TRACEPOINT = 3,
};

/*
 * Loads a program; XDP programs accept frames of several buffers. log gets the verifier's statistics, or its words
 * if it refuses.
 */
int mcr_load_program(int kind, const char *name, const void *instructions, size_t count, char *log,
		     size_t log_size);

/* The offset in bytes of a member of a kernel struct, from the running kernel's BTF. */
int mcr_member_offset(const char *struct_name, const char *member);

/* A device map with the layout of device_set_shape. */
int mcr_create_device_set(uint32_t entries);

/* A bpf_link of the program to an interface: in the driver, or generic. */
int mcr_link_xdp(int prog_fd, int ifindex, int generic);

/* The interface that an XDP link is attached to, 0 if it has been detached, and the program that it runs. */
int mcr_link_target(int link_fd, uint32_t *program_id);

/* The id of an open program. */
int mcr_program_id(int prog_fd);

/* The name of any loaded program. */
int mcr_program_name(uint32_t id, char name[16]);

/* BPF_PROG_TEST_RUN: frame holds `headroom` bytes of metadata that is there already, then the packet. */
int mcr_test_run(int prog_fd, void *frame, uint32_t length, uint32_t headroom, uint32_t ifindex,
		 uint32_t queue, void *out, uint32_t out_size, uint32_t *out_length, uint32_t *meta_length,
		 uint32_t *verdict);

/*
 * What XDP counted on every CPU (stats_fd, a per-CPU map) together with what the workers counted (a whole map,
 * mapped), for these ids: totals[i] is of ids[i]. One call for all of them, so that a reader of thousands
 * holds Python's lock for none of it.
 */
int mcr_rule_totals(int stats_fd, const struct mcr_rule_counters *workers,
		    const struct mcr_rule_counters *settled, const uint32_t *ids, uint32_t count,
		    struct mcr_rule_counters *totals);
int mcr_output_totals(int stats_fd, const struct mcr_output_counters *workers,
		      const struct mcr_output_counters *settled, const uint32_t *ids, uint32_t count,
		      struct mcr_output_counters *totals);

/*
 * Latency by octave, for these rules: octaves[i * MCR_OCTAVE_COLUMNS] on are, for ids[i], the packets below
 * 2^MCR_OCTAVE_FIRST_BITS ns, below twice that and so on, then all of them, then the sum of their times in ns.
 */
enum mcr_octave {
	MCR_OCTAVE_FIRST_BITS = 10,
	MCR_OCTAVES = 21, /* up to 1.07 s */
	MCR_OCTAVE_COLUMNS = 23,
};

void mcr_latency_octaves(const struct mcr_latency *rules, const uint32_t *ids, uint32_t count,
			 uint64_t *octaves);

/* Reads what the traced programs and the workers tell, from tap_events and tap_reports. NULL and errno. */
struct mcr_tap_reader *mcr_tap_open(int events_fd, int reports_fd);

/* Copies events, each a struct mcr_tap_event with the bytes that it says follow, until there are no more or no room. */
long mcr_tap_read(struct mcr_tap_reader *reader, void *buffer, size_t size);

/* Asks the workers to report, or no longer. */
void mcr_tap_want_reports(struct mcr_tap_reader *reader, int wanted);

/* Reports that were written over before they were read. */
uint64_t mcr_tap_missed(const struct mcr_tap_reader *reader);

void mcr_tap_close(struct mcr_tap_reader *reader);

int mcr_mount_bpffs(const char *path);

/* 1 or 0. */
int mcr_is_bpffs(const char *path);

#endif /* MCR_BPF_CALLS_H */
