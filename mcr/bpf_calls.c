// SPDX-License-Identifier: MIT
/* Glue over libbpf: the calls whose options cffi cannot spell. It decides nothing. */
#include <bpf/bpf.h>
#include <bpf/btf.h>
#include <bpf/libbpf.h>
#include <errno.h>
#include <linux/if_link.h>
#include <linux/magic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/vfs.h>
#include <unistd.h>
#include "bpf_calls.h"

/* Of the kernel's include/linux/bpf_verifier.h, which it does not export. */
enum { BPF_LOG_LEVEL1 = 1, BPF_LOG_STATS = 4 };

int mcr_load_program(int kind, const char *name, const void *instructions, size_t count, char *log,
		     size_t log_size)
{
	enum bpf_prog_type type = kind == MCR_PROGRAM_RAW_TRACEPOINT ? BPF_PROG_TYPE_RAW_TRACEPOINT
								     : BPF_PROG_TYPE_XDP;
	LIBBPF_OPTS(bpf_prog_load_opts, options, .log_level = BPF_LOG_STATS, .log_buf = log,
		    .log_size = log_size);
	int fd;

	if (type == BPF_PROG_TYPE_XDP)
		options.prog_flags = BPF_F_XDP_HAS_FRAGS;
	if (kind == MCR_PROGRAM_DEVMAP)
		options.expected_attach_type = BPF_XDP_DEVMAP;
	fd = bpf_prog_load(type, name, "Dual MIT/GPL", instructions, count, &options);
	if (fd >= 0)
		return fd;
	/* Once more for the verifier's words: they cost time, and most loads succeed. */
	options.log_level = BPF_LOG_LEVEL1;
	return bpf_prog_load(type, name, "Dual MIT/GPL", instructions, count, &options);
}

/* Members of unnamed structs and unions inside count as members. */
static int member_offset(const struct btf *btf, const struct btf_type *type, const char *member)
{
	const struct btf_member *members = btf_members(type);

	for (int i = 0; i < btf_vlen(type); i++) {
		const char *name = btf__name_by_offset(btf, members[i].name_off);
		const struct btf_type *inner = btf__type_by_id(btf, members[i].type);
		int offset = (int)btf_member_bit_offset(type, i) / 8, inside;

		if (strcmp(name, member) == 0)
			return offset;
		if (*name || !btf_is_composite(inner))
			continue;
		inside = member_offset(btf, inner, member);
		if (inside >= 0)
			return offset + inside;
	}
	return -ENOENT;
}

int mcr_member_offset(const char *struct_name, const char *member)
{
	struct btf *btf = btf__load_vmlinux_btf();
	int id, offset;

	if (!btf)
		return -errno;
	id = btf__find_by_name_kind(btf, struct_name, BTF_KIND_STRUCT);
	offset = id < 0 ? id : member_offset(btf, btf__type_by_id(btf, id), member);
	btf__free(btf);
	return offset;
}

int mcr_create_device_set(uint32_t entries)
{
	return bpf_map_create(BPF_MAP_TYPE_DEVMAP, "device_set", sizeof(uint32_t),
			      sizeof(struct bpf_devmap_val), entries, NULL);
}

int mcr_link_xdp(int prog_fd, int ifindex, int generic)
{
	LIBBPF_OPTS(bpf_link_create_opts, options,
		    .flags = generic ? XDP_FLAGS_SKB_MODE : XDP_FLAGS_DRV_MODE);

	return bpf_link_create(prog_fd, ifindex, BPF_XDP, &options);
}

int mcr_link_target(int link_fd, uint32_t *program_id)
{
	struct bpf_link_info info = {};
	uint32_t length = sizeof(info);
	int status = bpf_obj_get_info_by_fd(link_fd, &info, &length);

	*program_id = info.prog_id;
	return status ? status : (int)info.xdp.ifindex;
}

int mcr_program_id(int prog_fd)
{
	struct bpf_prog_info info = {};
	uint32_t length = sizeof(info);
	int status = bpf_obj_get_info_by_fd(prog_fd, &info, &length);

	return status ? status : (int)info.id;
}

int mcr_program_name(uint32_t id, char name[16])
{
	struct bpf_prog_info info = {};
	uint32_t length = sizeof(info);
	int fd = bpf_prog_get_fd_by_id(id), status;

	if (fd < 0)
		return fd;
	status = bpf_obj_get_info_by_fd(fd, &info, &length);
	close(fd);
	if (!status)
		memcpy(name, info.name, 16);
	return status;
}

int mcr_test_run(int prog_fd, void *frame, uint32_t length, uint32_t headroom, uint32_t ifindex,
		 uint32_t queue, void *out, uint32_t out_size, uint32_t *out_length, uint32_t *meta_length,
		 uint32_t *verdict)
{
	struct xdp_md in = {.data = headroom,
			    .data_end = headroom + length,
			    .ingress_ifindex = ifindex,
			    .rx_queue_index = queue};
	struct xdp_md after = {};
	LIBBPF_OPTS(bpf_test_run_opts, options, .data_in = frame, .data_size_in = headroom + length,
		    .data_out = out, .data_size_out = out_size, .ctx_in = &in, .ctx_size_in = sizeof(in),
		    .ctx_out = &after, .ctx_size_out = sizeof(after), .repeat = 1);
	int status = bpf_prog_test_run_opts(prog_fd, &options);

	*out_length = options.data_size_out;
	*meta_length = after.data - after.data_meta;
	*verdict = options.retval;
	return status;
}

int mcr_rule_totals(int stats_fd, const struct mcr_rule_counters *workers,
		    const struct mcr_rule_counters *settled, const uint32_t *ids, uint32_t count,
		    struct mcr_rule_counters *totals)
{
	int cpus = libbpf_num_possible_cpus(), status = 0;
	struct mcr_rule_stats *stats;

	if (cpus < 0)
		return cpus;
	stats = calloc(cpus, sizeof(*stats));
	if (!stats)
		return -ENOMEM;
	for (uint32_t i = 0; i < count && !status; i++) {
		struct mcr_rule_counters *total = &totals[i];

		status = bpf_map_lookup_elem(stats_fd, &ids[i], stats);
		*total = workers[ids[i]];
		for (int reason = 0; reason < MCR_DROP_REASONS; reason++)
			total->dropped[reason] += settled[ids[i]].dropped[reason];
		for (int cpu = 0; cpu < cpus && !status; cpu++) {
			total->received_packets += stats[cpu].packets;
			total->received_bytes += stats[cpu].bytes;
			if (total->last_seen_ns < stats[cpu].last_seen_ns)
				total->last_seen_ns = stats[cpu].last_seen_ns;
			total->relayed_packets += stats[cpu].relayed_packets;
			total->relayed_bytes += stats[cpu].relayed_bytes;
			for (int reason = 0; reason < MCR_DROP_REASONS; reason++)
				total->dropped[reason] += stats[cpu].dropped[reason];
		}
	}
	free(stats);
	return status;
}

int mcr_output_totals(int stats_fd, const struct mcr_output_counters *workers,
		      const struct mcr_output_counters *settled, const uint32_t *ids, uint32_t count,
		      struct mcr_output_counters *totals)
{
	int cpus = libbpf_num_possible_cpus(), status = 0;
	struct mcr_output_stats *stats;

	if (cpus < 0)
		return cpus;
	stats = calloc(cpus, sizeof(*stats));
	if (!stats)
		return -ENOMEM;
	for (uint32_t i = 0; i < count && !status; i++) {
		struct mcr_output_counters *total = &totals[i];

		status = bpf_map_lookup_elem(stats_fd, &ids[i], stats);
		*total = workers[ids[i]];
		total->relayed_packets += settled[ids[i]].relayed_packets;
		for (int reason = 0; reason < MCR_OUTPUT_DROP_REASONS; reason++)
			total->dropped[reason] += settled[ids[i]].dropped[reason];
		for (int cpu = 0; cpu < cpus && !status; cpu++) {
			total->relayed_packets += stats[cpu].relayed_packets;
			total->sent_packets += stats[cpu].sent_packets;
			total->sent_bytes += stats[cpu].sent_bytes;
			for (int reason = 0; reason < MCR_OUTPUT_DROP_REASONS; reason++)
				total->dropped[reason] += stats[cpu].dropped[reason];
		}
	}
	free(stats);
	return status;
}

void mcr_latency_octaves(const struct mcr_latency *rules, const uint32_t *ids, uint32_t count,
			 uint64_t *octaves)
{
	/* Bucket 0 is below 2^FIRST_BITS, and every octave after it has 2^STEP_BITS buckets. */
	const int first = 1 + ((MCR_OCTAVE_FIRST_BITS - MCR_LATENCY_FIRST_BITS) << MCR_LATENCY_STEP_BITS);

	for (uint32_t i = 0; i < count; i++, octaves += MCR_OCTAVE_COLUMNS) {
		const struct mcr_latency *latency = &rules[ids[i]];
		uint64_t packets = 0;
		int octave = 0;

		for (int bucket = 0; bucket < MCR_LATENCY_BUCKETS; bucket++) {
			if (octave < MCR_OCTAVES && bucket == first + (octave << MCR_LATENCY_STEP_BITS))
				octaves[octave++] = packets;
			packets += latency->buckets[bucket];
		}
		octaves[MCR_OCTAVES] = packets;
		octaves[MCR_OCTAVES + 1] = latency->sum_ns;
	}
}

int mcr_mount_bpffs(const char *path)
{
	return mount("bpf", path, "bpf", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=0700") ? -errno : 0;
}

int mcr_is_bpffs(const char *path)
{
	struct statfs info;

	return statfs(path, &info) ? -errno : info.f_type == BPF_FS_MAGIC;
}
