// SPDX-License-Identifier: MIT
/*
 * A worker without Python round it, as mcr/uring_egress/__main__.py starts it: `worker FD`. The sanitizers'
 * runtimes watch this one, from its first instruction on.
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "api.h"

int main(int argc, char **argv)
{
	char message[256] = "usage: worker FD";
	int status = -1;

	signal(SIGINT, SIG_IGN);
	if (argc == 2)
		status = mcr_worker_run(atoi(argv[1]), message, sizeof(message));
	if (status)
		fprintf(stderr, "%s\n", message);
	_exit(status ? 1 : 0);
}
