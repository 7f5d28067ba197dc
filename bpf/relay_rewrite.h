/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/*
 * Makes of a packet what one output wants: Ethernet header, VLAN tag, addresses, port, TTL, DSCP, and every
 * checksum with them, incrementally (RFC 1624). It decides nothing but whether the TTL has expired and the
 * packet fits, and touches no payload.
 */
#ifndef MCR_RELAY_REWRITE_H
#define MCR_RELAY_REWRITE_H

#include "relay_abi.h"
#include "relay_parse.h"

enum {
	MCR_MAX_IP_OFFSET = MCR_ETHERNET_LENGTH + MCR_MAX_VLAN_TAGS * MCR_VLAN_LENGTH,
	MCR_CHECKSUM_CHUNK = 512, /* bytes that bpf_csum_diff takes at once on kernel 6.1 */
	MCR_CHECKSUM_CHUNKS = 24, /* 12 kB: beyond every jumbo frame */
};

enum { MCR_REWRITTEN = -1 };

static __always_inline __u16 mcr_fold(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return (__u16)sum;
}

static __always_inline void mcr_store_u16(void *to, __u16 value)
{
	__u8 *bytes = to;

	bytes[0] = value >> 8;
	bytes[1] = value & 0xff;
}

/* A checksum field after words that summed to `before` have been replaced by words that sum to `after`. */
static __always_inline __u16 mcr_update_checksum(__u16 field, __u16 before, __u16 after)
{
	return (__u16)~mcr_fold((__u64)(__u16)~field + (__u16)~before + after);
}

/* The sum of 16-bit words in memory order, which a checksum may be made of in any byte order (RFC 1071). */
static __always_inline __u16 mcr_sum(const void *from, int words)
{
	const __u16 *word = from;
	__u32 sum = 0;

#pragma GCC unroll 20
	for (int i = 0; i < words; i++)
		sum += word[i];
	return mcr_fold(sum);
}

/*
 * The UDP checksum field: zero, which is none, stays zero (RFC 768, RFC 6936), a partial one is the plain sum
 * of the pseudo header, whose ports the device adds later.
 */
static __always_inline void mcr_update_udp(__u8 *udp, const struct mcr_metadata *metadata,
					   __u16 addresses_before, __u16 addresses_after, bool keep_port,
					   __u16 dport)
{
	__u16 *check = (__u16 *)(udp + 6), before = addresses_before, after = addresses_after;
	__u16 port_before = *(__u16 *)(udp + 2), port_after = port_before;

	if (!keep_port) {
		mcr_store_u16(udp + 2, dport);
		port_after = *(__u16 *)(udp + 2);
	}
	if (metadata->flags & MCR_METADATA_PARTIAL) {
		*check = mcr_fold((__u64)*check + (__u16)~before + after);
		return;
	}
	if (!*check)
		return;
	before = mcr_fold((__u32)before + port_before);
	after = mcr_fold((__u32)after + port_after);
	*check = mcr_update_checksum(*check, before, after);
	if (!*check)
		*check = 0xffff; /* zero would say that there is none */
}

static __always_inline __u8 mcr_new_tos(const struct mcr_kernel_output *output, __u8 tos)
{
	if (output->flags & MCR_OUTPUT_PRESERVE_DSCP)
		return tos;
	return output->dscp << 2 | (tos & 3); /* the ECN bits are the network's (RFC 3168) */
}

static __always_inline __u8 mcr_new_ttl(const struct mcr_kernel_output *output, __u8 ttl)
{
	return output->flags & MCR_OUTPUT_DECREMENT_TTL ? ttl - 1 : output->ttl;
}

static __always_inline int mcr_rewrite_ipv4(void *data, void *data_end, const struct mcr_metadata *metadata,
					    const struct mcr_kernel_output *output, __u32 ip_offset)
{
	__u8 *ip = (__u8 *)data + ip_offset, *udp;
	__u16 before, after, header_before, header_after;

	if ((void *)(ip + 20) > data_end)
		return MCR_DROP_TRUNCATED;
	before = mcr_sum(ip + 12, 4);
	header_before = mcr_fold((__u32)before + *(__u16 *)ip + *(__u16 *)(ip + 8));
	ip[1] = mcr_new_tos(output, ip[1]);
	ip[8] = mcr_new_ttl(output, ip[8]);
	if (!(output->flags & MCR_OUTPUT_PRESERVE_SOURCE))
		__builtin_memcpy(ip + 12, output->saddr + 12, 4);
	__builtin_memcpy(ip + 16, output->daddr + 12, 4);
	after = mcr_sum(ip + 12, 4);
	header_after = mcr_fold((__u32)after + *(__u16 *)ip + *(__u16 *)(ip + 8));
	*(__u16 *)(ip + 10) = mcr_update_checksum(*(__u16 *)(ip + 10), header_before, header_after);
	if (metadata->flags & MCR_METADATA_LATER_FRAGMENT)
		return MCR_REWRITTEN;
	udp = ip + (ip[0] & 0x0f) * 4;
	if ((void *)(udp + MCR_UDP_LENGTH) > data_end)
		return MCR_DROP_TRUNCATED;
	mcr_update_udp(udp, metadata, before, after, output->flags & MCR_OUTPUT_KEEP_PORT, output->dport);
	return MCR_REWRITTEN;
}

static __always_inline int mcr_rewrite_ipv6(void *data, void *data_end, const struct mcr_metadata *metadata,
					    const struct mcr_kernel_output *output, __u32 ip_offset,
					    __u32 udp_offset)
{
	__u8 *ip = (__u8 *)data + ip_offset, *udp;
	__u16 before, after;
	__u8 tos;

	if ((void *)(ip + MCR_IPV6_LENGTH) > data_end)
		return MCR_DROP_TRUNCATED;
	before = mcr_sum(ip + 8, 16);
	tos = mcr_new_tos(output, (__u8)(mcr_load_u16(ip) >> 4));
	mcr_store_u16(ip, (mcr_load_u16(ip) & 0xf00f) | tos << 4);
	ip[7] = mcr_new_ttl(output, ip[7]);
	if (!(output->flags & MCR_OUTPUT_PRESERVE_SOURCE))
		__builtin_memcpy(ip + 8, output->saddr, 16);
	__builtin_memcpy(ip + 24, output->daddr, 16);
	after = mcr_sum(ip + 8, 16);
	if (metadata->flags & MCR_METADATA_LATER_FRAGMENT)
		return MCR_REWRITTEN;
	udp = (__u8 *)data + udp_offset;
	if ((void *)(udp + MCR_UDP_LENGTH) > data_end)
		return MCR_DROP_TRUNCATED;
	mcr_update_udp(udp, metadata, before, after, output->flags & MCR_OUTPUT_KEEP_PORT, output->dport);
	return MCR_REWRITTEN;
}

static __always_inline int mcr_rewrite_ethernet(void *data, void *data_end,
						const struct mcr_kernel_output *output, bool ipv6)
{
	__u8 *ethernet = data;
	__u16 ethertype = ipv6 ? MCR_ETHERTYPE_IPV6 : MCR_ETHERTYPE_IPV4;

	if ((void *)(ethernet + MCR_ETHERNET_LENGTH) > data_end)
		return MCR_DROP_TRUNCATED;
	__builtin_memcpy(ethernet, output->mac_destination, 6);
	__builtin_memcpy(ethernet + 6, output->mac_source, 6);
	if (!output->vlan) {
		mcr_store_u16(ethernet + 12, ethertype);
		return MCR_REWRITTEN;
	}
	if ((void *)(ethernet + MCR_ETHERNET_LENGTH + MCR_VLAN_LENGTH) > data_end)
		return MCR_DROP_TRUNCATED;
	mcr_store_u16(ethernet + 12, MCR_ETHERTYPE_VLAN);
	mcr_store_u16(ethernet + 14, output->vlan);
	mcr_store_u16(ethernet + 16, ethertype);
	return MCR_REWRITTEN;
}

/* Whether the packet may leave by the output at all. Returns an enum mcr_output_drop_reason or MCR_REWRITTEN. */
static __always_inline int mcr_admit(const struct mcr_kernel_output *output, __u8 ttl, __u32 ip_length)
{
	if (output->flags & MCR_OUTPUT_DECREMENT_TTL && ttl <= 1)
		return MCR_OUTPUT_DROP_TTL_EXPIRED;
	if (ip_length > output->mtu)
		return MCR_OUTPUT_DROP_TOO_LARGE;
	return MCR_REWRITTEN;
}

/* Rewrites the headers behind the Ethernet header, which stays for mcr_rewrite_ethernet. */
static __always_inline int mcr_rewrite_ip(void *data, void *data_end, const struct mcr_metadata *metadata,
					  const struct mcr_kernel_output *output)
{
	__u32 ip_offset = metadata->ip_offset, udp_offset = metadata->payload_offset - MCR_UDP_LENGTH;
	__u8 *ip;

	if (ip_offset < MCR_ETHERNET_LENGTH || ip_offset > MCR_MAX_IP_OFFSET || udp_offset > 0x7fff)
		return MCR_DROP_TRUNCATED;
	ip = (__u8 *)data + ip_offset;
	if ((void *)(ip + 1) > data_end)
		return MCR_DROP_TRUNCATED;
	if (*ip >> 4 == 4)
		return mcr_rewrite_ipv4(data, data_end, metadata, output, ip_offset);
	return mcr_rewrite_ipv6(data, data_end, metadata, output, ip_offset, udp_offset);
}

#endif /* MCR_RELAY_REWRITE_H */
