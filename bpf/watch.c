/* SPDX-License-Identifier: GPL-2.0 */
/*
 * watch: iter/sockmap over the SOCKHASH, run by the daemon after an
 * EVENT_WATCH and otherwise once a second; and to start the draining of all.
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
	u32 copied_seq, reason, unread, waited;
	struct direction *inbound;
	struct settings *s;
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
	if (is_end(&p->end[CLIENT], tp)) {
		e = &p->end[CLIENT];
		inbound = &p->dir[SERVER];
	} else if (is_end(&p->end[SERVER], tp)) {
		e = &p->end[SERVER];
		inbound = &p->dir[CLIENT];
	} else {
		return 0;
	}
	count_sweep(SWEEP_SEEN);
	if (p->state == STATE_DRAINING || p->state == STATE_LEAVING) {
		/*
		 * adopt does not come by: it waits for a lock in that namespace, or
		 * nobody has a name for it. Off has to mean off all the same.
		 */
		if (p->state == STATE_LEAVING && p->reason != REASON_STOP &&
		    bpf_ktime_get_ns() - p->changed_ns > 3 * LEAVE_NS)
			WRITE_ONCE(p->state, STATE_DRAINING);
		count_sweep(SWEEP_TO_DRAIN);
		tell(p, EVENT_DRAIN, p->reason);
		return 0;
	}
	if (p->state != STATE_SPLICED)
		return 0;
	p->watched = 0;
	s = get_settings();
	if (s && s->stopping) {
		start_draining(p, s->stopping);
		return 0;
	}
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
	if (is_out_of_memory((u64)tp)) {
		start_draining(p, REASON_MEMORY);
		return 0;
	}
	/* A FIN waits behind redirected bytes, as it should. */
	unread = unread_data(tp);
	copied_seq = FIELD(tp, u32, tcp_sock_copied_seq);
	waited = note_waiting(e, unread, copied_seq);
	if (!unread)
		return 0;
	if (waited >= RESCUE_MS) {
		if (!inbound->fit)
			/* Eager, and it has never read: slow, or unable to. */
			reason = REASON_UNACCEPTED;
		else if (e->waiting_for != copied_seq)
			/*
			 * It reads, and so slowly that none of our looks found it
			 * done: all that comes passes, which TCP does better. Or it
			 * reads byte by byte because FIONREAD says 0.
			 */
			reason = REASON_BUSY;
		else
			reason = REASON_RESCUE;
		if (reason == REASON_RESCUE) {
			count(COUNT_RESCUED, 1);
			count_sweep(SWEEP_STUCK);
		}
		start_draining(p, reason);
		return 0;
	}
	count_sweep(SWEEP_UNREAD);
	return 0;
}
