/* SPDX-License-Identifier: GPL-2.0 */
/* Operations on the maps that more than one program needs. */

static __always_inline void count(int which, u64 n)
{
	u64 *counter = counters.lookup(&which);

	if (counter)
		*counter += n;
}

static __always_inline void count_sweep(int which)
{
	u64 *counter = sweep.lookup(&which);

	if (counter)
		__sync_fetch_and_add(counter, 1);
}

static __always_inline struct settings *get_settings(void)
{
	int zero = 0;

	return settings.lookup(&zero);
}

static __always_inline struct muted *muted_slot(u64 cookie)
{
	int slot = cookie & (MUTED_SLOTS - 1);

	return muted.lookup(&slot);
}

/* observe looks at the next read of this socket. */
static __always_inline void unmute(u64 cookie)
{
	struct muted *m = muted_slot(cookie);

	if (m && m->cookie == cookie)
		m->cookie = 0;
}

/*
 * The pair of a socket, given the first sequence number it sent and received.
 * Whether it is the client is not known beforehand. Services have the lower
 * port nearly always, so the likelier name is tried first.
 */
static __always_inline struct pair *
find_pair(u32 sent, u32 received, int likely_client, struct pair_id *id, int *side)
{
	struct pair *p;

	*id = likely_client ? client_id(sent, received) : server_id(sent, received);
	*side = likely_client ? CLIENT : SERVER;
	p = pairs.lookup(id);
	if (p)
		return p;
	*id = likely_client ? server_id(sent, received) : client_id(sent, received);
	*side = likely_client ? SERVER : CLIENT;
	return pairs.lookup(id);
}

static __always_inline struct pair *
find_pair_of(void *tp, struct pair_id *id, int *side)
{
	return find_pair(first_sent(tp), first_received(tp),
			 local_port(tp) > remote_port(tp), id, side);
}

/*
 * Is this socket the end that the pair means, or another one that was given its
 * memory? A new socket starts without a cookie.
 */
static __always_inline int is_end(struct end *e, void *tp)
{
	return e->sk == (u64)tp && e->cookie == FIELD(tp, u64, sock_skc_cookie);
}

/* Is it in the SOCKHASH? Its owner's close(2) takes it out, and tells nobody. */
static __always_inline int is_still_in(struct end *e)
{
	u64 psock = psock_of(e->sk), cookie = 0;

	PROBE(cookie, e->sk, sock_skc_cookie);
	return e->flags & END_IN_MAP && psock && cookie == e->cookie;
}

/* Where it is in the SOCKHASH, as an end of this connection. */
static __always_inline struct end_key key_of(struct end *e, struct pair_id id)
{
	struct end_key key = { .cookie = e->cookie, .netns = e->at.netns, .id = id };

	return key;
}

static __always_inline struct end *other_end(struct pair *p, int side)
{
	return side == CLIENT ? &p->end[SERVER] : &p->end[CLIENT];
}

static __always_inline int slot_of(struct pair_id id)
{
	return (id.client_seq ^ id.server_seq) & (RENDEZVOUS_SLOTS - 1);
}

static __always_inline struct rendezvous *get_slot(struct pair_id id)
{
	int slot = slot_of(id);

	return rendezvous.lookup(&slot);
}

static __always_inline int is_same(struct pair_id a, struct pair_id b)
{
	return a.client_seq == b.client_seq && a.server_seq == b.server_seq;
}

/*
 * Who fills the table: the cgroup of the client, since a server cannot make
 * anybody connect. Two that fall on one number have one share.
 */
static __always_inline u32 get_tenant(void *tp)
{
	return cgroup_of((u64)tp) * 0x9e3779b97f4a7c15ULL >> 56;
}

/*
 * A tenant may have seven eighths of what others left. So one alone has nearly
 * all, and whoever comes later finds room, however greedy those before were.
 * The count may be off by what other CPUs are doing; the table has its own bound.
 */
static __always_inline int has_room(u32 tenant)
{
	int whose = tenant & (NR_TENANTS - 1), all = NR_TENANTS;
	u32 *own = tenants.lookup(&whose), *used = tenants.lookup(&all);
	u32 share;

	if (!own || !used)
		return 0;
	share = MAX_PAIRS - *used + *own;
	return *own < share - share / 8;
}

static __always_inline void count_tenant(u32 tenant, int n)
{
	int whose = tenant & (NR_TENANTS - 1), all = NR_TENANTS;
	u32 *own = tenants.lookup(&whose), *used = tenants.lookup(&all);

	if (own)
		__sync_fetch_and_add(own, n);
	if (used)
		__sync_fetch_and_add(used, n);
}

static __always_inline struct seed *get_place(struct pair_id id)
{
	int place = (id.client_seq ^ id.server_seq) & (YOUNG_PLACES - 1);

	return young.lookup(&place);
}

/*
 * The seed of a young connection. Only with the lock of its server's socket does it not
 * change; and whoever forges a name may have one, too.
 */
static __always_inline struct seed *find_young(struct pair_id id)
{
	struct seed *place = get_place(id);

	return place && place->sk && is_same(place->id, id) ? place : 0;
}

/* A seed with this name, wherever it is. */
static __always_inline struct seed *find_seed(struct pair_id id)
{
	struct seed *seed = find_young(id);

	return seed ? seed : seeds.lookup(&id);
}

/* Its place is free from here on. A full barrier: nothing of it is read later. */
static __always_inline void clear_place(struct seed *place)
{
	__sync_lock_test_and_set(&place->sk, 0);
}

/* Returns -1 if its name is taken, 1 if its place is. */
static __always_inline int place_seed(struct seed *seed)
{
	struct seed *place = get_place(seed->id);

	if (!place)
		return 1;
	if (__sync_val_compare_and_swap(&place->sk, 0ULL, seed->sk))
		return is_same(place->id, seed->id) ? -1 : 1;
	*place = *seed;
	return 0;
}

/*
 * The connection whose server is tp is known from here on. What only the server's
 * socket says goes into the seed here; its namespace, the client, the tenant and the
 * time are there. Returns 0 if it was planted: there was room, and nobody had the name.
 * What lasts is not put among the young. Whoever forges the name of a connection that
 * has grown gets a seed beside it, and no further: see grow_seed().
 */
static __always_inline int
plant_seed(struct pair_id *id, struct seed *seed, void *tp, int lasts)
{
	int full;

	read_tuple(&seed->at, tp);
	seed->id = *id;
	seed->sk = (u64)tp;
	if (!has_room(seed->tenant))
		return 1;
	full = lasts ? 1 : place_seed(seed);
	if (full > 0)
		full = seeds.insert(id, seed);
	if (full)
		return full;
	count_tenant(seed->tenant, 1);
	count(COUNT_PAIRED, 1);
	return 0;
}

/* A pair with everything but its state, which makes it visible. tp is the server's socket. */
static __always_inline struct pair *make_pair(struct pair_id *id, struct seed *seed, void *tp)
{
	struct pair *p;
	int zero = 0;

	p = blank.lookup(&zero);
	if (!p)
		return 0;
	/* No memory; or somebody forges, and has the name of a pair that lives. */
	int taken = pairs.insert(id, p);
	if (taken)
		return 0;
	p = pairs.lookup(id);
	if (!p)
		return 0;
	p->id = *id;
	p->reason = REASON_COLD;
	p->end[CLIENT].sk = seed->client_sk;
	p->end[CLIENT].cookie = seed->client_cookie;
	p->end[SERVER].at = seed->at;
	p->end[SERVER].sk = seed->sk;
	p->end[SERVER].cookie = FIELD(tp, u64, sock_skc_cookie);
	p->born_ns = seed->born_ns;
	p->tenant = seed->tenant;
	p->older = seed->older;
	p->changed_ns = seed->born_ns;
	p->end[CLIENT].cgroup = cgroup_id(cgroup_of(seed->client_sk));
	p->end[SERVER].cgroup = cgroup_id(cgroup_of(seed->sk));
	return p;
}

/* Returns 0 if the daemon will see the event. */
static __always_inline int tell(struct pair *p, u32 type, u32 reason)
{
	struct event e = {
		.type = type,
		.reason = reason,
		.id = p->id,
		.netns = { p->end[CLIENT].at.netns, p->end[SERVER].at.netns },
		.tgid = { p->end[CLIENT].tgid, p->end[SERVER].tgid },
	};
	int lost = events.ringbuf_output(&e, sizeof(e), 0);

	if (lost)
		count(COUNT_EVENTS_LOST, 1);
	return lost;
}

/* Have the ends looked at soon: bytes may be where a reader does not see them. */
static __always_inline void ask_for_watch(struct pair *p)
{
	if (p->watched)
		return;
	p->watched = 1;
	tell(p, EVENT_WATCH, REASON_NONE);
}

/*
 * How long, in ms, has something waited at an end that is in the SOCKHASH, as far
 * as one sees who looks now and then? progress says how far its reader has come.
 */
static __always_inline u32 note_waiting(struct end *e, int waits, u32 progress)
{
	u32 now = bpf_ktime_get_ns() / 1000000 ?: 1;

	if (!waits) {
		e->waiting_ms = 0;
		return 0;
	}
	if (!e->waiting_ms) {
		e->waiting_ms = now;
		e->waiting_for = progress;
	}
	return now - e->waiting_ms;
}

static __always_inline void forget_waiting(struct pair *p)
{
	p->end[CLIENT].waiting_ms = 0;
	p->end[SERVER].waiting_ms = 0;
	p->end[CLIENT].flags &= ~END_MOVED;
	p->end[SERVER].flags &= ~END_MOVED;
}

/* What adoption found out so far about the two ends is no longer so. */
static __always_inline void forget_findings(struct pair *p)
{
	/* enlist, which finds nothing in advance, may be writing to the same word. */
	if (!((p->end[CLIENT].flags | p->end[SERVER].flags) & (END_FIT | END_RESTED)))
		return;
	p->end[CLIENT].flags &= ~(END_FIT | END_RESTED);
	p->end[SERVER].flags &= ~(END_FIT | END_RESTED);
}

/*
 * The end that a direction leads to was read by a call that does not see redirected bytes. Said
 * before the pair drains: a verdict that finds it draining knows why (must_follow() in verdict.c).
 */
static __always_inline void blind(struct pair *p, struct direction *inbound)
{
	WRITE_ONCE(inbound->fit, FIT_BLIND);
	__sync_fetch_and_add(&p->half, 1);	/* a full barrier */
}

static __always_inline void tell_orphan(struct end_key *key)
{
	struct event e = {
		.type = EVENT_DRAIN,
		.reason = REASON_CLOSING,
		.id = key->id,
		.netns = { key->netns, key->netns },
	};

	events.ringbuf_output(&e, sizeof(e), 0);
}

/*
 * Marks on the sockets of connections that may have a record, so that reading
 * any other costs observe one load. A client to another host cannot know that
 * and has its mark too: its reads cost two failed lookups as well. Both are flags
 * that SOCK_OPS has anyway: the server's close is the end of the pair, and
 * retransmission timeouts, the client's, are rare where both ends are on one host.
 */
#define SERVER_MARK	BPF_SOCK_OPS_STATE_CB_FLAG
#define CLIENT_MARK	BPF_SOCK_OPS_RTO_CB_FLAG

/* TCP serves it better, and would the next time. */
static __always_inline int is_loss(u32 reason)
{
	return reason == REASON_STREAM || reason == REASON_SPINNING;
}

/*
 * How drastic must it be? If redirecting on for a moment does no harm, both ends
 * can be taken out at once when they are at rest, and no reader ever sees a
 * boundary between redirected bytes and TCP bytes.
 */
static __always_inline int may_take_time(u32 reason)
{
	return reason == REASON_POLICY || reason == REASON_REQUEST ||
	       reason == REASON_STOP || is_loss(reason);
}

/* So long may a pair be waited for that is to leave, before it is made to. */
#define LEAVE_NS		100000000ULL

/*
 * The pair is draining: no verdict of it redirects any more. If maps and `own` hold the
 * only references to our psock, no other call is between its verdict and the peer's
 * queue either: everything that we redirected has arrived. A sender that never rests
 * shows it by its next verdict, and who only reads by its next read: the kernel lets go
 * of the psock before it reads from TCP. See adopt.c.
 */
static __always_inline void note_settled(struct direction *d, void *tp, u32 own)
{
	u64 psock = own_psock(tp);

	if (!d->settled && psock && is_unused(psock, 1, own))
		WRITE_ONCE(d->settled, 1);
}

static __always_inline int is_redirecting(u32 state)
{
	return state == STATE_SPLICED || state == STATE_LEAVING;
}

/*
 * From here on, or once the ends are at rest, every verdict for this pair
 * passes. Redirected bytes are read first whatever follows through TCP, so the
 * order holds. A lost event costs time only: the daemon's watch finds draining
 * pairs by itself.
 */
static __always_inline void start_draining(struct pair *p, u32 reason)
{
	forget_waiting(p);
	p->reason = reason;
	p->changed_ns = bpf_ktime_get_ns();
	WRITE_ONCE(p->state, p->state == STATE_SPLICED && may_take_time(reason) ?
			     STATE_LEAVING : STATE_DRAINING);
	tell(p, EVENT_DRAIN, reason);
}
