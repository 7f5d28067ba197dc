/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* Empty: BCC includes it, an XDP program needs nothing of it. */
