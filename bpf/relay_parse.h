/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/*
 * The one packet parser: Ethernet, VLAN tags, IPv4 or IPv6, UDP. The XDP program and the worker's
 * AF_PACKET ingress compile the same lines, so that both always give the same answer. It reads
 * nothing beyond data_end, keeps no state, and makes no decision about rules.
 */
#ifndef MCR_RELAY_PARSE_H
#define MCR_RELAY_PARSE_H

#include "relay_abi.h"

/* Values of IEEE 802 numbers and IANA protocol numbers, in host byte order. */
enum {
	MCR_ETHERTYPE_IPV4 = 0x0800,
	MCR_ETHERTYPE_IPV6 = 0x86dd,
	MCR_ETHERTYPE_VLAN = 0x8100,
	MCR_ETHERTYPE_QINQ = 0x88a8,
	MCR_PROTOCOL_HOP_BY_HOP = 0,
	MCR_PROTOCOL_UDP = 17,
	MCR_PROTOCOL_ROUTING = 43,
	MCR_PROTOCOL_FRAGMENT = 44,
	MCR_PROTOCOL_AUTHENTICATION = 51,
	MCR_PROTOCOL_DESTINATION = 60,
	MCR_ETHERNET_LENGTH = 14,
	MCR_VLAN_LENGTH = 4,
	MCR_IPV4_LENGTH = 20, /* without options */
	MCR_IPV6_LENGTH = 40,
	MCR_UDP_LENGTH = 8,
	MCR_ANY_LENGTH = 0x7fffffff, /* of a frame: the caller checks it later */
};

enum { MCR_NO_DROP = -1 };

/* What mcr_parse found. */
enum mcr_parsed {
	MCR_PARSED_OTHER = 0,	       /* nothing that a rule can match */
	MCR_PARSED_UDP = 1,	       /* a UDP header */
	MCR_PARSED_LATER_FRAGMENT = 2, /* of a UDP datagram; its ports were in the first one */
};

/* What a frame holds. The key lacks the ifindex, which the frame does not tell, and a later fragment's the port. */
struct mcr_packet {
	struct mcr_rule_key key;
	__s32 drop_reason; /* enum mcr_drop_reason, or MCR_NO_DROP */
	__u16 ip_offset;
	__u16 payload_offset;
	__u16 payload_length;
	__u8 ttl;
	__u8 tos;
	__u32 identification; /* of a fragment */
	__u32 ip_length;      /* header and all: up to 40 + 65535 */
};

/*
 * A packet's words, at any address and in network byte order. To clang's BPF back end an unaligned word is a row of
 * bytes, whereas the kernel's JITs allow any address; and a CPU waits when it loads a word that it stored in bytes.
 */
#ifdef MCR_BPF
typedef __u16 __attribute__((may_alias)) mcr_word16;
typedef __u32 __attribute__((may_alias)) mcr_word32;
#else
typedef __u16 __attribute__((may_alias, aligned(1))) mcr_word16;
typedef __u32 __attribute__((may_alias, aligned(1))) mcr_word32;
#endif

static __always_inline __u16 mcr_swap16(__u16 value)
{
	return __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? __builtin_bswap16(value) : value;
}

static __always_inline __u32 mcr_swap32(__u32 value)
{
	return __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? __builtin_bswap32(value) : value;
}

static __always_inline __u16 mcr_load_u16(const void *from)
{
	return mcr_swap16(*(const mcr_word16 *)from);
}

/* A sum of 16-bit words, or of sums of such words, in ones' complement (RFC 1071). */
static __always_inline __u16 mcr_fold(__u32 sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return (__u16)sum;
}

/* The sum of 16-bit words in memory order, which a checksum may be made of in any byte order (RFC 1071). */
static __always_inline __u32 mcr_sum(const void *from, int words)
{
	const mcr_word16 *word = from;
	__u32 sum = 0;

#pragma GCC unroll 20
	for (int i = 0; i < words; i++)
		sum += word[i];
	return sum;
}

static __always_inline void mcr_copy_words(void *to, const void *from, int words)
{
#pragma GCC unroll 4
	for (int i = 0; i < words; i++)
		((mcr_word32 *)to)[i] = ((const mcr_word32 *)from)[i];
}

/* A tag with VID 0 is a priority tag, which names no VLAN (IEEE 802.1Q). */
static __always_inline void mcr_enter_vlan(struct mcr_rule_key *key, __u16 tag)
{
	__u16 vlan = tag & 0x0fff;

	if (!vlan)
		return;
	key->vlan_outer = key->vlan;
	key->vlan = vlan;
}

static __always_inline void mcr_map_ipv4(__u8 mapped[16], const void *address)
{
	mcr_word32 *words = (mcr_word32 *)mapped;

	words[0] = 0;
	words[1] = 0;
	words[2] = mcr_swap32(0xffff);
	mcr_copy_words(words + 3, address, 1);
}

static __always_inline int mcr_is_mapped_ipv4(const __u8 address[16])
{
	const mcr_word32 *words = (const mcr_word32 *)address;

	return !(words[0] | words[1] | (words[2] ^ mcr_swap32(0xffff)));
}

/*
 * The UDP header, which must lie within the ip_end - cursor bytes that IP claims and within the data.
 * packet->drop_reason may still say why it can't be relayed.
 */
static __always_inline int mcr_parse_udp(void *data, void *data_end, void *cursor, __u32 frame_length,
					 __u32 ip_end, int fragment, struct mcr_packet *packet)
{
	__u8 *udp = cursor;
	__u32 offset = (__u8 *)cursor - (__u8 *)data;
	__u16 length;

	if ((void *)(udp + MCR_UDP_LENGTH) > data_end || ip_end < offset + MCR_UDP_LENGTH)
		return MCR_PARSED_OTHER;
	packet->key.dport = mcr_load_u16(udp + 2);
	if (!packet->key.dport)
		return MCR_PARSED_OTHER; /* port 0 is reserved (RFC 768), and means any port in a key */
	packet->payload_offset = offset + MCR_UDP_LENGTH;
	length = mcr_load_u16(udp + 4);
	packet->payload_length = ip_end - packet->payload_offset; /* unless UDP says that it is less */
	if (ip_end > frame_length)
		packet->drop_reason = MCR_DROP_TRUNCATED;
	else if (fragment)
		packet->drop_reason = MCR_DROP_FRAGMENT;
	else if (length < MCR_UDP_LENGTH || length > ip_end - offset)
		packet->drop_reason = MCR_DROP_BAD_LENGTH;
	else
		packet->payload_length = length - MCR_UDP_LENGTH;
	if (packet->drop_reason == MCR_DROP_TRUNCATED || packet->drop_reason == MCR_DROP_BAD_LENGTH)
		packet->payload_length = 0; /* nobody knows */
	return MCR_PARSED_UDP;
}

/* The part of a datagram between offset and ip_end. */
static __always_inline int mcr_later_fragment(struct mcr_packet *packet, __u32 offset, __u32 ip_end,
					      __u32 frame_length)
{
	if (ip_end < offset)
		return MCR_PARSED_OTHER;
	packet->drop_reason = ip_end > frame_length ? MCR_DROP_TRUNCATED : MCR_DROP_FRAGMENT;
	packet->payload_offset = offset;
	packet->payload_length = ip_end > frame_length ? 0 : ip_end - offset;
	return MCR_PARSED_LATER_FRAGMENT;
}

/* Whether the IPv4 header is as it was sent (RFC 791): its words and its checksum add up to all ones. */
static __always_inline int mcr_is_sound_ipv4(const __u8 *ip, const void *data_end, __u32 header_length)
{
	__u32 sum = mcr_sum(ip, MCR_IPV4_LENGTH / 2);

#pragma GCC unroll 10
	for (__u32 at = MCR_IPV4_LENGTH; at < 60; at += 4) {
		if (at >= header_length)
			break;
		if ((const void *)(ip + at + 4) > data_end)
			return 0;
		sum += mcr_sum(ip + at, 2);
	}
	return mcr_fold(sum) == 0xffff;
}

/*
 * Nobody may relay a packet whose header was damaged on its way, nor one whose time is over (RFC 1812 section 5.2.2
 * and 5.3.1). Of a damaged header no length can be believed.
 */
static __always_inline void mcr_check_header(struct mcr_packet *packet, int sound)
{
	if (packet->drop_reason == MCR_DROP_TRUNCATED)
		return;
	if (!sound) {
		packet->drop_reason = MCR_DROP_BAD_CHECKSUM;
		packet->payload_length = 0;
	} else if (!packet->ttl) {
		packet->drop_reason = MCR_DROP_TTL_EXPIRED;
	}
}

/* RFC 791. */
static __always_inline int mcr_parse_ipv4(void *data, void *data_end, void *cursor, __u32 frame_length,
					  struct mcr_packet *packet)
{
	__u8 *ip = cursor;
	__u32 header_length, total_length;
	__u16 fragment;
	int parsed;

	if ((void *)(ip + MCR_IPV4_LENGTH) > data_end || ip[0] >> 4 != 4)
		return MCR_PARSED_OTHER;
	header_length = (ip[0] & 0x0f) * 4;
	total_length = mcr_load_u16(ip + 2);
	if (header_length < MCR_IPV4_LENGTH || ip[9] != MCR_PROTOCOL_UDP)
		return MCR_PARSED_OTHER;
	fragment = mcr_load_u16(ip + 6);
	packet->ip_length = total_length;
	packet->identification = mcr_load_u16(ip + 4);
	packet->tos = ip[1];
	packet->ttl = ip[8];
	mcr_map_ipv4(packet->key.saddr, ip + 12);
	mcr_map_ipv4(packet->key.daddr, ip + 16);
	if (fragment & 0x1fff)
		parsed = mcr_later_fragment(packet, packet->ip_offset + header_length,
					    packet->ip_offset + total_length, frame_length);
	else
		parsed = mcr_parse_udp(data, data_end, ip + header_length, frame_length,
				       packet->ip_offset + total_length, fragment & 0x2000, packet);
	mcr_check_header(packet, mcr_is_sound_ipv4(ip, data_end, header_length));
	return parsed;
}

/* RFC 8200, with the extension headers that may come before UDP; RFC 4302 for the authentication header. */
static __always_inline int mcr_parse_ipv6(void *data, void *data_end, void *cursor, __u32 frame_length,
					  struct mcr_packet *packet)
{
	__u8 *ip = cursor, *header = ip + MCR_IPV6_LENGTH;
	__u32 ip_end;
	__u8 protocol;
	int fragment = 0, parsed;

	if ((void *)header > data_end || ip[0] >> 4 != 6)
		return MCR_PARSED_OTHER;
	ip_end = packet->ip_offset + MCR_IPV6_LENGTH + mcr_load_u16(ip + 4);
	packet->tos = mcr_load_u16(ip) >> 4;
	packet->ttl = ip[7];
	mcr_copy_words(packet->key.saddr, ip + 8, 4);
	mcr_copy_words(packet->key.daddr, ip + 24, 4);
	if (mcr_is_mapped_ipv4(packet->key.daddr))
		return MCR_PARSED_OTHER; /* it would pass for IPv4 */
	protocol = ip[6];
	packet->ip_length = MCR_IPV6_LENGTH + mcr_load_u16(ip + 4);
#pragma GCC unroll 8
	for (int i = 0; i < MCR_MAX_IPV6_EXTENSIONS; i++) {
		__u32 length;

		if (protocol == MCR_PROTOCOL_UDP)
			break;
		if ((void *)(header + 8) > data_end)
			return MCR_PARSED_OTHER;
		length = (header[1] + 1) * 8;
		if (protocol == MCR_PROTOCOL_FRAGMENT) {
			__u16 field = mcr_load_u16(header + 2);

			packet->identification = (__u32)mcr_load_u16(header + 4) << 16 |
						 mcr_load_u16(header + 6);
			if (field & 0xfff8 && header[0] == MCR_PROTOCOL_UDP) {
				parsed = mcr_later_fragment(packet, header + 8 - (__u8 *)data, ip_end,
							    frame_length);
				mcr_check_header(packet, 1);
				return parsed;
			}
			if (field & 0xfff8)
				return MCR_PARSED_OTHER;
			fragment |= field & 1;
			length = 8;
		} else if (protocol == MCR_PROTOCOL_AUTHENTICATION) {
			length = (header[1] + 2) * 4;
		} else if (protocol != MCR_PROTOCOL_HOP_BY_HOP && protocol != MCR_PROTOCOL_ROUTING &&
			   protocol != MCR_PROTOCOL_DESTINATION) {
			return MCR_PARSED_OTHER;
		}
		protocol = header[0];
		header += length;
	}
	if (protocol != MCR_PROTOCOL_UDP)
		return MCR_PARSED_OTHER;
	parsed = mcr_parse_udp(data, data_end, header, frame_length, ip_end, fragment, packet);
	mcr_check_header(packet, 1);
	return parsed;
}

/*
 * Parses the frame in [data, data_end) whose whole length is frame_length (more than data_end - data
 * when the driver hands over only its first buffer). tag is a VLAN tag that the device took out of the
 * frame, or 0. Returns an enum mcr_parsed, and fills *packet unless that is MCR_PARSED_OTHER.
 */
static __always_inline int mcr_parse(void *data, void *data_end, __u32 frame_length, __u16 tag,
				     struct mcr_packet *packet)
{
	__u8 *cursor = (__u8 *)data + 12;
	__u16 ethertype;

	__builtin_memset(packet, 0, sizeof(*packet));
	packet->drop_reason = MCR_NO_DROP;
	mcr_enter_vlan(&packet->key, tag);
	if ((void *)(cursor + 2) > data_end)
		return MCR_PARSED_OTHER;
	ethertype = mcr_load_u16(cursor);
	cursor += 2;
#pragma GCC unroll 2
	for (int i = 0; i < MCR_MAX_VLAN_TAGS; i++) {
		if (ethertype != MCR_ETHERTYPE_VLAN && ethertype != MCR_ETHERTYPE_QINQ)
			break;
		if ((void *)(cursor + MCR_VLAN_LENGTH) > data_end)
			return MCR_PARSED_OTHER;
		mcr_enter_vlan(&packet->key, mcr_load_u16(cursor));
		ethertype = mcr_load_u16(cursor + 2);
		cursor += MCR_VLAN_LENGTH;
	}
	packet->ip_offset = cursor - (__u8 *)data;
	if (ethertype == MCR_ETHERTYPE_IPV4)
		return mcr_parse_ipv4(data, data_end, cursor, frame_length, packet);
	if (ethertype == MCR_ETHERTYPE_IPV6)
		return mcr_parse_ipv6(data, data_end, cursor, frame_length, packet);
	return MCR_PARSED_OTHER;
}

/* The keys that may match a packet, most specific first; step 0 is (S,G,port). */
static __always_inline void mcr_widen_key(struct mcr_rule_key *key, const struct mcr_packet *packet, int step)
{
	*key = packet->key;
	if (step & 1)
		__builtin_memset(key->saddr, 0, sizeof(key->saddr));
	if (step & 2)
		key->dport = 0;
}

#endif /* MCR_RELAY_PARSE_H */
