/* SPDX-License-Identifier: GPL-2.0 */
/*
 * How much of a local connection TCP has carried. Nobody counts messages for that: the
 * server's socket alone knows the bytes of both directions, those that it received and
 * those that the client has acknowledged. What is redirected is in neither.
 */

/* States that a socket leaves for TCP_CLOSE as its own FIN is acknowledged, or after that. */
#define FIN_ACKED_AT_CLOSE	(TCPF(BPF_TCP_FIN_WAIT2) | TCPF(BPF_TCP_LAST_ACK) | \
				 TCPF(BPF_TCP_CLOSING))

/*
 * Bytes, both ways. Each FIN is counted as one, ours once it is acknowledged. is_closing:
 * the socket is about to leave this state for TCP_CLOSE.
 */
static __always_inline u64 carried(u64 acked, u64 received, u64 flags, u8 state, int is_closing)
{
	u32 fin_acked = is_closing ? FIN_ACKED_AT_CLOSE : TCPF(BPF_TCP_FIN_WAIT2);
	u64 sum = acked + received;
	u64 fins = (flags >> ENUM_SOCK_DONE & 1) + !!(TCPF(state) & fin_acked);

	return sum > fins ? sum - fins : 0;
}

/* The id of the cgroup that a socket was made in; sk is a pointer of SOCK_AT(), or a trusted one. */
static __always_inline u64 cgroup_id_of(void *sk)
{
#ifdef CALL_RDONLY_CAST
	void *cgroup = FIELD(sk, void *, sock_sk_cgroup);
	void *node = FIELD(cgroup, void *, cgroup_kn);

	return FIELD(node, u64, kernfs_node_id);
#else
	return cgroup_id(cgroup_of((u64)sk));
#endif
}

/* Whose bytes of this connection they are, and why they are not redirected. */
static __always_inline struct volume_key name_volume(struct pair *p)
{
	struct volume_key key = {
		.client = p->end[CLIENT].cgroup,
		.server = p->end[SERVER].cgroup,
		.reason = p->reason,
	};

	return key;
}

/*
 * The same of one that is young. server is as for cgroup_id_of(): it is open, or whoever
 * asks finds out afterwards that it is not. The client may have gone.
 */
static __always_inline struct volume_key name_young_volume(struct seed *seed, void *server)
{
	void *client = SOCK_AT(seed->client_sk);
	struct volume_key key = {
		.client = cgroup_id_of(client),
		.server = cgroup_id_of(server),
		.reason = seed->reason ?: REASON_COLD,
	};
	u64 cookie = 0;

	PROBE_NUMBER(cookie, client, sock_skc_cookie);
	if (cookie != seed->client_cookie)
		key.client = 0;
	return key;
}

/* Of an older connection only what came since is ours to count. */
static __always_inline u64 since_base(struct pair_id *id, u64 bytes)
{
	u64 *base = bases.lookup(id);

	return base && *base < bytes ? bytes - *base : base ? 0 : bytes;
}

static __always_inline void flush_volume(struct recent_volume *r)
{
	struct volume none = {}, *v;

	if (!r->sum.connections)
		return;
	v = volumes.lookup_or_try_init(&r->key, &none);
	if (!v)
		return;		/* the sum of all, COUNT_PLAIN, is right all the same */
	__sync_fetch_and_add(&v->connections, r->sum.connections);
	__sync_fetch_and_add(&v->bytes, r->sum.bytes);
}

/*
 * A connection has closed. Connections that are short come in crowds of the same two parties,
 * so this is an addition on this CPU nearly always. Should one interrupt another just here,
 * some bytes are written to the wrong party's account, and none in the sum.
 */
static __always_inline void add_volume(struct volume_key *key, u64 bytes)
{
	int slot = (key->client * 31 + key->server + key->reason) & (RECENT_SLOTS - 1);
	struct recent_volume *r;

	if (!bytes)
		return;
	count(COUNT_PLAIN + (key->reason < NR_REASONS ? key->reason : 0), bytes);
	r = recent.lookup(&slot);
	if (!r)
		return;
	if (r->key.client != key->client || r->key.server != key->server ||
	    r->key.reason != key->reason) {
		flush_volume(r);
		r->key = *key;
		r->sum.connections = 0;
		r->sum.bytes = 0;
	}
	r->sum.connections++;
	r->sum.bytes += bytes;
}

static __always_inline u64 carried_until_close(void *tp)
{
	return carried(FIELD(tp, u64, tcp_sock_bytes_acked), FIELD(tp, u64, tcp_sock_bytes_received),
		       FIELD(tp, u64, sock_sk_flags), FIELD(tp, u8, sock_skc_state), 1);
}

/*
 * The server's socket, tp, closes. Its record has gone already: so who reads what is closed
 * first and then what is open finds nothing twice.
 */
static __always_inline void
add_closed(struct pair_id *id, struct volume_key *key, u32 older, void *tp)
{
	u64 bytes = carried_until_close(tp);

	if (older) {
		bytes = since_base(id, bytes);
		bases.delete(id);
	}
	add_volume(key, bytes);
}
