// SPDX-License-Identifier: MIT
/*
 * The loss of every privilege after set-up: another user, no capability, no way to gain one, and only the
 * system calls that the loops need. A worker that is taken over can use what it holds and open nothing; the
 * process that holds the joins can open UDP sockets and join groups on them, let its next supervisor in, and nothing
 * else.
 *
 * User, capabilities and no_new_privs are each thread's own: they go before there are egress threads, which inherit
 * the loss. The filter, which would not let a thread start, comes after that and is put on all threads at once.
 */
#include <dirent.h>
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
#include <sys/stat.h>
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

#define LOAD(field) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field))
/* The low half of an argument, which is all of an int (both architectures are little-endian). */
#define LOAD_ARGUMENT(index) LOAD(args[index])
#define RETURN(action) BPF_STMT(BPF_RET | BPF_K, action)
/* Skips so many instructions if the accumulator is the value, or is not. */
#define SKIP_IF(value, count) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, count, 0)
#define SKIP_UNLESS(value, count) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, 0, count)

#define KILL RETURN(SECCOMP_RET_KILL_PROCESS)
#define ALLOW(name) SKIP_UNLESS(SYS_##name, 1), RETURN(SECCOMP_RET_ALLOW)
#define BEGIN LOAD(arch), SKIP_IF(NATIVE_ARCH, 1), KILL, LOAD(nr)

/* On every thread. Needs no_new_privs. */
static int apply_filter(struct sock_filter *filter, size_t count)
{
	struct sock_fprog program = {.len = (unsigned short)count, .filter = filter};

#ifdef MCR_NO_SYSTEM_CALL_FILTER /* the sanitizers' runtimes need other system calls */
	(void)program;
	return 0;
#endif
	/* Above 0 it is the id of a thread that cannot have the filter. */
	return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &program) ? -1 : 0;
}

static int clear_capabilities(void)
{
	struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
	struct __user_cap_data_struct data[_LINUX_CAPABILITY_U32S_3] = {0};

	return (int)syscall(SYS_capset, &header, data);
}

/* Anything else than these kills the process (seccomp(2)), whichever thread tries it. */
static int filter_worker(void)
{
	struct sock_filter filter[] = {
		BEGIN,
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
		KILL,
	};

	return apply_filter(filter, sizeof(filter) / sizeof(filter[0]));
}

/*
 * What the loop of membership_process.py needs: sockets for UDP alone, and of their options those that join
 * and leave (RFC 3678); and to see who connects to the socket that it listens on, and what is kept.
 */
static int filter_joins(void)
{
	struct sock_filter filter[] = {
		BEGIN,
		ALLOW(recvfrom),
		ALLOW(sendto),
		ALLOW(close),
		ALLOW(clock_gettime), /* where the vDSO cannot tell the time */
		ALLOW(write),	      /* last words */
		ALLOW(exit_group),
		ALLOW(rt_sigreturn),
		ALLOW(restart_syscall),
		ALLOW(brk),
		ALLOW(mmap),
		ALLOW(mremap),
		ALLOW(munmap),
		ALLOW(madvise),
		ALLOW(accept4),
		ALLOW(getsockname), /* Python, of what it has accepted */
		ALLOW(fstat),
		ALLOW(lseek),
		ALLOW(getdents64),

		SKIP_UNLESS(SYS_getsockopt, 6),
		LOAD_ARGUMENT(1),
		SKIP_UNLESS(SOL_SOCKET, 3),
		LOAD_ARGUMENT(2),
		SKIP_UNLESS(SO_PEERCRED, 1),
		RETURN(SECCOMP_RET_ALLOW),
		KILL,

		SKIP_UNLESS(SYS_socket, 9),
		LOAD_ARGUMENT(0),
		SKIP_IF(AF_INET, 1),
		SKIP_UNLESS(AF_INET6, 5),
		LOAD_ARGUMENT(1),
		SKIP_UNLESS(SOCK_DGRAM | SOCK_CLOEXEC, 3),
		LOAD_ARGUMENT(2),
		SKIP_UNLESS(0, 1), /* the protocol */
		RETURN(SECCOMP_RET_ALLOW),
		KILL,

		SKIP_UNLESS(SYS_setsockopt, 9),
		LOAD_ARGUMENT(1),
		SKIP_IF(IPPROTO_IP, 1),
		SKIP_UNLESS(IPPROTO_IPV6, 5),
		LOAD_ARGUMENT(2),
		SKIP_IF(MCAST_JOIN_GROUP, 2),
		SKIP_IF(MCAST_LEAVE_GROUP, 1),
		SKIP_UNLESS(MCAST_JOIN_SOURCE_GROUP, 1),
		RETURN(SECCOMP_RET_ALLOW),
		KILL,

		KILL,
	};

	return apply_filter(filter, sizeof(filter) / sizeof(filter[0]));
}

static int become(uid_t user, gid_t group)
{
	return setgroups(0, NULL) || setresgid(group, group, group) || setresuid(user, user, user);
}

static int drop_privileges(void)
{
	return clear_capabilities() || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) ? -1 : 0;
}

int mcr_core_confine(void)
{
	if (drop_privileges() || filter_worker())
		return -errno;
	return 0;
}

int mcr_core_confine_joins(uint32_t user, uint32_t group)
{
	if (geteuid() == 0 && become(user, group))
		return -errno;
	if (drop_privileges() || filter_joins())
		return -errno;
	return 0;
}

/* System calls of its own: the filter knows no path, which the C library's fstat() passes. */
int mcr_core_is_kept(int links, int address)
{
	_Alignas(struct dirent64) char entries[512]; /* "." and ".." take 24 bytes each, others at most 280 */
	struct stat status;
	long filled;
	long at;

	if (syscall(SYS_fstat, address, &status) || !status.st_nlink || lseek(links, 0, SEEK_SET))
		return 0;
	filled = syscall(SYS_getdents64, links, entries, sizeof(entries));
	for (at = 0; at < filled; at += ((struct dirent64 *)(entries + at))->d_reclen) {
		const char *name = ((struct dirent64 *)(entries + at))->d_name;

		if (strcmp(name, ".") && strcmp(name, ".."))
			return 1;
	}
	return 0;
}

int confine_privileges(struct worker *worker)
{
	uid_t user = worker->setup.user_id;
	gid_t group = worker->setup.group_id;

	if (user && become(user, group))
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
	if (filter_worker())
		return worker_fail(worker, errno, "seccomp: %s", strerror(errno));
	return 0;
}
