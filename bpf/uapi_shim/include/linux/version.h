/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* An XDP program does not depend on the version that it was compiled for. */
#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + (c))
#define LINUX_VERSION_CODE KERNEL_VERSION(6, 1, 0)
