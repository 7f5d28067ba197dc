// SPDX-License-Identifier: MIT
/*
 * The rules by their key, for the AF_PACKET ingress: the same order of lookups as relay_kern.c.
 * An open hash table; its size is twice the number of rules, so that a probe always ends.
 */
#include <string.h>

#include "core.h"

static uint32_t hash_key(const struct mcr_rule_key *key)
{
	uint32_t words[sizeof(*key) / sizeof(uint32_t)], hash = 0;

	memcpy(words, key, sizeof(words));
	for (size_t i = 0; i < sizeof(words) / sizeof(words[0]); i++) {
		hash = (hash ^ words[i]) * 0x9e3779b1U;
		hash ^= hash >> 15;
	}
	return hash;
}

/* The slot of the key, or the empty slot where it would go. */
static uint32_t find_slot(const struct worker *worker, const struct mcr_rule_key *key)
{
	uint32_t slot = hash_key(key) & (RULE_SLOTS - 1);

	while (worker->rule_table[slot] &&
	       memcmp(&worker->rules[worker->rule_table[slot]].key, key, sizeof(*key)) != 0)
		slot = (slot + 1) & (RULE_SLOTS - 1);
	return slot;
}

/* The kind of a key, as a step of mcr_widen_key: 1 for any source, 2 for any port. */
static uint32_t key_step(const struct mcr_rule_key *key)
{
	static const uint8_t any[16];

	return (memcmp(key->saddr, any, sizeof(any)) == 0 ? 1 : 0) | (key->dport == 0 ? 2 : 0);
}

static void insert(struct worker *worker, uint32_t rule_id)
{
	const struct mcr_rule_key *key = &worker->rules[rule_id].key;

	worker->rule_table[find_slot(worker, key)] = rule_id;
	worker->lookups |= 1U << key_step(key);
}

static void rebuild(struct worker *worker)
{
	memset(worker->rule_table, 0, RULE_SLOTS * sizeof(*worker->rule_table));
	worker->lookups = 0;
	for (uint32_t id = 1; id < MCR_MAX_RULES; id++)
		if (worker->rules[id].known)
			insert(worker, id);
}

void rules_put(struct worker *worker, const struct mcr_set_rule *set)
{
	struct rule *rule = &worker->rules[set->rule_id];
	bool moved = rule->known && memcmp(&rule->key, &set->key, sizeof(set->key)) != 0;

	rule->known = true;
	rule->key = set->key;
	rule->frame_limit = set->frame_limit;
	rule->output_count = set->output_count;
	memcpy(rule->output_ids, set->output_ids, sizeof(rule->output_ids));
	rule->flags = 0;
	for (uint32_t i = 0; i < rule->output_count; i++)
		rule->flags |= worker->outputs[rule->output_ids[i]].flags;
	rule->head = NONE;
	if (moved)
		rebuild(worker);
	else
		insert(worker, set->rule_id);
}

void rules_remove(struct worker *worker, uint32_t rule_id)
{
	worker->rules[rule_id].known = false;
	rebuild(worker);
}

/* The rule of a packet, or 0. */
uint32_t rules_find(const struct worker *worker, const struct mcr_packet *packet)
{
	for (int step = 0; step < 4; step++) {
		struct mcr_rule_key key;
		uint32_t rule_id;

		if (!(worker->lookups & (1U << step)))
			continue;
		mcr_widen_key(&key, packet, step);
		rule_id = worker->rule_table[find_slot(worker, &key)];
		if (rule_id)
			return rule_id;
	}
	return 0;
}
