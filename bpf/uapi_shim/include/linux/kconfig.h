/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* The two kernel options that BCC's helpers ask for. */
#define CONFIG_BPF_SYSCALL 1
#define CONFIG_BPF_JIT 1
