// SPDX-License-Identifier: MIT
/*
 * How long packets took, into a rule's histogram (struct mcr_latency). Packets that are sent together arrived
 * together, so that most of them fall into one bucket: it is added to once for them all.
 */
#include "core.h"

uint32_t mcr_core_latency_bucket(uint64_t time_ns)
{
	uint32_t octave, step, bucket;

	if (time_ns < 1U << MCR_LATENCY_FIRST_BITS)
		return 0;
	octave = 63 - (uint32_t)__builtin_clzll(time_ns) - MCR_LATENCY_FIRST_BITS;
	step = (uint32_t)(time_ns >> (octave + MCR_LATENCY_FIRST_BITS - MCR_LATENCY_STEP_BITS)) &
	       ((1U << MCR_LATENCY_STEP_BITS) - 1);
	bucket = 1 + (octave << MCR_LATENCY_STEP_BITS) + step;
	return bucket < MCR_LATENCY_BUCKETS ? bucket : MCR_LATENCY_BUCKETS - 1;
}

static void raise_to(__u64 *maximum, uint64_t value)
{
	__u64 seen = __atomic_load_n(maximum, __ATOMIC_RELAXED);

	while (value > seen &&
	       !__atomic_compare_exchange_n(maximum, &seen, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
		;
}

/* Adds `count` packets that arrived at these times and whose send had completed at now_ns. */
void latency_add(struct mcr_latency *latency, const uint64_t *rx_times_ns, uint32_t count, uint64_t now_ns)
{
	uint64_t sum_ns = 0, max_ns = 0;
	uint32_t bucket = 0, in_bucket = 0;

	for (uint32_t i = 0; i < count; i++) {
		/* Clocks of two CPUs may differ by a little. */
		uint64_t time_ns = now_ns > rx_times_ns[i] ? now_ns - rx_times_ns[i] : 0;
		uint32_t its_bucket = mcr_core_latency_bucket(time_ns);

		sum_ns += time_ns;
		max_ns = time_ns > max_ns ? time_ns : max_ns;
		if (in_bucket && its_bucket != bucket) {
			counter_add(&latency->buckets[bucket], in_bucket);
			in_bucket = 0;
		}
		bucket = its_bucket;
		in_bucket++;
	}
	counter_add(&latency->buckets[bucket], in_bucket);
	counter_add(&latency->sum_ns, sum_ns);
	counter_add(&latency->count, count);
	raise_to(&latency->max_ns, max_ns);
}
