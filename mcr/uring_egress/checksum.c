// SPDX-License-Identifier: MIT
/*
 * The UDP checksum of what arrives (RFC 768, RFC 8200 section 8.1). An output's socket makes a new one, so a datagram
 * that was damaged on its way would leave with a checksum that says it is whole.
 */
#include <string.h>

#include "core.h"

/* Ones' complement sum of 16-bit words in memory order, an odd byte padded with zero (RFC 1071), not yet folded. */
static uint64_t sum_bytes(const uint8_t *bytes, uint32_t length)
{
	uint64_t sum = 0;
	uint32_t word = 0;

	for (; length >= sizeof(word); bytes += sizeof(word), length -= sizeof(word)) {
		memcpy(&word, bytes, sizeof(word));
		sum += word;
	}
	word = 0;
	memcpy(&word, bytes, length);
	return sum + word;
}

static uint16_t fold(uint64_t sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffffffff) + (sum >> 32);
	return mcr_fold((uint32_t)sum);
}

/*
 * Whether the checksum is right, or there is none (zero), or it is partial: a sender on this host left the plain sum
 * of the pseudo header for a device that has not completed it. With IPv6 extension headers it is not looked at: a
 * routing header would hide the address that it covers.
 */
static bool is_whole(const struct packet *packet)
{
	const uint8_t *ip = packet->frame + packet->ip_offset;
	const uint8_t *udp = packet->frame + packet->payload_offset - MCR_UDP_LENGTH;
	uint32_t length = MCR_UDP_LENGTH + packet->payload_length;
	uint16_t checksum;
	uint64_t pseudo;

	memcpy(&checksum, udp + 6, sizeof(checksum));
	if (!checksum)
		return true;
	if (*ip >> 4 == 4)
		pseudo = sum_bytes(ip + 12, 8);
	else if (udp == ip + MCR_IPV6_LENGTH)
		pseudo = sum_bytes(ip + 8, 32);
	else
		return true;
	pseudo += mcr_swap16(MCR_PROTOCOL_UDP) + mcr_swap16((uint16_t)length);
	return checksum == fold(pseudo) || fold(pseudo + sum_bytes(udp, length)) == 0xffff;
}

int checksum_verify(struct worker *worker)
{
	uint32_t whole = 0;

	for (uint32_t i = 0; i < worker->batch_count; i++) {
		struct packet *packet = &worker->batch[i];
		int status;

		if (packet->verified || is_whole(packet)) {
			worker->batch[whole++] = *packet;
			continue;
		}
		counter_add(&worker->rule_counters[packet->rule_id].dropped[MCR_DROP_BAD_CHECKSUM], 1);
		if (tap_wanted(worker))
			tap_drop(worker, packet, MCR_DROP_BAD_CHECKSUM);
		status = frames_give(worker, &packet->frame_index, 1, FRAME_RECEIVE, packet->queue);
		if (status)
			return status;
	}
	worker->batch_count = whole;
	return 0;
}
