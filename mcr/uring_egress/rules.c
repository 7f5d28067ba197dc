// SPDX-License-Identifier: MIT
/*
 * What a thread knows of rules and outputs, by their ids; and the rules by their key, for the AF_PACKET ingress:
 * the same order of lookups as relay_kern.c. The latter is an open hash table; its size is twice the number of
 * rules, so that a probe always ends.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "core.h"

int tables_open(struct tables *tables, uint32_t share, uint32_t shares)
{
	*tables = (struct tables){
		.rules = calloc(MCR_MAX_RULES, sizeof(*tables->rules)),
		.outputs = calloc(MCR_MAX_OUTPUTS, sizeof(*tables->outputs)),
		.share = share,
		.shares = shares,
	};
	if (!tables->rules || !tables->outputs)
		return -ENOMEM;
	for (uint32_t i = 0; i < MCR_MAX_RULES; i++)
		tables->rules[i].head = NONE;
	return 0;
}

/* Whether the output belongs to these tables, known or not. */
bool tables_have(const struct tables *tables, uint32_t output_id)
{
	return output_id % tables->shares == tables->share;
}

static void put_output(struct tables *tables, const struct mcr_add_output *add)
{
	struct output *output = &tables->outputs[add->output_id];

	memset(output, 0, sizeof(*output));
	if (add->family == AF_INET) {
		output->destination.ipv4.sin_family = AF_INET;
		output->destination.ipv4.sin_port = htons(add->dport);
		memcpy(&output->destination.ipv4.sin_addr, add->daddr + 12, 4);
		output->destination_length = sizeof(output->destination.ipv4);
	} else {
		output->destination.ipv6.sin6_family = AF_INET6;
		output->destination.ipv6.sin6_port = htons(add->dport);
		output->destination.ipv6.sin6_scope_id = add->scope_id;
		memcpy(&output->destination.ipv6.sin6_addr, add->daddr, 16);
		output->destination_length = sizeof(output->destination.ipv6);
	}
	output->flags = add->flags;
	output->gso_limit = add->gso_limit;
	output->known = true;
}

static void put_rule(struct tables *tables, const struct mcr_set_rule *set)
{
	struct rule *rule = &tables->rules[set->rule_id];

	rule->known = true;
	rule->key = set->key;
	rule->frame_limit = set->frame_limit;
	rule->output_count = 0;
	rule->flags = 0;
	for (uint32_t i = 0; i < set->output_count; i++) {
		if (!tables_have(tables, set->output_ids[i]))
			continue;
		rule->output_ids[rule->output_count++] = set->output_ids[i];
		rule->flags |= tables->outputs[set->output_ids[i]].flags;
	}
	rule->head = NONE;
}

/* Carries out a command that has been checked. */
void tables_apply(struct tables *tables, const struct mcr_command *command)
{
	switch (command->type) {
	case MCR_ADD_OUTPUT:
		if (tables_have(tables, command->output.output_id))
			put_output(tables, &command->output);
		break;
	case MCR_DEL_OUTPUT:
		tables->outputs[command->id].known = false;
		break;
	case MCR_SET_RULE:
		put_rule(tables, &command->rule);
		break;
	case MCR_DEL_RULE:
		tables->rules[command->id].known = false;
		break;
	default:
		break;
	}
}

/* Counts packets of a rule that go to all its outputs. */
void rules_count_relayed(struct worker *worker, uint32_t rule_id, uint32_t packets, uint64_t bytes)
{
	const struct rule *rule = &worker->tables.rules[rule_id];

	counter_add(&worker->rule_counters[rule_id].relayed_packets, packets);
	counter_add(&worker->rule_counters[rule_id].relayed_bytes, bytes);
	for (uint32_t i = 0; i < rule->output_count; i++)
		counter_add(&worker->output_counters[rule->output_ids[i]].relayed_packets, packets);
}

uint32_t hash_words(const void *key, size_t size)
{
	uint32_t word, hash = 0;

	for (size_t at = 0; at < size; at += sizeof(word)) {
		memcpy(&word, (const char *)key + at, sizeof(word));
		hash = (hash ^ word) * 0x9e3779b1U;
		hash ^= hash >> 15;
	}
	return hash;
}

/* The slot of the key, or the empty slot where it would go. */
static uint32_t find_slot(const struct worker *worker, const struct mcr_rule_key *key)
{
	uint32_t slot = hash_words(key, sizeof(*key)) & (RULE_SLOTS - 1);

	while (worker->rule_table[slot] &&
	       memcmp(&worker->tables.rules[worker->rule_table[slot]].key, key, sizeof(*key)) != 0)
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
	const struct mcr_rule_key *key = &worker->tables.rules[rule_id].key;

	worker->rule_table[find_slot(worker, key)] = rule_id;
	worker->lookups |= 1U << key_step(key);
}

/* Brings the table by key up to date: a rule is new where `added` is set, else one has changed or gone. */
void rules_index(struct worker *worker, uint32_t added)
{
	if (added) {
		insert(worker, added);
		return;
	}
	memset(worker->rule_table, 0, RULE_SLOTS * sizeof(*worker->rule_table));
	worker->lookups = 0;
	for (uint32_t id = 1; id < MCR_MAX_RULES; id++)
		if (worker->tables.rules[id].known)
			insert(worker, id);
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
