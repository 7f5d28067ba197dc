/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* Empty: BCC brings its own copy of this header; a second one would define everything twice. */
