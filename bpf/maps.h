/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The maps. MAX_PAIRS comes from the loader.
 *
 * Everything is bounded: a full pairs map leaves new connections plain, the
 * LRU maps forget the oldest entry, a full ring buffer drops the event and the
 * pair is announced again at its next read.
 */

#define RENDEZVOUS_SLOTS	2048	/* a power of two; more would not stay in the cache */
#define YOUNG_PLACES		256	/* a power of two; the same */
#define NR_TENANTS		256	/* as many as an u8 tells apart */
#define MUTED_SLOTS	16384	/* a power of two */
#define MAX_HINTS		16384
#define MAX_SPLICERS		4096
#define MAX_SLEEPERS		4096
#define MAX_OLDER	16384
#define MAX_RULES		16384
#define MAX_NETWORKS		1024
#define MAX_TRAFFIC		4096
#define MAX_VOLUMES	4096
#define RECENT_SLOTS	32	/* a power of two */
#define EVENT_PAGES		16	/* a power of two */
#define MAX_TAPPED		1	/* the command makes its own, larger */
#define TAP_PAGES		1	/* the same */

/* The spliced ends. The verdict program is attached to this map. */
BPF_SOCKHASH(spliced, struct end_key, MAX_PAIRS * 2);

/*
 * The key of each socket that was put into the SOCKHASH, for those that have
 * no record in pairs any more. Goes away with the socket.
 */
BPF_SK_STORAGE(ends, struct end_key);

/*
 * Every connection with both ends below the cgroup has a seed, and once the server has
 * read a few times a pair instead. So where there was room for the seed, there is room
 * for the pair. Both are allocated as they come: a host pays for the connections that
 * it has, and not for those that it may have.
 */
BPF_F_TABLE("hash", struct pair_id, struct seed, seeds, MAX_PAIRS, BPF_F_NO_PREALLOC);
BPF_F_TABLE("hash", struct pair_id, struct pair, pairs, MAX_PAIRS, BPF_F_NO_PREALLOC);

/*
 * The seeds of young connections, until they grow: a hash of that size is in no cache,
 * and most connections end soon. Each has one place, by its name. If that is taken, and
 * it may be for long, the seed is in the table above from the beginning.
 */
BPF_TABLE("array", int, struct seed, young, YOUNG_PLACES);

/* How many connections each tenant has, and last all of them: see has_room(). */
BPF_TABLE("array", int, u32, tenants, NR_TENANTS + 1);

/*
 * Clients that wait for their server, for the time of a handshake. A slot is
 * overwritten by the next client that falls into it, those of remote
 * connections as a matter of course: a lost entry is a connection that stays
 * plain. An LRU map would cost each connection more than all the rest.
 */
BPF_TABLE("array", int, struct rendezvous, rendezvous, RENDEZVOUS_SLOTS);
/* Where they are, if they are in the SOCKHASH already; used by eager policies only. */
BPF_TABLE("array", int, struct address, waiting, RENDEZVOUS_SLOTS);

/* Clients that a listener on this host answers; used by eager policies only. */
BPF_TABLE("lru_hash", struct hint_key, u8, hints, MAX_HINTS);

/* Processes that were seen to read a socket with splice(2), or by programs of theirs: by pid. */
BPF_TABLE("lru_hash", u32, struct known_reader, splicers, MAX_SPLICERS);

/* Processes that began to sleep in reads of a spliced socket: pid to birth. */
BPF_TABLE("lru_hash", u32, u32, sleepers, MAX_SLEEPERS);

/* Sockets that observe does not look at for a while. Shared by those with the same low bits. */
BPF_TABLE("array", int, struct muted, muted, MUTED_SLOTS);

/* Connections that census is to join, so many at a time. Empty at all other times. */
BPF_F_TABLE("hash", struct pair_id, struct older, older, MAX_OLDER, BPF_F_NO_PREALLOC);

/* Policy, as the daemon compiled it. Almost empty nearly always. */
BPF_F_TABLE("hash", struct rule_key, struct rule, rules, MAX_RULES, BPF_F_NO_PREALLOC);
/* Networks that rules name, to the numbers they have in rules. */
BPF_LPM_TRIE(networks, struct network_key, u32, MAX_NETWORKS);

BPF_TABLE("lru_hash", struct traffic_key, struct traffic, traffic, MAX_TRAFFIC);

/*
 * What TCP has carried of local connections, for whoever asks which share is redirected: see
 * volume.h. Closed ones, by CPU and then all together; and living ones, written by tally and
 * emptied by the daemon.
 */
BPF_TABLE("percpu_array", int, struct recent_volume, recent, RECENT_SLOTS);
BPF_TABLE("lru_hash", struct volume_key, struct volume, volumes, MAX_VOLUMES);
BPF_F_TABLE("hash", struct volume_key, struct volume, standing, MAX_VOLUMES, BPF_F_NO_PREALLOC);
/* What connections that are older than the programs had sent before. */
BPF_F_TABLE("hash", struct pair_id, u64, bases, MAX_PAIRS, BPF_F_NO_PREALLOC);
/* Servers of local connections for which there was no room. Goes away with the socket. */
BPF_SK_STORAGE(strangers, struct stranger);

BPF_TABLE("array", int, struct settings, settings, 1);
BPF_TABLE("array", int, u64, sweep, NR_SWEEP);
BPF_TABLE("percpu_array", int, u64, counters, NR_COUNTERS);
/* All zero: what a new pair starts from. Too large for the stack. */
BPF_TABLE("array", int, struct pair, blank, 1);

BPF_RINGBUF_OUTPUT(events, EVENT_PAGES);

/* Where the program of `splicer tap` stands while somebody taps. */
BPF_PROG_ARRAY(taps, 1);

/* The rest is made by the command, for its program. */
BPF_TABLE("array", int, struct tap_settings, tap_settings, 1);
BPF_F_TABLE("hash", struct pair_id, struct tap_flow, tap_flows, MAX_TAPPED, BPF_F_NO_PREALLOC);
/* enum tap_choice, where the command decides. */
BPF_F_TABLE("hash", struct pair_id, u32, tap_choices, MAX_TAPPED, BPF_F_NO_PREALLOC);
/* Bytes and pieces of connections for which there was no room in tap_flows. */
BPF_TABLE("array", int, u64, tap_unknown, 2);
BPF_RINGBUF_OUTPUT(tap_ring, TAP_PAGES);
