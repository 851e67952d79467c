/* SPDX-License-Identifier: GPL-2.0 */
/*
 * watch: iter/sockmap over the SOCKHASH, run by the daemon after an
 * EVENT_WATCH and otherwise once a second.
 *
 * Ends that became unfit are drained. So is an end whose TCP bytes do not
 * move: its reader may be unable to see them (FIONREAD on class B). Once it is
 * out, the poke of adopt wakes that reader.
 */

/* A reader that gets no CPU for less than this is not stuck. */
#define RESCUE_MS	40

struct bpf_iter__sockmap {
	void *meta;
	void *map;
	struct end_key *key;
	void *sk;
};

int bpf_iter__sockmap(struct bpf_iter__sockmap *ctx)
{
	struct end_key *key = ctx->key;
	struct pair_id id;
	struct end *e;
	struct pair *p;
	u32 copied_seq, reason;
	struct direction *inbound;
	struct settings *s;
	u32 now;
	void *tp;

	if (!key || !ctx->sk)
		return 0;
	tp = to_tcp_sock(ctx->sk);
	if (!tp)
		return 0;
	id = key->id;
	p = pairs.lookup(&id);
	if (!p) {
		/* No record any more. adopt does not see a closed socket. */
		if (FIELD(tp, u8, sock_skc_state) != BPF_TCP_CLOSE)
			tell_orphan(key);
		return 0;
	}
	if (p->end[CLIENT].sk == (u64)ctx->sk) {
		e = &p->end[CLIENT];
		inbound = &p->dir[SERVER];
	} else if (p->end[SERVER].sk == (u64)ctx->sk) {
		e = &p->end[SERVER];
		inbound = &p->dir[CLIENT];
	} else {
		return 0;
	}
	count_sweep(SWEEP_SEEN);
	if (p->state == STATE_DRAINING || p->state == STATE_LEAVING) {
		count_sweep(SWEEP_TO_DRAIN);
		tell(p, EVENT_DRAIN, p->reason);
		return 0;
	}
	if (p->state != STATE_SPLICED)
		return 0;
	p->watched = 0;
	s = get_settings();
	if (s && p->policy != s->policy)
		decide(p, s);
	if (p->mode == MODE_OFF) {
		start_draining(p, REASON_POLICY);
		return 0;
	}
	/* O_NONBLOCK taken away, an option that guard did not see in time. */
	reason = find_misfit((u64)tp, p, e);
	if (reason && reason != REASON_UNACCEPTED) {
		start_draining(p, reason);
		return 0;
	}
	copied_seq = FIELD(tp, u32, tcp_sock_copied_seq);
	/* A FIN waits behind redirected bytes, as it should. */
	if (!unread_data(tp)) {
		e->stuck_ms = 0;
		return 0;
	}
	now = bpf_ktime_get_ns() / 1000000 ?: 1;
	if (!e->stuck_ms || e->stuck_seq != copied_seq) {
		e->stuck_ms = now;
		e->stuck_seq = copied_seq;
	} else if (now - e->stuck_ms >= RESCUE_MS) {
		e->stuck_ms = 0;
		if (!inbound->fit) {
			/* Eager, and it has never read: slow, or unable to. */
			start_draining(p, REASON_UNACCEPTED);
			return 0;
		}
		count(COUNT_RESCUED, 1);
		count_sweep(SWEEP_STUCK);
		start_draining(p, REASON_RESCUE);
		return 0;
	}
	count_sweep(SWEEP_UNREAD);
	return 0;
}
