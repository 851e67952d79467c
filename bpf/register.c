/* SPDX-License-Identifier: GPL-2.0 */
/*
 * register: SOCK_OPS on the cgroup. Decides that a connection is local, pairs
 * its two ends, forgets them on close.
 *
 * The client leaves its name for the server at ACTIVE_ESTABLISHED. The server
 * looks for it at PASSIVE_ESTABLISHED, which the client's ACK triggers and
 * which is therefore later. A remote peer runs neither program, so what is
 * found is an end on this host, below the cgroup.
 */

static __always_inline int is_eager_rule(u32 kind, u64 who, u32 port)
{
	struct rule_key key = { .who = who, .kind = kind, .port = port };
	struct rule *r = rules.lookup(&key);

	return r && r->mode != NOTHING_SAID && (u32)r->mode == MODE_EAGER;
}

/*
 * May the connections of this listener be eager? Its cgroup is out of reach
 * here (sk is a request socket), its namespace is not. Whoever says yes is
 * heard again when the connection is established.
 */
static __always_inline int may_be_eager(struct bpf_sock_ops *skops, struct settings *s)
{
	u32 port = skops->local_port;
	u64 netns;

	if (s->mode == MODE_EAGER)
		return 1;
	if (s->has_rules & 1 << RULE_PORT && is_eager_rule(RULE_PORT, 0, port))
		return 1;
	if (!(s->has_rules & 1 << RULE_NETNS))
		return 0;
	netns = netns_cookie(skops);
	return is_eager_rule(RULE_NETNS, netns, port) || is_eager_rule(RULE_NETNS, netns, 0);
}

/* Eager only: remember whom a local listener answers. sk is a request socket. */
static __always_inline void leave_hint(struct bpf_sock_ops *skops, struct settings *s)
{
	struct hint_key hint = {};
	u32 ip4;
	u8 one = 1;

	if (!may_be_eager(skops, s))
		return;
	ip4 = skops->remote_ip4;
	/* clang would merge reads of both kinds into one modified context pointer */
	asm volatile("" : "+r"(ip4));
	if (skops->family == AF_INET6) {
		hint.ip[0] = bpf_ntohl(skops->remote_ip6[0]);
		hint.ip[1] = bpf_ntohl(skops->remote_ip6[1]);
		hint.ip[2] = bpf_ntohl(skops->remote_ip6[2]);
		hint.ip[3] = bpf_ntohl(skops->remote_ip6[3]);
	} else {
		read_ip4(hint.ip, ip4);
	}
	hint.port = bpf_ntohl(skops->remote_port);
	hint.service = skops->local_port;
	hints.update(&hint, &one);
}

/* A hint serves once, or a later connection to another host might find it. */
static __always_inline int take_hint(struct address *at)
{
	struct hint_key hint = {};

	hint.ip[0] = at->local_ip[0];
	hint.ip[1] = at->local_ip[1];
	hint.ip[2] = at->local_ip[2];
	hint.ip[3] = at->local_ip[3];
	hint.port = at->local_port;
	hint.service = at->remote_port;
	int missing = hints.delete(&hint);
	return !missing;
}

/* Eager: into the SOCKHASH at ESTABLISHED. Returns 1 if it is in. */
static __always_inline int put_in(struct bpf_sock_ops *skops, struct end_key *key)
{
	void *sk = skops->sk;

	if (!sk || !ends.sk_storage_get(sk, key, BPF_SK_STORAGE_GET_F_CREATE))
		return 0;
	int err = spliced.sock_hash_update(skops, key, BPF_NOEXIST);
	return !err;
}

/* Returns 1 if the client is in the SOCKHASH already when its server is found. */
static __always_inline int
splice_client_eagerly(struct bpf_sock_ops *skops, void *tp, struct settings *s,
		      struct address *at, struct end_key *key)
{
	struct rule said = { NOTHING_SAID, NOTHING_SAID, NOTHING_SAID };

	read_tuple(at, tp);
	at->netns = netns_cookie(skops);
	key->cookie = socket_cookie(skops);
	key->netns = at->netns;
	/* What the server's rules say of TCP_INQ is not known here; verdict looks again. */
	if (!take_hint(at) || find_misfit_birth((u64)tp) || find_misfit_option((u64)tp, 1))
		return 0;
	consider_end(&said, s, (u64)tp, 0, at->local_ip, at->remote_port);
	if (said.mode != NOTHING_SAID && (u32)said.mode == MODE_OFF)
		return 0;
	return put_in(skops, key);
}

static __always_inline void register_client(struct bpf_sock_ops *skops, void *tp)
{
	struct pair_id id = client_id(first_sent(tp), first_received(tp));
	struct settings *s = get_settings();
	struct end_key key = { .id = id };
	struct address at = {};
	struct rendezvous *r;
	int in_map = 0, slot = slot_of(id);
	u64 cookie;
	u32 tenant;

	if (!s || !s->registering || FIELD(tp, u8, tcp_sock_repair) & MASK_tcp_sock_repair)
		return;
	if (s->has_eager && s->splicing && !s->stopping)
		in_map = splice_client_eagerly(skops, tp, s, &at, &key);
	/*
	 * First what waits for all that was read and written before: a cookie takes an
	 * atomic operation. The slot comes from afar, and nothing below has to wait for it.
	 */
	cookie = socket_cookie(skops);
	tenant = get_tenant(tp);
	bpf_sock_ops_cb_flags_set(skops, skops->bpf_sock_ops_cb_flags | CLIENT_MARK);
	/* Another CPU may write the same slot: what is used of it is checked later. */
	r = get_slot(id);
	if (!r)
		return;
	if (is_same(r->id, id)) {
		/* Two clients never have one name: somebody forges. Both stay plain. */
		WRITE_ONCE(r->id.client_seq, ~id.client_seq);
		if (in_map)
			spliced.delete(&key);
		return;
	}
	WRITE_ONCE(r->id.client_seq, ~id.client_seq);
	if (in_map) {
		waiting.update(&slot, &at);
		count(COUNT_ORPHANS, 1);	/* until its server comes */
	}
	r->sk = (u64)tp;
	r->cookie = cookie;
	r->in_map = in_map ? WAITING_IN : WAITING_OUT;
	r->is_multipath = is_multipath_here(tp);
	r->tenant = tenant;
	r->id.server_seq = id.server_seq;
	WRITE_ONCE(r->id.client_seq, id.client_seq);
}

/*
 * The client is in the SOCKHASH already: the server follows, or it goes back. adopt may
 * be about to take it out as an orphan. It says so in the slot and then looks for a
 * pair, here the pair is made and then the slot looked at: one of the two sees the other.
 */
static __always_inline void
splice_eagerly(struct bpf_sock_ops *skops, void *tp, struct pair_id *id,
	       struct seed *seed, struct rendezvous *client, struct address *client_at,
	       struct settings *s)
{
	struct pair *p = make_pair(id, seed, tp);
	struct end_key key = { seed->client_cookie, client_at->netns, *id };
	int is_in;

	if (!p) {
		spliced.delete(&key);
		return;
	}
	seeds.delete(id);
	p->end[CLIENT].at = *client_at;
	p->end[CLIENT].flags = END_IN_MAP;
	__sync_fetch_and_add(&p->half, 1);	/* a full barrier */
	is_in = READ_ONCE(client->in_map) == WAITING_IN && is_same(client->id, *id);
	key.cookie = FIELD(tp, u64, sock_skc_cookie);
	key.netns = seed->at.netns;
	decide(p, s);
	if (p->mode == MODE_EAGER &&
	    !find_misfit_file(socket_of(seed->client_sk), p->allow_blocking) &&
	    !find_misfit_birth((u64)tp) && !find_misfit_option((u64)tp, p->allow_inq) && is_in &&
	    put_in(skops, &key)) {
		p->end[SERVER].flags = END_IN_MAP;
		p->was_spliced = 1;
		p->reason = REASON_NONE;
		p->care = TALKED;	/* the handshake */
		p->data_ready = FIELD(tp, u64, sock_sk_data_ready);
		WRITE_ONCE(p->state, STATE_SPLICED);
		count(COUNT_SPLICED, 1);
		return;
	}
	/* A blocking client, an inherited option, a full map, a rule against it, or adopt. */
	start_draining(p, REASON_POLICY);
}

/* It is not followed, and its close is asked for all the same: how much has TCP carried of it? */
static __always_inline void note_stranger(struct bpf_sock_ops *skops, struct seed *seed)
{
	struct stranger noted = { .client = cgroup_id(cgroup_of(seed->client_sk)) };
	void *sk = skops->sk;

	if (!sk || !strangers.sk_storage_get(sk, &noted, BPF_SK_STORAGE_GET_F_CREATE))
		return;
	bpf_sock_ops_cb_flags_set(skops, skops->bpf_sock_ops_cb_flags | SERVER_MARK);
}

static __always_inline void forget_stranger(struct bpf_sock_ops *skops, void *tp)
{
	struct volume_key key = { .reason = REASON_FULL };
	struct stranger *noted;
	void *sk = skops->sk;

	if (!sk)
		return;
	noted = strangers.sk_storage_get(sk, 0, 0);
	if (!noted)
		return;
	key.client = noted->client;
	key.server = cgroup_id(cgroup_of((u64)tp));
	add_volume(&key, carried_until_close(tp));
	strangers.sk_storage_delete(sk);
}

static __always_inline void register_server(struct bpf_sock_ops *skops, void *tp)
{
	struct pair_id id = server_id(first_sent(tp), first_received(tp));
	struct settings *s = get_settings();
	struct rendezvous *client;
	struct address client_at = {}, *at;
	struct seed seed = {};
	int slot = slot_of(id);
	u32 in_map;
	u8 is_multipath;

	if (!s || !s->registering)
		return;
	client = get_slot(id);
	if (!client || !is_same(client->id, id))
		return;		/* remote */
	seed.client_sk = client->sk;
	seed.client_cookie = client->cookie;
	seed.tenant = client->tenant;
	is_multipath = client->is_multipath;
	in_map = READ_ONCE(client->in_map);
	if (in_map) {
		at = waiting.lookup(&slot);
		if (at)
			client_at = *at;
	}
	asm volatile("" ::: "memory");
	if (!is_same(client->id, id))
		return;		/* overwritten meanwhile */
	if (in_map) {
		count(COUNT_ORPHANS, -1);
		in_map = in_map == WAITING_IN && psock_of(seed.client_sk);
	}
	seed.at.netns = netns_cookie(skops);
	socket_cookie(skops);	/* it has one from here on */
	seed.born_ns = coarse_ns();
	if (is_multipath || is_multipath_here(tp))
		seed.reason = REASON_MPTCP;
	if (plant_seed(&id, &seed, tp, in_map)) {
		count(COUNT_REFUSED + REASON_FULL, 1);
		note_stranger(skops, &seed);
		/* Nobody knew of it, so nothing was redirected to it. */
		if (in_map) {
			struct end_key key = { seed.client_cookie, client_at.netns, id };

			spliced.delete(&key);
		}
		return;
	}
	/*
	 * The server's TCP_CLOSE is the end of the pair. It comes for every
	 * connection, so the client needs no callback.
	 */
	bpf_sock_ops_cb_flags_set(skops, skops->bpf_sock_ops_cb_flags | SERVER_MARK);
	if (in_map)
		splice_eagerly(skops, tp, &id, &seed, client, &client_at, s);
}

static __always_inline void add_to_traffic(struct pair *p)
{
	struct traffic_key key = {
		.client = p->end[CLIENT].cgroup,
		.server = p->end[SERVER].cgroup,
	};
	struct traffic none = {}, *t;
	u64 messages = p->dir[CLIENT].redirected_messages + p->dir[SERVER].redirected_messages;

	if (!messages)
		return;
	t = traffic.lookup_or_try_init(&key, &none);
	if (!t)
		return;
	__sync_fetch_and_add(&t->connections, 1);
	__sync_fetch_and_add(&t->redirected_messages, messages);
	__sync_fetch_and_add(&t->redirected_bytes, p->dir[CLIENT].redirected_bytes +
						   p->dir[SERVER].redirected_bytes);
}

static __always_inline void count_closed(u32 tenant)
{
	count(COUNT_CLOSED, 1);
	count_tenant(tenant, -1);
}

/*
 * Never delete from the SOCKHASH here: the application may still have
 * redirected bytes to read. The kernel takes the socket out when it is closed.
 * An end that is in has no record from here on; adopt takes it out once it
 * has read everything.
 */
static __always_inline void forget_server(struct bpf_sock_ops *skops, void *tp)
{
	struct pair_id id = server_id(first_sent(tp), first_received(tp));
	struct seed *seed = find_young(id);
	struct volume_key key;
	int missing, orphaned;
	u32 tenant, older;
	struct pair *p;

	if (seed && seed->sk == (u64)tp) {
		tenant = seed->tenant;
		key = name_young_volume(seed, tp);
		clear_place(seed);
		count_closed(tenant);
		add_closed(&id, &key, 0, tp);
		return;
	}
	seed = seeds.lookup(&id);
	if (seed && seed->sk == (u64)tp) {
		tenant = seed->tenant;
		older = seed->older;
		key = name_young_volume(seed, tp);
		missing = seeds.delete(&id);
		if (missing)
			return;
		count_closed(tenant);
		add_closed(&id, &key, older, tp);
		return;
	}
	p = pairs.lookup(&id);
	if (!p || p->end[SERVER].sk != (u64)tp) {
		forget_stranger(skops, tp);
		return;
	}
	tenant = p->tenant;
	older = p->older;
	key = name_volume(p);
	/* Whose owner has closed it is out, and nobody waits for its end of stream. */
	if (is_still_in(&p->end[CLIENT]) && is_waiting(&p->end[CLIENT]))
		tell(p, EVENT_DRAIN, REASON_CLOSING);
	orphaned = is_still_in(&p->end[CLIENT]) || is_still_in(&p->end[SERVER]);
	add_to_traffic(p);
	missing = pairs.delete(&id);
	if (missing)
		return;
	count_closed(tenant);
	add_closed(&id, &key, older, tp);
	if (orphaned)
		count(COUNT_ORPHANS, 1);
}

/*
 * A socket that was disconnected, connect(AF_UNSPEC), is used again. The
 * kernel purged its TCP queue and knows nothing of the psock: what was
 * redirected to the old connection would be read on the new one.
 */
static __always_inline void forget_former_life(struct bpf_sock_ops *skops, void *tp)
{
	struct end_key *key;
	void *sk = skops->sk;

	if (!FIELD(tp, u64, sock_sk_user_data) || !sk)
		return;
	key = ends.sk_storage_get(sk, 0, 0);
	if (key)
		spliced.delete(key);
}

static __always_inline void *tcp_sock_of(struct bpf_sock_ops *skops)
{
	void *sk = skops->sk;

	return sk ? to_tcp_sock(sk) : 0;
}

int register_end(struct bpf_sock_ops *skops)
{
	struct settings *s;
	void *tp;

	switch (skops->op) {
	case BPF_SOCK_OPS_RWND_INIT:
		if (skops->is_fullsock)
			break;		/* a client sizing its own window */
		s = get_settings();
		if (s && s->has_eager)
			leave_hint(skops, s);
		break;
	case BPF_SOCK_OPS_TCP_CONNECT_CB:
		tp = tcp_sock_of(skops);
		if (tp)
			forget_former_life(skops, tp);
		break;
	case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
		tp = tcp_sock_of(skops);
		if (tp)
			register_client(skops, tp);
		break;
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		tp = tcp_sock_of(skops);
		if (tp)
			register_server(skops, tp);
		break;
	case BPF_SOCK_OPS_STATE_CB:
		if (skops->args[1] != BPF_TCP_CLOSE)
			break;
		tp = tcp_sock_of(skops);
		if (tp)
			forget_server(skops, tp);
		break;
	}
	return 1;
}
