/* SPDX-License-Identifier: GPL-2.0 */
/*
 * adopt: iter/tcp, run by the daemon once per network namespace when there is
 * something to do. Every socket is visited with its lock held.
 *
 * Putting a pair in. The ends are visited one after the other, and between the
 * two visits bytes still flow through TCP. An end that is in the SOCKHASH must
 * not be left with TCP bytes it has not read: on kernels of class B its
 * FIONREAD would not count them (readers like nginx then wait for ever: see
 * "Three kernel classes" in ARCHITECTURE.md). So the end that was never seen to
 * leave bytes behind goes first. From then on each of its sends passes the
 * verdict, so when the second end goes in at a moment with nothing in flight
 * towards it, its next bytes are redirected.
 *
 * Taking a pair out, if there is time: see try_leave().
 *
 * Taking a pair out that cannot wait, or is never at rest. Deleting an end throws
 * away what its reader has not read, and a sender that has decided to redirect
 * may not have arrived yet. The sender's psock tells: a system call on a spliced
 * socket holds a reference to it from before the verdict until after the message
 * was queued. One reference is the map's. So: state DRAINING, then the sender's
 * psock seen with the map's reference only (any later send passes) or, by the
 * verdict of its next send, with one more; then the reader's queue seen empty
 * under its lock. Other maps that the socket is in hold a reference each. One whose
 * sk_skb program reads the socket keeps the psock and its queue, which no read may
 * ever empty: that is not waited for.
 */

#define SETTLE_NS		10000000000ULL
#define SETTLE_BLOCKING_NS	1000000000ULL
/* Visits without a quiet moment before adoption gives up for a while. */
#define MAX_ATTEMPTS		64
/*
 * An end that is in and only passes is slower than plain TCP, so one end alone
 * does not stay for long.
 */
#define MAX_HALF		24
#define PATIENT_HALF		6
#define LEAVE_LOSS_NS		50000000ULL
#define COOL_DOWN_NS		1000000000ULL
/* What TCP serves better is not tried again soon: each try is a loss until it is noticed. */
#define LOSS_COOL_DOWN_NS	15000000000ULL
/* A reader that took nothing for so long of what waits for it does not read. */
#define IDLE_MS			60

/* Nothing of what the peer sent through TCP is unread, nothing in flight. */
static __always_inline int is_caught_up(void *tp, struct end *peer)
{
	u32 write_seq = 0, copied_seq = FIELD(tp, u32, tcp_sock_copied_seq);
	u64 cookie = 0;

	PROBE(write_seq, peer->sk, tcp_sock_write_seq);
	PROBE(cookie, peer->sk, sock_skc_cookie);
	return cookie == peer->cookie && write_seq == copied_seq;
}

/* All that this socket ever sent through TCP has been read. */
static __always_inline int has_been_read(void *tp, struct end *peer)
{
	u32 copied_seq = 0;
	u64 cookie = 0;

	PROBE(copied_seq, peer->sk, tcp_sock_copied_seq);
	PROBE(cookie, peer->sk, sock_skc_cookie);
	return cookie == peer->cookie && copied_seq == FIELD(tp, u32, tcp_sock_write_seq);
}

/*
 * The first end waits alone in the map. Does it have TCP bytes that it does not
 * read? On class B it may be unable to see them.
 */
static __always_inline int is_stranded(struct end *first)
{
	u32 copied_seq = 0, unread = probe_unread_data(first->sk, &copied_seq);

	return note_waiting(first, unread, copied_seq) >= STRANDED_MS &&
	       first->waiting_for == copied_seq;
}

/*
 * May this end go in now? half: the other one is in already, and waits for it. A
 * stream never comes to rest at its receiver, so the first end goes in only after
 * both were seen at rest, at whatever visit.
 */
static __always_inline int
is_good_moment(void *tp, struct settings *s, struct pair *p, struct end *e, struct end *peer,
	       u32 half)
{
	if (unread_bytes(tp) || !is_caught_up(tp, peer))
		return 0;
	e->flags |= END_RESTED;
	if (!half) {
		if (!(peer->flags & END_RESTED) || s->finishing)
			return 0;
		if (e->flags & END_PARTIAL && !(peer->flags & END_PARTIAL))
			return 0;
	} else if (!is_quiet(peer) || (!has_been_read(tp, peer) && p->half <= PATIENT_HALF)) {
		/*
		 * Better neither end has TCP bytes to read when both are in. Where
		 * both send all the time there is no such moment.
		 */
		return 0;
	}
	/* Not our own psock of last time, on its way out. */
	return !FIELD(tp, u64, sock_sk_user_data);
}

static __always_inline void
try_adopt(void *sk, void *tp, struct settings *s, struct pair_id *id, struct pair *p,
	  struct end *e, struct end *peer)
{
	u32 reason, half;
	struct end_key key;

	if (p->policy != s->policy)
		decide(p, s);
	reason = find_refusal(tp, p, e);
	if (reason) {
		refuse(p, reason, REFUSED_RETRY_NS);
		return;
	}
	e->flags |= END_FIT;
	half = (e->flags | peer->flags) & END_IN_MAP;
	if (++p->attempts > MAX_ATTEMPTS || (half && ++p->half > MAX_HALF)) {
		refuse(p, REASON_BUSY, BUSY_RETRY_NS);
		return;
	}
	if (e->flags & END_IN_MAP || !(peer->flags & END_FIT))
		goto later;
	if (half && is_stranded(peer)) {
		refuse(p, REASON_BUSY, BUSY_RETRY_NS);
		return;
	}
	if (!is_good_moment(tp, s, p, e, peer, half))
		goto later;
	/* The other end is looked at once more: it may have changed while it was in. */
	if (half) {
		reason = find_misfit(peer->sk, p, peer, 1);
		if (reason) {
			refuse(p, reason, REFUSED_RETRY_NS);
			return;
		}
	}
	/* The record may have been reused; with our own id the key is ours. */
	key = key_of(e, *id);
	if (put_into_map(sk, &key)) {
		refuse(p, REASON_FULL, REFUSED_RETRY_NS);
		return;
	}
	e->flags |= END_IN_MAP;
	if (!half) {
		p->half = 0;
		goto later;
	}

	p->reason = REASON_NONE;
	begin_splicing(p);
	/*
	 * A send whose verdict came before may be on its way through TCP to an
	 * end that is in now. Its reference to the psock was taken before its
	 * verdict; the state was written before this look: one of the two sees
	 * the other.
	 */
	if (!is_caught_up(tp, peer) || !is_quiet(peer)) {
		refuse(p, REASON_BUSY, BUSY_RETRY_NS);
		return;
	}
	p->was_spliced = 1;
	p->refusals = 0;
	count(COUNT_SPLICED, 1);
	count_sweep(SWEEP_ADOPTED);
	if (!has_been_read(tp, peer))
		ask_for_watch(p);
	return;
later:
	count_sweep(SWEEP_TO_ADOPT);
	if ((e->flags | peer->flags) & END_IN_MAP)
		count_sweep(SWEEP_HALF);
}

/*
 * The pokes: TCP bytes may have arrived unseen while the end was in. Setting
 * SO_RCVLOWAT to what it is raises EPOLLIN again if there are any. For a FIN alone
 * TCP has raised it already. A sender that waits for room looks for it again when
 * TCP_NOTSENT_LOWAT is set.
 */
static __always_inline void take_out(void *sk, void *tp, struct end_key *key)
{
	u32 lowat = FIELD(tp, u32, sock_sk_rcvlowat);
	u32 notsent = FIELD(tp, u32, tcp_sock_notsent_lowat);

	spliced.delete(key);
	if (unread_data(tp))
		set_sockopt(sk, SOL_SOCKET, SO_RCVLOWAT, &lowat, sizeof(lowat));
	if (waits_for_room(socket_of((u64)tp)))
		set_sockopt(sk, SOL_TCP, TCP_NOTSENT_LOWAT, &notsent, sizeof(notsent));
}

static __always_inline u64 get_cool_down(struct pair *p)
{
	switch (p->reason) {
	case REASON_REQUEST:
	case REASON_POLICY:
		return 0;
	case REASON_STREAM:
	case REASON_SPINNING:
		return LOSS_COOL_DOWN_NS << p->drains;
	case REASON_BUSY:
		return BUSY_RETRY_NS << (p->refusals > p->drains ? p->refusals : p->drains);
	default:
		return COOL_DOWN_NS << p->drains;
	}
}

/*
 * Is everything that the peer redirected in our queue? If neither its rest nor
 * its next verdict has shown that, it sits in one system call: asleep in TCP,
 * we suppose after SETTLE_NS, unless somebody holds our psock (a sender does
 * from before it queues). Readers that sleep hold theirs.
 */
static __always_inline int
has_arrived(void *tp, struct pair *p, struct end *peer, struct direction *inbound)
{
	u64 waited = bpf_ktime_get_ns() - p->changed_ns;

	if (READ_ONCE(inbound->settled) || is_quiet(peer))
		return 1;
	if (p->allow_blocking)
		return waited >= SETTLE_BLOCKING_NS;
	if (waited < SETTLE_NS)
		return 0;
	return is_unused(own_psock(tp), 1, 0) || p->end[CLIENT].asleep || p->end[SERVER].asleep;
}

/* Both ends are out. */
static __always_inline void finish(struct pair *p)
{
	u64 now = bpf_ktime_get_ns();

	p->announced = 0;
	p->attempts = 0;
	forget_findings(p);
	forget_waiting(p);
	if (p->was_spliced && p->drains < MAX_DOUBLINGS && p->reason != REASON_REQUEST &&
	    p->reason != REASON_POLICY)
		p->drains++;
	p->retry_ns = now + get_cool_down(p);
	p->changed_ns = now;
	WRITE_ONCE(p->state, STATE_PAIRED);
	if (p->was_spliced) {
		u32 reason = p->reason;

		count(COUNT_DRAINED, 1);
		count(COUNT_WENT_BACK + (reason < NR_REASONS ? reason : 0), 1);
	}
	p->was_spliced = 0;
	count_sweep(SWEEP_DRAINED);
}

/* The record may have been reused; with the id of the socket visited, the key is its. */
static __always_inline void
forget_end(void *sk, void *tp, struct pair_id *id, struct end *e)
{
	struct end_key key = key_of(e, *id);

	if (sk)
		take_out(sk, tp, &key);
	else
		spliced.delete(&key);
	e->flags = (e->flags & ~END_IN_MAP) | END_LEFT;
}

/*
 * The other end's reader does not see redirected bytes. While some wait for it our sends
 * have to go behind them (see must_follow() in verdict.c), so we stay in.
 */
static __always_inline int has_to_stay(void *tp, struct end *peer, struct direction *outbound)
{
	if (outbound->fit != FIT_BLIND || !is_still_in(peer))
		return 0;
	return !is_psock_empty(psock_of(peer->sk)) ||
	       !(READ_ONCE(outbound->settled) || is_unused(own_psock(tp), 1, 0));
}

static __always_inline void
try_take_out(void *sk, void *tp, struct pair_id *id, struct pair *p, struct end *e,
	     struct end *peer, struct direction *inbound, struct direction *outbound)
{
	if (!(e->flags & END_IN_MAP))
		return;
	if (!has_arrived(tp, p, peer, inbound) || has_to_stay(tp, peer, outbound) ||
	    !(is_psock_empty(own_psock(tp)) || is_taken_over((u64)tp))) {
		count_sweep(SWEEP_TO_DRAIN);
		return;
	}
	forget_end(sk, tp, id, e);
	if (!(peer->flags & END_IN_MAP))
		finish(p);
}

/*
 * Nothing is unread at either end, nothing on its way, and nothing can set out
 * from here while we hold the lock.
 */
static __always_inline int is_at_rest(void *tp, struct end *peer)
{
	u64 psock = own_psock(tp);

	if (!is_unused(psock, 1, 0) || !is_psock_empty(psock) || !is_quiet(peer) ||
	    !is_psock_empty(psock_of(peer->sk)) || unread_bytes(tp) || !is_caught_up(tp, peer))
		return 0;
	if (is_out_of_memory(peer->sk, socket_of(peer->sk)))
		return 0;	/* it has to be told, which only its own visit can do */
	return has_been_read(tp, peer);
}

/* Watch how an end's reader gets on with what was redirected to it. */
static __always_inline void note_reading(u64 psock, struct end *e)
{
	u64 first = 0;

	PROBE(first, psock, sk_psock_ingress_msg);
	if (e->waiting_ms && e->waiting_for != (u32)first) {
		e->waiting_ms = 0;	/* it has come further since */
		e->flags |= END_MOVED;
	}
	note_waiting(e, first != psock + OFF_sk_psock_ingress_msg, first);
}

/* Something waits, and as far as we know nobody reads it. */
static __always_inline int is_idle(struct end *e)
{
	u32 now = bpf_ktime_get_ns() / 1000000 ?: 1;

	return e->waiting_ms && (!(e->flags & END_MOVED) || now - e->waiting_ms >= IDLE_MS);
}

/*
 * Take both ends out in one visit. Until then the verdict redirects, so TCP
 * bytes never come to an end that is in. Between the two looks the peer may
 * begin to send: either the second look sees its reference, or its verdict sees
 * the new state and its bytes wait for our lock. In the first case they may be
 * on either way, and the pair drains like any other.
 *
 * When splicer stops, nobody will be there to take out an end whose reader does
 * not read, a stopped process for instance. With TCP bytes behind the redirected
 * ones it might never see these (class B). So such a pair stays as it is, and
 * is redirected for as long as it lives if it must.
 */
static __always_inline void
try_leave(void *sk, void *tp, struct pair_id *id, struct pair *p, struct end *e,
	  struct end *peer)
{
	u64 patience = is_loss(p->reason) ? LEAVE_LOSS_NS : LEAVE_NS;
	int both = e->flags & peer->flags & END_IN_MAP;

	if (p->reason == REASON_STOP) {
		/* Both: the visit of the peer may come when patience has ended. */
		note_reading(own_psock(tp), e);
		note_reading(psock_of(peer->sk), peer);
		if (is_idle(e) || is_idle(peer))
			patience = ~0ULL;
	}
	if (!both || !is_at_rest(tp, peer)) {
		if (!both || bpf_ktime_get_ns() - p->changed_ns > patience) {
			WRITE_ONCE(p->state, STATE_DRAINING);
			tell(p, EVENT_DRAIN, p->reason);	/* urgent from here on */
		}
		count_sweep(SWEEP_TO_DRAIN);
		return;
	}
	WRITE_ONCE(p->state, STATE_DRAINING);
	__sync_fetch_and_add(&p->half, 1);	/* a full barrier */
	if (!is_at_rest(tp, peer)) {
		count_sweep(SWEEP_TO_DRAIN);
		tell(p, EVENT_DRAIN, p->reason);
		return;
	}
	forget_end(0, 0, id, peer);
	forget_end(sk, tp, id, e);
	finish(p);
}

/*
 * From here on no server finds this client in the SOCKHASH, or there is a record by
 * now: the other half of what splice_eagerly() in register.c does.
 */
static __always_inline void mark_taken(struct pair_id *id)
{
	struct rendezvous *r = get_slot(*id);

	if (!r || !is_same(r->id, *id))
		return;
	WRITE_ONCE(r->in_map, WAITING_TAKEN);
	__sync_fetch_and_add(&r->barrier, 1);
}

/*
 * An end without a record: its server is closed, or it never had one. Nobody
 * redirects to it any more.
 */
static __always_inline void take_out_orphan(void *sk, void *tp)
{
	u64 psock = own_psock(tp);
	struct end_key *noted, key;

	if (!psock)
		return;
	noted = ends.sk_storage_get(sk, 0, 0);
	if (!noted)
		return;		/* somebody else's psock */
	if (!is_psock_empty(psock)) {
		count_sweep(SWEEP_TO_DRAIN);
		return;
	}
	key = *noted;
	mark_taken(&key.id);
	if (pairs.lookup(&key.id)) {
		count_sweep(SWEEP_TO_DRAIN);
		return;
	}
	take_out(sk, tp, &key);
}

int bpf_iter__tcp(struct bpf_iter__tcp *ctx)
{
	void *sk = ctx->sk_common, *tp;
	struct settings *s;
	struct end *e, *peer;
	struct pair_id id;
	struct pair *p;
	int side;

	if (!sk)
		return 0;
	tp = to_tcp_sock(sk);
	if (!tp)
		return 0;	/* listening, TIME_WAIT or not yet accepted */
	p = find_pair_of(tp, &id, &side);
	if (!p) {
		take_out_orphan(sk, tp);
		return 0;
	}
	s = get_settings();
	if (!s)
		return 0;
	e = side == CLIENT ? &p->end[CLIENT] : &p->end[SERVER];
	if (!is_end(e, tp))
		return 0;	/* a forged name */
	peer = other_end(p, side);
	if (s->stopping && (p->state == STATE_SPLICED || p->state == STATE_PAIRED) &&
	    (e->flags | peer->flags) & END_IN_MAP) {
		p->reason = s->stopping;
		p->changed_ns = bpf_ktime_get_ns();
		forget_waiting(p);
		WRITE_ONCE(p->state, p->state == STATE_SPLICED ? STATE_LEAVING : STATE_DRAINING);
	}
	if (s->stopping && p->state == STATE_LEAVING)
		p->reason = s->stopping;
	if (p->state == STATE_LEAVING)
		try_leave(sk, tp, &id, p, e, peer);
	else if (p->state == STATE_DRAINING)
		try_take_out(sk, tp, &id, p, e, peer,
			     side == CLIENT ? &p->dir[SERVER] : &p->dir[CLIENT],
			     side == CLIENT ? &p->dir[CLIENT] : &p->dir[SERVER]);
	else if (p->state == STATE_PAIRED && p->reason == REASON_PENDING && s->splicing &&
		 !s->stopping && (p->announced == ANNOUNCED_BY_WALK || (p->announced && s->walking)))
		try_adopt(sk, tp, s, &id, p, e, peer);
	return 0;
}
