/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/*
 * How a value's bound is shown to the verifier, so that each one from Linux 6.1 on follows it in the code of each
 * compiler from LLVM 14 on. A compiler may check one copy of a value and then use another that it left on the stack,
 * of which an older verifier knows no bound; it may turn a loop that counts up into one that counts down from a value
 * without a bound; and it removes a check that it knows to be true. Only BPF programs include this.
 */
#ifndef MCR_RELAY_VERIFIER_H
#define MCR_RELAY_VERIFIER_H

/* value, which lies within mask, a power of two less one: to be used right where a pointer is made of it. */
#define mcr_bounded(value, mask)                                                                             \
	({                                                                                                   \
		u64 bounded = (value);                                                                       \
		asm volatile("%0 &= %1" : "+r"(bounded) : "i"((int)(mask)));                                 \
		bounded;                                                                                     \
	})

/* From here on the compiler knows nothing of the variable: of a loop's counter, it keeps to what the source says. */
#define mcr_opaque(variable) asm volatile("" : "+r"(variable))

#endif /* MCR_RELAY_VERIFIER_H */
