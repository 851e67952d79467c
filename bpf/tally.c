/* SPDX-License-Identifier: GPL-2.0 */
/*
 * tally: a raw tracepoint program that is attached to nothing. The daemon runs it
 * (BPF_PROG_TEST_RUN) on all connections that are followed, a dozen at a time, when
 * somebody asks which share of the bytes is redirected. It adds what TCP has carried of
 * each to the map standing, so that the daemon has a sum to read and no list.
 *
 * As watch does, it finds sockets through their stored addresses, and takes no lock.
 */

/* Is this socket the server of the connection still? A seed goes after its pair has come. */
static __always_inline int is_server(u64 address, struct pair_id *id)
{
	struct seed *seed = find_seed(*id);
	struct pair *p;

	if (seed && seed->sk == address)
		return 1;
	p = pairs.lookup(id);
	return p && p->end[SERVER].sk == address;
}

static __always_inline void tally_one(struct pair_id *id)
{
	u64 acked = 0, received = 0, flags = 0, bytes, address;
	struct pair *p = pairs.lookup(id);
	struct volume none = {}, *v;
	struct volume_key key;
	struct seed *seed;
	u8 state = 0;
	u32 older;
	void *sk;

	if (p) {
		address = p->end[SERVER].sk;
		older = p->older;
		key = name_volume(p);
		sk = SOCK_AT(address);
	} else {
		seed = find_seed(*id);
		if (!seed)
			return;
		address = seed->sk;
		older = seed->older;
		sk = SOCK_AT(address);
		key = name_young_volume(seed, sk);
	}
	PROBE_NUMBER(acked, sk, tcp_sock_bytes_acked);
	PROBE_NUMBER(received, sk, tcp_sock_bytes_received);
	PROBE_NUMBER(flags, sk, sock_sk_flags);
	PROBE_NUMBER(state, sk, sock_skc_state);
	/* Last: what was read may be of a socket that has gone. Then its record has, before. */
	if (!is_server(address, id))
		return;
	bytes = carried(acked, received, flags, state, 0);
	if (older)
		bytes = since_base(id, bytes);
	if (!bytes)
		return;
	v = standing.lookup_or_try_init(&key, &none);
	if (!v)
		return;
	__sync_fetch_and_add(&v->connections, 1);
	__sync_fetch_and_add(&v->bytes, bytes);
}

int tally(struct tally_request *ctx)
{
	struct pair_id ids[TALLY_PAIRS];

	/* A context cannot be read at a place that is not known beforehand. */
#pragma unroll
	for (int i = 0; i < TALLY_PAIRS; i++)
		ids[i] = ctx->id[i];
	for (int i = 0; i < TALLY_PAIRS; i++) {
		struct pair_id id = ids[i];

		tally_one(&id);
	}
	return 0;
}
