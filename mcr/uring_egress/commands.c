// SPDX-License-Identifier: MIT
/*
 * The supervisor's commands: fixed-size structs over a SOCK_SEQPACKET pair, sockets by SCM_RIGHTS, read by
 * the worker's one io_uring, acknowledged one by one. A command that contradicts itself is refused with
 * -EINVAL and changes nothing; a broken socket ends the worker.
 */
#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "core.h"

int commands_arm(struct worker *worker)
{
	struct io_uring_sqe *sqe = worker_sqe(worker);

	if (!sqe)
		return worker_fail(worker, ENOSPC, "the submission queue is full");
	worker->command_vector = (struct iovec){&worker->command, sizeof(worker->command)};
	worker->command_message = (struct msghdr){
		.msg_iov = &worker->command_vector,
		.msg_iovlen = 1,
		.msg_control = worker->command_control,
		.msg_controllen = sizeof(worker->command_control),
	};
	io_uring_prep_recvmsg(sqe, worker->command_fd, &worker->command_message, MSG_CMSG_CLOEXEC);
	worker_tag(sqe, COMPLETION_COMMAND, 0);
	return 0;
}

/* The descriptors that came with the last command. They are the worker's to close. */
static uint32_t received_fds(struct worker *worker, int fds[COMMAND_FDS])
{
	struct msghdr *message = &worker->command_message;
	uint32_t count = 0;

	for (struct cmsghdr *cmsg = CMSG_FIRSTHDR(message); cmsg; cmsg = CMSG_NXTHDR(message, cmsg)) {
		if (cmsg->cmsg_level != SOL_SOCKET || cmsg->cmsg_type != SCM_RIGHTS)
			continue;
		count = (cmsg->cmsg_len - CMSG_LEN(0)) / sizeof(int);
		if (count > COMMAND_FDS)
			count = COMMAND_FDS;
		memcpy(fds, CMSG_DATA(cmsg), count * sizeof(int));
	}
	return count;
}

static void close_fds(const int *fds, uint32_t count)
{
	for (uint32_t i = 0; i < count; i++)
		close(fds[i]);
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
		memcpy(reply.message, worker->message, sizeof(reply.message) - 1);
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
	worker_fail(worker, EINVAL, "%s", cause);
	return commands_reply(worker, -EINVAL, NULL, 0, 0);
}

static void set_destination(struct output *output, const struct mcr_add_output *add)
{
	memset(&output->destination, 0, sizeof(output->destination));
	if (add->family == AF_INET) {
		output->destination.ipv4.sin_family = AF_INET;
		output->destination.ipv4.sin_port = htons(add->dport);
		memcpy(&output->destination.ipv4.sin_addr, add->daddr + 12, 4);
		output->destination_length = sizeof(output->destination.ipv4);
		return;
	}
	output->destination.ipv6.sin6_family = AF_INET6;
	output->destination.ipv6.sin6_port = htons(add->dport);
	output->destination.ipv6.sin6_scope_id = add->scope_id;
	memcpy(&output->destination.ipv6.sin6_addr, add->daddr, 16);
	output->destination_length = sizeof(output->destination.ipv6);
}

static int add_output(struct worker *worker, const int *fds, uint32_t fd_count)
{
	const struct mcr_add_output *add = &worker->command.output;
	struct output *output;
	int status;

	if (add->output_id == 0 || add->output_id >= MCR_MAX_OUTPUTS)
		return refuse(worker, "output_id out of range");
	if (add->family != AF_INET && add->family != AF_INET6)
		return refuse(worker, "an output is IPv4 or IPv6");
	if (fd_count != 1)
		return refuse(worker, "an output comes with one socket");
	status = io_uring_register_files_update(&worker->uring, add->output_id, fds, 1);
	if (status < 0) {
		worker_fail(worker, -status, "cannot register the socket of output %u: %s", add->output_id,
			    strerror(-status));
		return commands_reply(worker, status, NULL, 0, 0);
	}
	output = &worker->outputs[add->output_id];
	set_destination(output, add);
	output->flags = add->flags;
	output->gso_limit = add->gso_limit;
	output->known = true;
	return commands_reply(worker, 0, NULL, 0, 0);
}

static int delete_output(struct worker *worker)
{
	uint32_t output_id = worker->command.id;
	int nothing = -1;

	if (output_id == 0 || output_id >= MCR_MAX_OUTPUTS)
		return refuse(worker, "output_id out of range");
	for (uint32_t id = 1; id < MCR_MAX_RULES; id++) {
		const struct rule *rule = &worker->rules[id];

		for (uint32_t i = 0; rule->known && i < rule->output_count; i++)
			if (rule->output_ids[i] == output_id)
				return refuse(worker, "a rule still uses the output");
	}
	if (worker->outputs[output_id].known)
		io_uring_register_files_update(&worker->uring, output_id, &nothing, 1);
	worker->outputs[output_id].known = false;
	return commands_reply(worker, 0, NULL, 0, 0);
}

static int set_rule(struct worker *worker)
{
	const struct mcr_set_rule *set = &worker->command.rule;

	if (set->rule_id == 0 || set->rule_id >= MCR_MAX_RULES)
		return refuse(worker, "rule_id out of range");
	if (set->output_count > MCR_MAX_OUTPUTS_PER_RULE)
		return refuse(worker, "too many outputs");
	for (uint32_t i = 0; i < set->output_count; i++)
		if (set->output_ids[i] >= MCR_MAX_OUTPUTS || !worker->outputs[set->output_ids[i]].known)
			return refuse(worker, "the rule names an unknown output");
	rules_put(worker, set);
	return commands_reply(worker, 0, NULL, 0, 0);
}

static int delete_rule(struct worker *worker)
{
	uint32_t rule_id = worker->command.id;

	if (rule_id == 0 || rule_id >= MCR_MAX_RULES)
		return refuse(worker, "rule_id out of range");
	rules_remove(worker, rule_id);
	return commands_reply(worker, 0, NULL, 0, 0);
}

static int dispatch(struct worker *worker, const int *fds, uint32_t fd_count)
{
	switch (worker->command.type) {
	case MCR_ADD_OUTPUT:
		return add_output(worker, fds, fd_count);
	case MCR_DEL_OUTPUT:
		return delete_output(worker);
	case MCR_SET_RULE:
		return set_rule(worker);
	case MCR_DEL_RULE:
		return delete_rule(worker);
	case MCR_PING:
		worker->started = true;
		worker->ingress->count(worker);
		return commands_reply(worker, 0, NULL, 0, 0);
	case MCR_SHUTDOWN:
		worker->stopping = true; /* acknowledged when drained */
		return 0;
	default:
		return refuse(worker, "unknown command");
	}
}

int commands_complete(struct worker *worker, int result)
{
	int fds[COMMAND_FDS], status;
	uint32_t fd_count;

	if (result == -EINTR || result == -EAGAIN)
		return commands_arm(worker);
	if (result == 0)
		return worker_fail(worker, EPIPE, "the supervisor is gone");
	if (result < 0)
		return worker_fail(worker, -result, "cannot read commands: %s", strerror(-result));
	fd_count = received_fds(worker, fds);
	if (result != sizeof(worker->command))
		status = refuse(worker, "a command of the wrong size");
	else
		status = dispatch(worker, fds, fd_count);
	close_fds(fds, fd_count);
	if (status || worker->stopping)
		return status;
	return commands_arm(worker);
}

/* The first command, before there is an io_uring to read it with. */
int commands_receive_setup(struct worker *worker)
{
	int fds[COMMAND_FDS], sockets[MCR_MAX_QUEUES], status;
	uint32_t fd_count, socket_count = 0;
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
	fd_count = received_fds(worker, fds);
	worker->setup = worker->command.setup;
	status = setup_worker(worker, fds, fd_count, sockets, &socket_count);
	if (status) {
		commands_reply(worker, status, NULL, 0, 0);
		return status;
	}
	return commands_reply(worker, 0, sockets, socket_count, xsk_zero_copy(worker));
}
