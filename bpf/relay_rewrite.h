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
#include "relay_verifier.h"

enum {
	MCR_MAX_IP_OFFSET = MCR_ETHERNET_LENGTH + MCR_MAX_VLAN_TAGS * MCR_VLAN_LENGTH,
	MCR_IP_OFFSET_MASK = 31,
	MCR_UDP_OFFSET_MASK = 0x7fff,
	MCR_CHECKSUM_CHUNK = 512, /* bytes that bpf_csum_diff takes at once on kernel 6.1 */
	MCR_CHECKSUM_CHUNKS = 24, /* 12 kB: beyond every jumbo frame */
};

enum { MCR_REWRITTEN = -1 };

static __always_inline void mcr_store_u16(void *to, __u16 value)
{
	*(mcr_word16 *)to = mcr_swap16(value);
}

enum { MCR_NO_CHANGE = 0xffff * 32 }; /* zero in ones' complement, and more than any sum of 32 words */

/* What replacing words that sum to `before` by words that sum to `after`, 32 at the most, adds to a sum of them. */
static __always_inline __u32 mcr_change(__u32 before, __u32 after)
{
	return after + MCR_NO_CHANGE - before;
}

/* A checksum field after a change of the words that it covers (RFC 1624). */
static __always_inline __u16 mcr_update_checksum(__u16 field, __u32 change)
{
	return (__u16)~mcr_fold((__u16)~field + change);
}

/*
 * The UDP checksum field: zero, which is none, stays zero (RFC 768, RFC 6936), a partial one is the plain sum
 * of the pseudo header, whose ports the device adds later. change: of the addresses.
 */
static __always_inline void mcr_update_udp(__u8 *udp, const struct mcr_metadata *metadata, __u32 change,
					   const struct mcr_kernel_output *output)
{
	mcr_word16 *port = (mcr_word16 *)(udp + 2), *check = (mcr_word16 *)(udp + 6);
	__u16 field = *check, port_before = *port, port_after = port_before;

	if (!(output->flags & MCR_OUTPUT_KEEP_PORT)) {
		port_after = mcr_swap16(output->dport);
		*port = port_after;
	}
	if (metadata->flags & MCR_METADATA_PARTIAL) {
		*check = mcr_fold(field + change);
		return;
	}
	if (!field)
		return;
	field = mcr_update_checksum(field, change + mcr_change(port_before, port_after));
	*check = field ? field : 0xffff; /* zero would say that there is none */
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

/* Puts addresses of so many 32-bit words in place, and returns what that changes in a sum. */
static __always_inline __u32 mcr_rewrite_addresses(__u8 *from, const struct mcr_kernel_output *output,
						   int words)
{
	const __u8 *saddr = output->saddr + 16 - 4 * words, *daddr = output->daddr + 16 - 4 * words;
	__u8 *to = from + 4 * words;
	__u32 before = mcr_sum(to, 2 * words), after = mcr_sum(daddr, 2 * words);

	mcr_copy_words(to, daddr, words);
	if (!(output->flags & MCR_OUTPUT_PRESERVE_SOURCE)) {
		before += mcr_sum(from, 2 * words);
		after += mcr_sum(saddr, 2 * words);
		mcr_copy_words(from, saddr, words);
	}
	return mcr_change(before, after);
}

static __always_inline int mcr_rewrite_ipv4(void *data, void *data_end, const struct mcr_metadata *metadata,
					    const struct mcr_kernel_output *output, __u32 ip_offset)
{
	__u8 *ip = (__u8 *)data + mcr_bounded(ip_offset, MCR_IP_OFFSET_MASK), *udp;
	__u16 first, first_after, hops, hops_after; /* version, length and TOS; TTL and protocol */
	mcr_word16 *check = (mcr_word16 *)(ip + 10);
	__u32 change;

	if ((void *)(ip + 20) > data_end)
		return MCR_DROP_TRUNCATED;
	first = mcr_load_u16(ip);
	first_after = (first & 0xff00) | mcr_new_tos(output, first);
	hops = mcr_load_u16(ip + 8);
	hops_after = (hops & 0xff) | mcr_new_ttl(output, hops >> 8) << 8;
	mcr_store_u16(ip, first_after);
	mcr_store_u16(ip + 8, hops_after);
	change = mcr_rewrite_addresses(ip + 12, output, 1);
	*check = mcr_update_checksum(*check,
				     change + mcr_change(mcr_swap16(first) + mcr_swap16(hops),
							 mcr_swap16(first_after) + mcr_swap16(hops_after)));
	if (metadata->flags & MCR_METADATA_LATER_FRAGMENT)
		return MCR_REWRITTEN;
	udp = ip + (first >> 8 & 0x0f) * 4;
	if ((void *)(udp + MCR_UDP_LENGTH) > data_end)
		return MCR_DROP_TRUNCATED;
	mcr_update_udp(udp, metadata, change, output);
	return MCR_REWRITTEN;
}

static __always_inline int mcr_rewrite_ipv6(void *data, void *data_end, const struct mcr_metadata *metadata,
					    const struct mcr_kernel_output *output, __u32 ip_offset,
					    __u32 udp_offset)
{
	__u8 *ip = (__u8 *)data + mcr_bounded(ip_offset, MCR_IP_OFFSET_MASK), *udp;
	__u16 first; /* version, traffic class, and the start of the flow label */
	__u32 change;

	if ((void *)(ip + MCR_IPV6_LENGTH) > data_end)
		return MCR_DROP_TRUNCATED;
	first = mcr_load_u16(ip);
	mcr_store_u16(ip, (first & 0xf00f) | mcr_new_tos(output, (__u8)(first >> 4)) << 4);
	ip[7] = mcr_new_ttl(output, ip[7]);
	change = mcr_rewrite_addresses(ip + 8, output, 4);
	if (metadata->flags & MCR_METADATA_LATER_FRAGMENT)
		return MCR_REWRITTEN;
	udp = (__u8 *)data + mcr_bounded(udp_offset, MCR_UDP_OFFSET_MASK);
	if ((void *)(udp + MCR_UDP_LENGTH) > data_end)
		return MCR_DROP_TRUNCATED;
	mcr_update_udp(udp, metadata, change, output);
	return MCR_REWRITTEN;
}

static __always_inline int mcr_rewrite_ethernet(void *data, void *data_end,
						const struct mcr_kernel_output *output, bool ipv6)
{
	__u8 *ethernet = data;
	__u16 ethertype = ipv6 ? MCR_ETHERTYPE_IPV6 : MCR_ETHERTYPE_IPV4;

	if ((void *)(ethernet + MCR_ETHERNET_LENGTH) > data_end)
		return MCR_DROP_TRUNCATED;
	mcr_copy_words(ethernet, output->mac_destination, 3); /* and mac_source behind it */
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

	if (ip_offset < MCR_ETHERNET_LENGTH || ip_offset > MCR_MAX_IP_OFFSET ||
	    udp_offset > MCR_UDP_OFFSET_MASK)
		return MCR_DROP_TRUNCATED;
	ip = (__u8 *)data + mcr_bounded(ip_offset, MCR_IP_OFFSET_MASK);
	if ((void *)(ip + 1) > data_end)
		return MCR_DROP_TRUNCATED;
	if (*ip >> 4 == 4)
		return mcr_rewrite_ipv4(data, data_end, metadata, output, ip_offset);
	return mcr_rewrite_ipv6(data, data_end, metadata, output, ip_offset, udp_offset);
}

#endif /* MCR_RELAY_REWRITE_H */
