/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The maps. MAX_PAIRS and MAX_RENDEZVOUS come from the loader.
 *
 * Everything is bounded: a full pairs map leaves new connections plain, the
 * LRU maps forget the oldest entry, a full ring buffer drops the event and the
 * pair is announced again at its next read.
 */

/* The spliced ends. The verdict program is attached to this map. */
BPF_SOCKHASH(spliced, struct end_key, MAX_PAIRS * 2);

/* Every connection with both ends below the cgroup. */
BPF_TABLE("hash", struct pair_id, struct pair, pairs, MAX_PAIRS);

/* Clients that wait for their server. Those of remote connections age out. */
BPF_TABLE("lru_hash", struct pair_id, struct rendezvous, rendezvous, MAX_RENDEZVOUS);

/* Clients that a listener on this host answers; used by eager policies only. */
BPF_TABLE("lru_hash", struct hint_key, u8, hints, MAX_RENDEZVOUS);

/* Processes that were seen to read a socket with splice(2). */
BPF_TABLE("lru_hash", u32, u8, splicers, 4096);

/* Service port (the server's own) to policy. */
BPF_TABLE("hash", u32, struct policy, policies, 1024);

BPF_TABLE("array", int, struct settings, settings, 1);
BPF_TABLE("array", int, u64, sweep, NR_SWEEP);
BPF_TABLE("percpu_array", int, u64, counters, NR_COUNTERS);
BPF_TABLE("percpu_array", int, struct pair, scratch, 1);

BPF_RINGBUF_OUTPUT(events, 16);
