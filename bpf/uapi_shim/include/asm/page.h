/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* Empty: BCC includes it, an XDP program needs nothing of it. */
/* BCC sizes ring buffers in it; theirs of MCR is a multiple of every page size. */
#define PAGE_SIZE 4096
