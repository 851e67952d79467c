/* SPDX-License-Identifier: GPL-2.0 */
/*
 * tally: a raw tracepoint program that is attached to nothing. The daemon runs it
 * (BPF_PROG_TEST_RUN) on all connections that are followed, a dozen at a time, when
 * somebody asks which share of the bytes is redirected. It adds what TCP has carried of
 * each to the map standing, so that the daemon has a sum to read and no list.
 *
 * As watch does, it finds sockets through their stored addresses, and takes no lock.
 */

static __always_inline void tally_one(struct pair_id *id)
{
	struct seed *seed = seeds.lookup(id);
	u64 acked = 0, received = 0, flags = 0, bytes, address;
	struct volume none = {}, *v;
	struct volume_key key;
	u8 state = 0;
	void *sk;

	if (!seed)
		return;
	address = seed->sk;
	sk = SOCK_AT(address);
	key = name_volume(seed, seed->grown ? pairs.lookup(id) : 0, sk);
	PROBE_NUMBER(acked, sk, tcp_sock_bytes_acked);
	PROBE_NUMBER(received, sk, tcp_sock_bytes_received);
	PROBE_NUMBER(flags, sk, sock_sk_flags);
	PROBE_NUMBER(state, sk, sock_skc_state);
	/* Last: what was read may be of a socket that has gone. Then its seed has, before. */
	seed = seeds.lookup(id);
	if (!seed || seed->sk != address)
		return;
	bytes = carried(acked, received, flags, state, 0);
	if (seed->older)
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
