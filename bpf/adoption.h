/* SPDX-License-Identifier: GPL-2.0 */
/* Putting ends into the SOCKHASH: what enlist and adopt have in common. */

#define BUSY_RETRY_NS		250000000ULL
#define REFUSED_RETRY_NS	1000000000ULL
/* Each of these is doubled every time, so that a pair does not flap. */
#define MAX_DOUBLINGS		6
/* A reader that gets no CPU for less than this is not stranded. */
#define STRANDED_MS		15

/* No system call of the peer is on its way to or from our queue. */
static __always_inline int is_quiet(struct end *peer)
{
	u64 psock = psock_of(peer->sk), cookie = 0;
	int is_free;

	if (!psock)
		return 1;	/* out of the map, and no system call holds it */
	if (!(peer->flags & (END_IN_MAP | END_LEFT)))
		return 1;	/* somebody else's, whose sends come by TCP */
	is_free = is_unused(psock, peer->flags & END_IN_MAP, 0);
	PROBE(cookie, peer->sk, sock_skc_cookie);
	if (cookie != peer->cookie)
		return 1;	/* closed, and close waits for system calls */
	return is_free;
}

/* An unfit end may become fit: O_NONBLOCK set late, an option taken back. */
static __always_inline void refuse(struct pair *p, u32 reason, u64 retry_ns)
{
	p->reason = reason;
	retry_ns <<= p->refusals;
	if (p->refusals < MAX_DOUBLINGS)
		p->refusals++;
	p->announced = 0;
	p->attempts = 0;
	forget_findings(p);
	count(COUNT_REFUSED + (reason < NR_REASONS ? reason : 0), 1);
	/* One end may be in already. */
	if ((p->end[CLIENT].flags | p->end[SERVER].flags) & END_IN_MAP)
		start_draining(p, reason);
	/* Not while a verdict may take it for data_ready. */
	p->retry_ns = bpf_ktime_get_ns() + retry_ns;
}

/* Where an end is in the SOCKHASH, for when its record has gone. 0 if there is no memory. */
static __always_inline int note_key(void *sk, struct end_key *key)
{
	struct end_key *noted = ends.sk_storage_get(sk, 0, BPF_SK_STORAGE_GET_F_CREATE);

	if (noted)
		*noted = *key;
	return noted != 0;
}

static __always_inline long put_into_map(void *sk, struct end_key *key)
{
	if (!note_key(sk, key))
		return -1;
	long err = spliced.update(key, sk);
	return err;
}

/* Why this end may not go in, or REASON_NONE. */
static __always_inline u32 find_refusal(void *tp, struct pair *p, struct end *e)
{
	u32 reason;

	if (FIELD(tp, u8, sock_skc_state) != BPF_TCP_ESTABLISHED ||
	    FIELD(tp, u8, sock_sk_shutdown))
		return REASON_CLOSING;
	if (p->mode == MODE_OFF)
		return REASON_POLICY;
	reason = find_misfit((u64)tp, p, e, 1);
	if (reason)
		return reason;
	/* Asked before either end goes in. Our own psock of last time, on its way out, is in no map. */
	if (FIELD(tp, u64, sock_sk_user_data) && !(e->flags & END_IN_MAP) &&
	    (!(e->flags & END_LEFT) || count_links(own_psock(tp))))
		return REASON_FOREIGN_PSOCK;
	return REASON_NONE;
}

static __always_inline enum fit find_fit(struct end *e)
{
	return e->flags & END_SLEEPLESS ? FIT_AWAKE : FIT;
}

/* Both ends are in: from here on verdicts redirect. */
static __always_inline void begin_splicing(struct pair *p)
{
	p->changed_ns = bpf_ktime_get_ns();
	p->dir[CLIENT].burst = 0;
	p->dir[SERVER].burst = 0;
	p->dir[CLIENT].contended = 0;
	p->dir[SERVER].contended = 0;
	p->dir[CLIENT].primed = 0;
	p->dir[SERVER].primed = 0;
	p->dir[CLIENT].fit = find_fit(&p->end[SERVER]);
	p->dir[SERVER].fit = find_fit(&p->end[CLIENT]);
	p->dir[CLIENT].settled = 0;
	p->dir[SERVER].settled = 0;
	PROBE(p->data_ready, p->end[CLIENT].sk, sock_sk_data_ready);
	WRITE_ONCE(p->state, STATE_SPLICED);
	/*
	 * A full barrier. Whoever is about to do something that a spliced pair must not
	 * have did it before this, and is seen by who looks after this, or sees the state.
	 */
	__sync_fetch_and_add(&p->half, 1);
	/* What was found out about plain ends holds no more. */
	unmute(p->end[CLIENT].cookie);
	unmute(p->end[SERVER].cookie);
}
