/* SPDX-License-Identifier: GPL-2.0 */
/*
 * watch: a raw tracepoint program that is attached to nothing. The daemon runs it
 * (BPF_PROG_TEST_RUN) on the pairs it names: each spliced one once a second, sooner
 * those that asked with an EVENT_WATCH, and all of them to have them drained.
 *
 * Ends that became unfit are drained. So is an end whose TCP bytes do not
 * move: its reader may be unable to see them (FIONREAD on class B). Once it is
 * out, the poke of adopt wakes that reader.
 *
 * It also tells the daemon where TCP has been silent for a whole lease, though
 * something was sent: see splicer/daemon/lease.py.
 *
 * The sockets are not locked, and read through their stored addresses. That needs
 * no iterator over the elements of a map, which some kernels refuse, and it sees
 * sockets that TCP has closed and their owner has not.
 */

/* A reader that gets no CPU for less than this is not stuck. */
#define RESCUE_MS	40
/* For so long a pair is looked at more closely than later. */
#define NEW_NS		3000000000ULL

/* How closely to look at a pair. */
enum care {
	CARE_QUIET,		/* nothing was sent since the last look */
	CARE_BUSY,
	CARE_THOROUGH,		/* it is new, its policy stricter, or its turn has come: one look in eight */
};

static __always_inline enum care get_care(struct pair *p)
{
	return p->care & ~(TALKS | TALKED);
}

/*
 * Most of what a look costs is to fetch a cache line that nobody has touched for
 * a second. So what can hardly have changed is looked at less often.
 */
static __always_inline enum care choose_care(struct pair *p, int *is_silent)
{
	u64 now = bpf_ktime_get_ns();
	u32 before = p->messages;

	p->messages = p->dir[CLIENT].redirected_messages + p->dir[CLIENT].passed_messages +
		      p->dir[SERVER].redirected_messages + p->dir[SERVER].passed_messages;
	*is_silent = p->messages == before;
	if (p->stricter || now - p->changed_ns < NEW_NS || !((now >> 30 ^ p->id.client_seq) & 7))
		return CARE_THOROUGH;
	return *is_silent ? CARE_QUIET : CARE_BUSY;
}

/* Choose the care. Does somebody speak on it for the first time in more than a lease? */
static __always_inline u32 note_talk(struct pair *p)
{
	u8 talk = p->care & (TALKS | TALKED);
	int is_silent;
	u8 care = choose_care(p, &is_silent);

	if (is_silent || talk) {
		p->care = care | talk | (is_silent ? 0 : TALKS);
		return 0;
	}
	p->care = care | TALKED;	/* it will be so in a moment */
	return LOOK_TALKS;
}

/* A lease ends, and the next one begins. Those that talked get a packet each way. */
static __always_inline u32 note_leases(struct pair_id *ids)
{
	u32 talked = 0;

	for (int i = 0; i < WATCH_PAIRS; i++) {
		struct pair_id id = ids[i];
		struct pair *p = pairs.lookup(&id);

		if (!p || p->state != STATE_SPLICED)
			continue;
		if (p->care & TALKS)
			talked |= 1 << i;
		p->care = get_care(p) | (p->care & TALKS ? TALKED : 0);
	}
	return talked;
}

/* A number of a pair's client, for a packet like those that it would send; 0 if it is not spliced. */
static __always_inline u32 read_number(struct pair_id *first, u64 question)
{
	struct pair_id id = *first;
	struct pair *p = pairs.lookup(&id);
	u32 number = 0;
	u64 sk;

	if (!p || p->state != STATE_SPLICED)
		return 0;
	sk = p->end[CLIENT].sk;
	if (question == ASK_SENT)
		PROBE(number, sk, tcp_sock_snd_una);
	else if (question == ASK_RECEIVED)
		PROBE(number, sk, tcp_sock_rcv_nxt);
	else if (question == ASK_DEVICE)
		PROBE(number, sk, sock_skc_bound_dev_if);
	else
		PROBE(number, sk, sock_sk_mark);
	return is_still_in(&p->end[CLIENT]) ? number : 0;
}

/* What concerns both ends. */
static __always_inline u32 look_at_pair(struct pair *p, struct settings *s)
{
	int is_outdated = p->policy != s->policy;
	u32 state = p->state;

	if (state == STATE_SPLICED && !s->stopping && !is_outdated && p->mode != MODE_OFF) {
		p->watched = 0;
		return note_talk(p);
	}
	if (!is_still_in(&p->end[CLIENT]) && !is_still_in(&p->end[SERVER]))
		return 0;
	if (state == STATE_SPLICED) {
		if (!s->stopping && is_outdated)
			return LOOK_OUTDATED;
		start_draining(p, s->stopping ? s->stopping : REASON_POLICY);
	} else if (state == STATE_DRAINING || state == STATE_LEAVING) {
		/*
		 * adopt does not come by: it waits for a lock in that namespace, or
		 * nobody has a name for it. Off has to mean off all the same.
		 */
		if (state == STATE_LEAVING && p->reason != REASON_STOP &&
		    bpf_ktime_get_ns() - p->changed_ns > 3 * LEAVE_NS)
			WRITE_ONCE(p->state, STATE_DRAINING);
		tell(p, EVENT_DRAIN, p->reason);
	}
	return 0;
}

/*
 * Do TCP bytes wait at this end, and has its reader had time enough? Returns why
 * it may not stay in, or REASON_NONE and, if they do, that another look is due.
 */
static __always_inline u32
find_waiting(struct end *e, u64 sk, struct direction *inbound, u32 *look)
{
	u32 copied_seq = 0, unread = probe_unread_data(sk, &copied_seq);
	u32 waited = note_waiting(e, unread, copied_seq);

	if (!unread)
		return REASON_NONE;
	if (waited < RESCUE_MS) {
		*look = LOOK_AGAIN;
		return REASON_NONE;
	}
	if (!inbound->fit)
		/* Eager, and it has never read: slow, or unable to. */
		return REASON_UNACCEPTED;
	if (e->waiting_for != copied_seq)
		/*
		 * It reads, and so slowly that none of our looks found it
		 * done: all that comes passes, which TCP does better. Or it
		 * reads byte by byte because FIONREAD says 0.
		 */
		return REASON_BUSY;
	return REASON_RESCUE;
}

/* Why this end of a spliced pair may not stay in, or REASON_NONE. */
static __always_inline u32
examine(struct pair *p, struct end *e, struct direction *inbound, u32 *look)
{
	u64 sk = e->sk, socket = socket_of(sk);
	u32 reason;

	/* O_NONBLOCK taken away; or it never was there, and it sleeps now. */
	reason = find_misfit_file(socket, p->allow_blocking);
	if (reason == REASON_BLOCKING && e->flags & END_SLEEPLESS && !is_asleep(e))
		reason = REASON_NONE;
	if (reason && reason != REASON_UNACCEPTED)
		return reason;
	if (is_out_of_memory(sk, socket))
		return REASON_MEMORY;
	reason = find_habit(e);
	if (reason)
		return reason;
	if (get_care(p) == CARE_QUIET && !e->waiting_ms)
		return REASON_NONE;
	/*
	 * guard sees options asked for, and drains. It misses one whose thread
	 * was held up behind it for as long as an adoption takes.
	 */
	if (get_care(p) == CARE_THOROUGH) {
		reason = find_misfit_option(sk, p->allow_inq);
		if (reason)
			return reason;
		if (is_taken_over(sk))
			return REASON_FOREIGN_PSOCK;
	}
	return find_waiting(e, sk, inbound, look);
}

static __always_inline u32 look_at_end(struct pair *p, struct end *e, struct direction *inbound)
{
	u32 look = 0, reason = examine(p, e, inbound, &look);

	/* Last, for few have to be asked: what was read may be of a socket that has gone. */
	if ((!reason && !look) || !is_still_in(e))
		return 0;
	if (!reason)
		return look;
	if (reason == REASON_BLOCKING && e->flags & END_SLEEPLESS)
		remember_sleeper(e);
	if (reason == REASON_FOREIGN_PSOCK)
		remember_taken_over(e);
	if (reason == REASON_SPLICE)
		blind(p, inbound);
	/* By way of memory the verifier forgets which it was, and walks on once and not once for each. */
	WRITE_ONCE(p->reason, reason);
	reason = READ_ONCE(p->reason);
	start_draining(p, reason);
	if (reason != REASON_RESCUE)
		return 0;
	count(COUNT_RESCUED, 1);
	return LOOK_RESCUED;
}

/*
 * Most of a look is waiting for memory that nobody has touched for seconds: the record,
 * and for each end the sock, its socket and its file, one behind the other. All pairs of
 * a run are led through each of these steps together, so that they wait together.
 */
static __always_inline void fetch(struct pair_id *ids)
{
	u64 at[2 * WATCH_PAIRS];

#pragma unroll
	for (int i = 0; i < WATCH_PAIRS; i++) {
		struct pair_id id = ids[i];
		struct pair *p = pairs.lookup(&id);

		at[2 * i] = p ? p->end[CLIENT].sk : 0;
		at[2 * i + 1] = p ? p->end[SERVER].sk : 0;
	}
#pragma unroll
	for (int i = 0; i < 2 * WATCH_PAIRS; i++)
		at[i] = socket_of(at[i]);
#pragma unroll
	for (int i = 0; i < 2 * WATCH_PAIRS; i++) {
		u64 file = 0;

		PROBE(file, at[i], socket_file);
		at[i] = file;
	}
#pragma unroll
	for (int i = 0; i < 2 * WATCH_PAIRS; i++) {
		u32 flags = 0;

		PROBE(flags, at[i], file_f_flags);
	}
}

/*
 * The loops are two, and the second one goes from end to end: the verifier walks
 * through each way that leads through a turn of a loop once for each way that
 * leads to it.
 */
int watch(struct watch_request *ctx)
{
	struct pair_id ids[WATCH_PAIRS];
	struct settings *s = get_settings();
	struct pair *p;
	u64 question;
	u32 found = 0;

	if (!s)
		return 0;
	/* A context cannot be read at a place that is not known beforehand. */
#pragma unroll
	for (int i = 0; i < WATCH_PAIRS; i++)
		ids[i] = ctx->id[i];
	question = ctx->question;
	if (question == ASK_WHO_TALKED)
		return note_leases(ids);
	if (question > ASK_WHO_TALKED)
		return read_number(&ids[0], question);
	if (question == ASK_POLICY) {
		/* One at a time, for there are many rules. */
		p = pairs.lookup(&ids[0]);
		if (p && p->state == STATE_SPLICED)
			decide(p, s);
	}
	fetch(ids);
	for (int i = 0; i < WATCH_PAIRS; i++) {
		struct pair_id id = ids[i];

		p = pairs.lookup(&id);
		if (p)
			found |= look_at_pair(p, s) << i * LOOK_BITS;
	}
	for (int i = 0; i < 2 * WATCH_PAIRS; i++) {
		struct pair_id id = ids[i / 2];
		int side = i % 2;

		p = pairs.lookup(&id);
		if (p && p->state == STATE_SPLICED)
			found |= look_at_end(p, &p->end[side], &p->dir[1 - side]) << i / 2 * LOOK_BITS;
	}
	return found;
}
