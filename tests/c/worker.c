// SPDX-License-Identifier: MIT
/*
 * A worker without Python round it, doing what mcr/uring_egress/__main__.py does: `worker HELLO FD`. The
 * sanitizers' runtimes watch this one, from its first instruction on.
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "api.h"

int main(int argc, char **argv)
{
	char message[256] = "usage: worker HELLO FD";
	int status = -1, fd;

	signal(SIGINT, SIG_IGN);
	if (argc == 3) {
		fd = atoi(argv[2]);
		if (write(fd, argv[1], strlen(argv[1])) > 0)
			status = mcr_worker_run(fd, message, sizeof(message));
	}
	if (status)
		fprintf(stderr, "%s\n", message);
	_exit(status ? 1 : 0);
}
