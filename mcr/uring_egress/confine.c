// SPDX-License-Identifier: MIT
/*
 * The loss of every privilege after set-up: another user, no capability, no way to gain one, and only the
 * system calls that the loops need. A worker that is taken over can use what it holds and open nothing.
 *
 * User, capabilities and no_new_privs are each thread's own: they go before there are egress threads, which inherit
 * the loss. The filter, which would not let a thread start, comes after that and is put on all threads at once.
 */
#include <errno.h>
#include <grp.h>
#include <linux/audit.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stddef.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "core.h"

#if defined(__x86_64__)
#define NATIVE_ARCH AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define NATIVE_ARCH AUDIT_ARCH_AARCH64
#else
#error "name this architecture's AUDIT_ARCH for the seccomp filter"
#endif

#define ALLOW(name)                                                                                          \
	BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_##name, 0, 1), BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)

static int clear_capabilities(void)
{
	struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
	struct __user_cap_data_struct data[_LINUX_CAPABILITY_U32S_3] = {0};

	return (int)syscall(SYS_capset, &header, data);
}

/* Anything else than these kills the process (seccomp(2)), whichever thread tries it. Needs no_new_privs. */
static int filter_system_calls(void)
{
	struct sock_filter filter[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, NATIVE_ARCH, 1, 0),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		ALLOW(io_uring_enter),
		ALLOW(io_uring_register), /* sockets of new outputs */
		ALLOW(recvfrom),	  /* wakes the driver of an AF_XDP socket */
		ALLOW(sendmsg),		  /* replies */
		ALLOW(getsockopt),	  /* statistics */
		ALLOW(setsockopt),	  /* closes the AF_PACKET ingress */
		ALLOW(close),		  /* of descriptors that came with a command */
		ALLOW(clock_gettime),	  /* where the vDSO cannot tell the time */
		ALLOW(write),		  /* last words */
		ALLOW(exit_group),
		ALLOW(rt_sigreturn),
		ALLOW(restart_syscall),
		ALLOW(brk), /* Python, between the core's end and the exit */
		ALLOW(mmap),
		ALLOW(munmap),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
	};
	struct sock_fprog program = {.len = sizeof(filter) / sizeof(filter[0]), .filter = filter};

#ifdef MCR_NO_SYSTEM_CALL_FILTER /* the sanitizers' runtimes need other system calls */
	(void)program;
	return 0;
#endif
	/* Above 0 it is the id of a thread that cannot have the filter. */
	return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &program) ? -1 : 0;
}

static int drop_privileges(void)
{
	return clear_capabilities() || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) ? -1 : 0;
}

int mcr_core_confine(void)
{
	if (drop_privileges() || filter_system_calls())
		return -errno;
	return 0;
}

int confine_privileges(struct worker *worker)
{
	uid_t user = worker->setup.user_id;
	gid_t group = worker->setup.group_id;

	if (user && (setgroups(0, NULL) || setresgid(group, group, group) || setresuid(user, user, user)))
		return worker_fail(worker, errno, "cannot become user %u: %s", user, strerror(errno));
	/* After the change of user, which clears it. */
	if (prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0))
		return worker_fail(worker, errno, "prctl: %s", strerror(errno));
	if (drop_privileges())
		return worker_fail(worker, errno, "cannot drop privileges: %s", strerror(errno));
	return 0;
}

int confine_system_calls(struct worker *worker)
{
	if (filter_system_calls())
		return worker_fail(worker, errno, "seccomp: %s", strerror(errno));
	return 0;
}
