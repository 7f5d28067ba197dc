/* SPDX-License-Identifier: MIT */
/* What Python calls of the worker's C core. */
#ifndef MCR_API_H
#define MCR_API_H

#include <stddef.h>
#include <stdint.h>

#include "relay_parse.h"

/*
 * Runs a worker on its end of the command socket until it is shut down. Returns 0, or -errno with the cause
 * in message. The process is expected to end after it: nothing is taken apart.
 */
int mcr_worker_run(int command_fd, char *message, size_t message_size);

/* For the tests: what the AF_PACKET ingress would find in a frame, as mcr_parse. */
int mcr_core_parse(uint8_t *frame, uint32_t captured, uint32_t length, uint16_t tag,
		   struct mcr_packet *parsed);

/* For the tests: the bucket of struct mcr_latency that counts this time. */
uint32_t mcr_core_latency_bucket(uint64_t time_ns);

/* For the tests: the confinement of a worker, on the calling process. Returns 0 or -errno. */
int mcr_core_confine(void);

/*
 * The confinement of the process that holds the joins, on the calling process: as that user if it is root.
 * Returns 0 or -errno.
 */
int mcr_core_confine_joins(uint32_t user, uint32_t group);

/* Whether a directory has an entry, and the file at an address, an open path, still its name. */
int mcr_core_is_kept(int links, int address);

#endif /* MCR_API_H */
