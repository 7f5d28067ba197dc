// SPDX-License-Identifier: MIT
/*
 * The supervisor's commands: fixed-size structs over a SOCK_SEQPACKET pair, sockets by SCM_RIGHTS, read by
 * the ingress thread's io_uring, acknowledged one by one. A command that contradicts itself is refused with
 * -EINVAL and changes nothing; a broken socket ends the worker.
 *
 * With egress threads a command goes to all of them, behind the packets that came before it, and packets go on
 * meanwhile. It is acknowledged, and the next one is read, when every thread has acknowledged it.
 */
#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "threads.h"

int commands_arm(struct worker *worker)
{
	struct io_uring_sqe *sqe = reactor_sqe(&worker->reactor);

	if (!sqe)
		return -ENOSPC;
	worker->command_vector = (struct iovec){&worker->command, sizeof(worker->command)};
	worker->command_message = (struct msghdr){
		.msg_iov = &worker->command_vector,
		.msg_iovlen = 1,
		.msg_control = worker->command_control,
		.msg_controllen = sizeof(worker->command_control),
	};
	io_uring_prep_recvmsg(sqe, worker->command_fd, &worker->command_message, MSG_CMSG_CLOEXEC);
	reactor_tag(sqe, COMPLETION_COMMAND, 0);
	return 0;
}

/* Takes the descriptors that came with the command. They are the worker's to close. */
static void receive_fds(struct worker *worker)
{
	struct msghdr *message = &worker->command_message;
	uint32_t count = 0;

	for (struct cmsghdr *cmsg = CMSG_FIRSTHDR(message); cmsg; cmsg = CMSG_NXTHDR(message, cmsg)) {
		if (cmsg->cmsg_level != SOL_SOCKET || cmsg->cmsg_type != SCM_RIGHTS)
			continue;
		count = (cmsg->cmsg_len - CMSG_LEN(0)) / sizeof(int);
		if (count > COMMAND_FDS)
			count = COMMAND_FDS;
		memcpy(worker->command_fds, CMSG_DATA(cmsg), count * sizeof(int));
	}
	worker->command_fd_count = count;
}

int commands_reply(struct worker *worker, int status, const int *fds, uint32_t fd_count, uint32_t zero_copy)
{
	struct mcr_reply reply = {
		.type = worker->command.type,
		.sequence = worker->command.sequence,
		.status = status,
		.zero_copy = zero_copy,
	};
	struct iovec vector = {&reply, sizeof(reply)};
	_Alignas(struct cmsghdr) char control[CMSG_SPACE(MCR_MAX_QUEUES * sizeof(int))] = {0};
	struct msghdr message = {.msg_iov = &vector, .msg_iovlen = 1};

	if (status)
		memcpy(reply.message, worker->reactor.message, sizeof(reply.message) - 1);
	if (fd_count) {
		struct cmsghdr *cmsg = (struct cmsghdr *)control;

		message.msg_control = control;
		message.msg_controllen = CMSG_SPACE(fd_count * sizeof(int));
		cmsg->cmsg_level = SOL_SOCKET;
		cmsg->cmsg_type = SCM_RIGHTS;
		cmsg->cmsg_len = CMSG_LEN(fd_count * sizeof(int));
		memcpy(CMSG_DATA(cmsg), fds, fd_count * sizeof(int));
	}
	if (sendmsg(worker->command_fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL) != sizeof(reply))
		return worker_fail(worker, errno, "the supervisor takes no replies: %s", strerror(errno));
	return 0;
}

static int refuse(struct worker *worker, const char *cause)
{
	return worker_fail(worker, EINVAL, "%s", cause);
}

/* Carries out a command that has been checked, here or in every egress thread. */
static int apply(struct worker *worker, int fd)
{
	if (!worker->pipes)
		return egress_apply(&worker->egress, &worker->command, fd);
	tables_apply(&worker->tables, &worker->command);
	return pipes_command(worker, fd);
}

static int add_output(struct worker *worker)
{
	const struct mcr_add_output *add = &worker->command.output;
	int status;

	if (add->output_id == 0 || add->output_id >= MCR_MAX_OUTPUTS)
		return refuse(worker, "output_id out of range");
	if (add->family != AF_INET && add->family != AF_INET6)
		return refuse(worker, "an output is IPv4 or IPv6");
	if (worker->command_fd_count != 1)
		return refuse(worker, "an output comes with one socket");
	status = apply(worker, worker->command_fds[0]);
	if (status)
		worker_fail(worker, -status, "cannot register the socket of output %u: %s", add->output_id,
			    strerror(-status));
	return status;
}

static int delete_output(struct worker *worker)
{
	uint32_t output_id = worker->command.id;

	if (output_id == 0 || output_id >= MCR_MAX_OUTPUTS)
		return refuse(worker, "output_id out of range");
	for (uint32_t id = 1; id < MCR_MAX_RULES; id++) {
		const struct rule *rule = &worker->tables.rules[id];

		for (uint32_t i = 0; rule->known && i < rule->output_count; i++)
			if (rule->output_ids[i] == output_id)
				return refuse(worker, "a rule still uses the output");
	}
	return apply(worker, -1);
}

static int set_rule(struct worker *worker)
{
	const struct mcr_set_rule *set = &worker->command.rule;
	const struct rule *rule;
	bool moved;
	int status;

	if (set->rule_id == 0 || set->rule_id >= MCR_MAX_RULES)
		return refuse(worker, "rule_id out of range");
	if (set->output_count > MCR_MAX_OUTPUTS_PER_RULE)
		return refuse(worker, "too many outputs");
	for (uint32_t i = 0; i < set->output_count; i++)
		if (set->output_ids[i] >= MCR_MAX_OUTPUTS ||
		    !worker->tables.outputs[set->output_ids[i]].known)
			return refuse(worker, "the rule names an unknown output");
	rule = &worker->tables.rules[set->rule_id];
	moved = rule->known && memcmp(&rule->key, &set->key, sizeof(set->key)) != 0;
	status = apply(worker, -1);
	rules_index(worker, moved ? 0 : set->rule_id);
	return status;
}

static int delete_rule(struct worker *worker)
{
	uint32_t rule_id = worker->command.id;
	int status;

	if (rule_id == 0 || rule_id >= MCR_MAX_RULES)
		return refuse(worker, "rule_id out of range");
	status = apply(worker, -1);
	rules_index(worker, 0);
	return status;
}

/* Returns what is to be replied, or is of no account because threads are to acknowledge it first. */
static int dispatch(struct worker *worker)
{
	switch (worker->command.type) {
	case MCR_ADD_OUTPUT:
		return add_output(worker);
	case MCR_DEL_OUTPUT:
		return delete_output(worker);
	case MCR_SET_RULE:
		return set_rule(worker);
	case MCR_DEL_RULE:
		return delete_rule(worker);
	case MCR_PING:
		worker->started = true;
		return apply(worker, -1); /* every thread gives a sign of life */
	case MCR_SHUTDOWN:
		worker->stopping = true; /* acknowledged when drained */
		return 0;
	default:
		return refuse(worker, "unknown command");
	}
}

static int finish(struct worker *worker, int status)
{
	for (uint32_t i = 0; i < worker->command_fd_count; i++)
		close(worker->command_fds[i]);
	worker->command_fd_count = 0;
	if (worker->command.type == MCR_PING)
		worker->ingress->count(worker);
	status = commands_reply(worker, status, NULL, 0, 0);
	return status ? status : commands_arm(worker);
}

/* A command has arrived: result is that of the receive. */
int commands_handle(struct worker *worker, int result)
{
	int status;

	if (result == -EINTR || result == -EAGAIN)
		return commands_arm(worker);
	if (result == 0)
		return worker_fail(worker, EPIPE, "the supervisor is gone");
	if (result < 0)
		return worker_fail(worker, -result, "cannot read commands: %s", strerror(-result));
	receive_fds(worker);
	worker->command_status = 0;
	if (result == sizeof(worker->command))
		status = dispatch(worker);
	else
		status = refuse(worker, "a command of the wrong size");
	if (worker->stopping || worker->acks_awaited)
		return 0;
	return finish(worker, status);
}

/* An egress thread has carried out the command, or could not. */
int commands_acknowledge(struct worker *worker, int status)
{
	if (!worker->acks_awaited)
		return worker_fail(worker, EPROTO, "an egress thread acknowledged what it was not told");
	if (status) {
		worker->command_status = status;
		worker_fail(worker, -status, "an egress thread cannot register the socket: %s",
			    strerror(-status));
	}
	if (--worker->acks_awaited)
		return 0;
	return finish(worker, worker->command_status);
}

/* The first command, before there is an io_uring to read it with. */
int commands_receive_setup(struct worker *worker)
{
	int sockets[MCR_MAX_QUEUES], status;
	uint32_t socket_count = 0;
	ssize_t length;

	worker->command_vector = (struct iovec){&worker->command, sizeof(worker->command)};
	worker->command_message = (struct msghdr){
		.msg_iov = &worker->command_vector,
		.msg_iovlen = 1,
		.msg_control = worker->command_control,
		.msg_controllen = sizeof(worker->command_control),
	};
	length = recvmsg(worker->command_fd, &worker->command_message, MSG_CMSG_CLOEXEC);
	if (length != sizeof(worker->command) || worker->command.type != MCR_SETUP)
		return worker_fail(worker, EPROTO, "the first command is no set-up");
	receive_fds(worker);
	worker->setup = worker->command.setup;
	status = setup_worker(worker, sockets, &socket_count);
	worker->command_fd_count = 0;
	if (status) {
		commands_reply(worker, status, NULL, 0, 0);
		return status;
	}
	return commands_reply(worker, 0, sockets, socket_count, xsk_zero_copy(worker));
}
