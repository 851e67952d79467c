/* SPDX-License-Identifier: GPL-2.0 */
/*
 * census: iter/tcp, run by the daemon after the programs were loaded, for the connections
 * that are older than they are. It runs twice in each network namespace.
 *
 * First it lists every socket with what a connection's name is made of. The daemon looks
 * for two sockets with one name and writes them into the map older. Then census joins them: each
 * end gets the mark that it would have had from register, and the server's gets a seed.
 * From then on it is a connection like any other.
 *
 * Every socket is visited with its lock held, so the server cannot close between the look
 * at its state and the seed. A client that closes meanwhile leaves a seed that goes away
 * with its server.
 */

/* Of an iterator's context; struct bpf_iter_meta in the kernel. */
static long (*seq_write)(void *seq, const void *data, u32 length) = (void *)BPF_FUNC_seq_write;

/* Was the socket made in the cgroup that register is attached to, or below it? 0 is the root. */
static __always_inline int is_below(u64 sk, u64 top)
{
	u64 cgroup = cgroup_of(sk);

	if (!top)
		return 1;
	for (int level = 0; level < CGROUP_DEPTH && cgroup; level++) {
		if (cgroup_id(cgroup) == top)
			return 1;
		cgroup = parent_cgroup(cgroup);
	}
	return 0;
}

static __always_inline void
list_older(void *seq, void *sk, void *tp, struct settings *s)
{
	struct older_socket found = {
		.sk = (u64)tp,
		.cookie = socket_cookie(sk),
		.netns = read_netns(tp),
		.sent = first_sent(tp),
		.received = first_received(tp),
	};
	struct pair_id id = server_id(found.sent, found.received);
	struct seed *seed = find_seed(id);
	struct pair *p = pairs.lookup(&id);

	if (!is_below((u64)tp, s->cgroup))
		found.flags |= OLDER_OUTSIDE;
	if (FIELD(tp, u8, tcp_sock_repair) & MASK_tcp_sock_repair)
		found.flags |= OLDER_REPAIRED;
	if ((seed && seed->sk == (u64)tp) || (p && p->end[SERVER].sk == (u64)tp))
		found.flags |= OLDER_KNOWN;
	seq_write(seq, &found, sizeof(found));
}

/* What bpf_sock_ops_cb_flags_set does for register. Not before Linux 6.12. */
static __always_inline long add_mark(void *sk, void *tp, u32 mark)
{
	u32 flags = FIELD(tp, u8, tcp_sock_cb_flags) | mark;

	return set_sockopt(sk, SOL_TCP, TCP_BPF_SOCK_OPS_CB_FLAGS, &flags, sizeof(flags));
}

static __always_inline enum older_outcome
join_server(void *sk, void *tp, struct pair_id *id, struct older *o)
{
	struct seed seed = {};
	u64 cookie = 0, base;

	PROBE(cookie, o->sk[CLIENT], sock_skc_cookie);
	if (cookie != o->cookie[CLIENT])
		return OLDER_GONE;
	if (add_mark(sk, tp, SERVER_MARK))
		return OLDER_UNMARKED;
	seed.at.netns = read_netns(tp);
	seed.client_sk = o->sk[CLIENT];
	seed.client_cookie = cookie;
	seed.born_ns = bpf_ktime_get_ns();
	seed.tenant = get_tenant((void *)seed.client_sk);
	/* Who was planted already is as good, and may have grown since. */
	if (find_seed(*id) || pairs.lookup(id))
		return OLDER_JOINED;
	seed.older = 1;
	base = FIELD(tp, u64, tcp_sock_bytes_acked) + FIELD(tp, u64, tcp_sock_bytes_received);
	bases.insert(id, &base);
	if (!plant_seed(id, &seed, tp, 1))
		return OLDER_JOINED;
	bases.delete(id);
	return OLDER_FULL;
}

static __always_inline void join_older(void *seq, void *sk, void *tp)
{
	u32 sent = first_sent(tp), received = first_received(tp);
	u64 cookie = FIELD(tp, u64, sock_skc_cookie);
	struct older_joined joined = { .id = client_id(sent, received) };
	struct older *o = older.lookup(&joined.id);

	if (o && o->sk[CLIENT] == (u64)tp && o->cookie[CLIENT] == cookie) {
		add_mark(sk, tp, CLIENT_MARK);
		return;
	}
	joined.id = server_id(sent, received);
	o = older.lookup(&joined.id);
	if (!o || o->sk[SERVER] != (u64)tp || o->cookie[SERVER] != cookie)
		return;
	joined.outcome = join_server(sk, tp, &joined.id, o);
	if (joined.outcome == OLDER_FULL)
		count(COUNT_REFUSED + REASON_FULL, 1);
	seq_write(seq, &joined, sizeof(joined));
}

int census(struct bpf_iter__tcp *ctx)
{
	void *meta = ctx->meta, *sk = ctx->sk_common, *seq, *tp;
	struct settings *s;

	if (!sk)
		return 0;
	seq = FIELD(meta, void *, bpf_iter_meta_seq);
	tp = to_tcp_sock(sk);
	s = get_settings();
	if (!tp || !s || FIELD(tp, u8, sock_skc_state) != BPF_TCP_ESTABLISHED)
		return 0;
	if (s->census == CENSUS_LISTS)
		list_older(seq, sk, tp, s);
	else if (s->census == CENSUS_JOINS)
		join_older(seq, sk, tp);
	return 0;
}
