/* SPDX-License-Identifier: GPL-2.0 */
/*
 * verdict: SK_MSG on the SOCKHASH, once per message, with the sender's socket
 * locked. Redirects a message into the peer's receive queue, or passes it to
 * TCP. It drops only where anything else would change the order of the bytes: the
 * application sees EACCES then.
 */

/* What the peer has read, and what waits at it. */
struct receiver {
	u32 copied_seq;
	u32 queued;		/* redirected bytes that it has not read */
	u32 owned;		/* a system call of its process has its lock */
	u64 data_ready;		/* whom the kernel tells that there is something to read */
};

static __always_inline void count_pass(struct direction *d)
{
	d->passed_messages++;
	count(COUNT_PASSED_MESSAGES, 1);
}

/*
 * Bounds on what the peer has not read. The kernel accepts any amount, so this
 * is the only backpressure there is. Bytes are exact. Messages are an upper
 * bound, from a mark that moves on when everything up to it was read.
 */
static __always_inline int is_overfull(struct settings *s, struct direction *d,
				       u32 queued, u32 size)
{
	if (d->redirected_bytes - queued >= d->mark_bytes) {
		d->read_messages = queued ? d->mark_messages : d->redirected_messages;
		d->mark_bytes = d->redirected_bytes;
		d->mark_messages = d->redirected_messages;
	}
	return queued + size > s->queue_bytes ||
	       (u32)d->redirected_messages - d->read_messages >= s->queue_messages;
}

/*
 * Many messages and no answer: a stream. TCP serves it better where it costs little,
 * which is within a network namespace, and wherever the messages are so small that
 * it may merge them ("Streams" in ARCHITECTURE.md). The other direction's counters are
 * in a cache line of another CPU, so they are looked at once in a while only. is_last:
 * no element of the message comes after this one.
 */
static __always_inline int
is_losing_stream(struct settings *s, struct pair *p, struct direction *d,
		 struct direction *back, u32 size, int is_last)
{
	u32 answered;

	d->burst_bytes += size;
	if (!is_last)
		return 0;
	d->burst++;
	if (d->burst & 15)
		return 0;
	answered = back->redirected_messages + back->passed_messages;
	if (answered != d->answered || d->burst >= 1 << 12) {
		d->answered = answered;
		d->burst = 0;
		d->burst_bytes = 0;
		return 0;
	}
	if (d->burst < s->stream_messages)
		return 0;
	return p->end[CLIENT].at.netns == p->end[SERVER].at.netns ||
	       d->burst_bytes < d->burst * s->stream_size;
}

/*
 * The peer is in a system call on this socket, and nothing waits for it there. One time
 * in some thousands that is its own send, or the end of a read. More than three in a
 * hundred are a reader that asks again and again, and a recv that finds nothing is seen
 * by nobody else. It has the lock that a redirect sleeps for, where TCP would leave the
 * message in the backlog: less than half as fast.
 */
#define SPINNING_WEIGHT		32
#define SPINNING_LIMIT		1024

static __always_inline int is_spinning(struct direction *d, struct receiver *receiver)
{
	if (receiver->owned && !receiver->queued)
		d->contended += SPINNING_WEIGHT;
	else if (d->contended)
		d->contended--;
	return d->contended >= SPINNING_LIMIT;
}

/*
 * A reader whose buffer ends in memory that is not there gets EFAULT in the
 * middle of a message. If that message has several elements, sk_msg_recvmsg()
 * forgets then that it has let go of the pages of the first ones: the
 * connection is stuck in EFAULT, and closing it lets go of them once more, while
 * they may be somebody else's. (Linux up to 7.2 at least.) So nothing with more
 * than one element is queued. A short message is copied into one. Of a longer one
 * each element goes by itself, with a verdict of its own, which is cheaper than
 * copying it: an element is up to a page fragment of 32 KiB, so there are two as a
 * rule. Returns the bytes that this verdict is about, or 0.
 */
#define COPIED_AT_MOST		16384
#define PAGE_FRAGMENT		32768

static __always_inline u32 take_one_element(struct sk_msg_md *msg)
{
	u32 size = msg->size, first = (u64)msg->data_end - (u64)msg->data;

	if (first == size)
		return size;
	/* Pages of sendfile(2) show no data before they are copied (up to Linux 6.4). */
	if (size <= (first ? COPIED_AT_MOST : PAGE_FRAGMENT) &&
	    !bpf_msg_pull_data(msg, 0, size, 0))
		return size;
	if (first)
		bpf_msg_apply_bytes(msg, first);
	return first;
}

/* Which way a message goes. */
enum way {
	WAY_TCP,
	WAY_TCP_WATCHED,	/* and have the watch look whether it is read */
	WAY_REDIRECT,
	WAY_REFUSE,
};

/*
 * After shutdown(SHUT_WR) it is TCP that has to say EPIPE. kTLS hands plaintext to the
 * verdict.
 */
static __always_inline int is_open(void *tp)
{
	u32 state = FIELD(tp, u8, sock_skc_state);

	return TCPF(state) & (TCPF(BPF_TCP_ESTABLISHED) | TCPF(BPF_TCP_CLOSE_WAIT)) &&
	       !FIELD(tp, u64, inet_connection_sock_icsk_ulp_ops);
}

/* Does the state of the pair, of splicer and of the sender allow it? */
static __always_inline int
may_redirect(struct settings *s, struct pair *p, u32 progress, struct direction *d, void *tp)
{
	if (!s || !is_redirecting(progress) ||
	    (!s->splicing && progress != STATE_LEAVING)) {
		if (progress == STATE_DRAINING)
			note_settled(d, tp, 1);
		return 0;
	}
	return is_open(tp);
}

/*
 * The peer's address may be stale. Memory of sockets stays memory of sockets
 * (SLAB_TYPESAFE_BY_RCU) and a new one starts without a cookie, so if the cookie
 * is right at last, all that was read before it is. 0 if it is not, or reads no more.
 */
static __always_inline int look_at_receiver(struct end *peer, struct receiver *receiver)
{
	void *sk = SOCK_AT(peer->sk);
	u64 cookie = 0;
	u8 shutdown = 0;

	PROBE_NUMBER(receiver->copied_seq, sk, tcp_sock_copied_seq);
	PROBE_NUMBER(receiver->queued, sk, sock_sk_rmem_alloc);
	PROBE_NUMBER(receiver->owned, sk, sock_sk_lock_owned);
	PROBE_NUMBER(receiver->data_ready, sk, sock_sk_data_ready);
	PROBE_NUMBER(shutdown, sk, sock_sk_shutdown);
	PROBE_NUMBER(cookie, sk, sock_skc_cookie);
	return cookie == peer->cookie && !(shutdown & RCV_SHUTDOWN);
}

/*
 * The pair drains, or is about to: the peer was read by a call that does not see redirected
 * bytes, splice(2) for instance. Where some wait, TCP bytes would overtake them. So what
 * follows goes behind them, for as long as it takes somebody who sees them to read them all.
 * While TCP bytes wait as well it is too late.
 */
static __always_inline int
must_follow(struct end *peer, struct receiver *receiver, void *tp)
{
	return is_open(tp) && look_at_receiver(peer, receiver) &&
	       receiver->copied_seq == FIELD(tp, u32, tcp_sock_write_seq) &&
	       !is_psock_empty(psock_of(peer->sk));
}

/* Can the peer's reader see a redirected message now, and would it come in order? */
static __always_inline enum way
check_reader(struct pair *p, struct direction *d, u32 fit, struct end *peer,
	     struct receiver *receiver, void *tp)
{
	u32 reason;

	/*
	 * An sk_skb program, or somebody else in the kernel, reads it by now, and
	 * would never see a redirected message.
	 */
	if (receiver->data_ready != p->data_ready) {
		if (is_taken_over(peer->sk))
			remember_taken_over(peer);
		start_draining(p, REASON_FOREIGN_PSOCK);
		return WAY_TCP;
	}
	/*
	 * Order. Both ends share one sequence space and redirected bytes move
	 * neither number: equal means that all that ever went through TCP in
	 * this direction has been read.
	 */
	if (receiver->copied_seq != FIELD(tp, u32, tcp_sock_write_seq))
		return WAY_TCP_WATCHED;
	/*
	 * A blocking reader may sleep in tcp_recvmsg() since before adoption
	 * and would not see redirected bytes. TCP bytes get it out of there;
	 * observe sees it return.
	 */
	if (p->allow_blocking && !d->primed)
		return WAY_TCP_WATCHED;
	if (fit == FIT)
		return WAY_REDIRECT;
	/* It polls before it reads, or asks not to wait. Once it sleeps it goes back: TCP bytes wake it. */
	if (fit == FIT_AWAKE) {
		if (p->allow_blocking || !is_asleep(peer))
			return WAY_REDIRECT;
		remember_sleeper(peer);
		start_draining(p, REASON_BLOCKING);
		return WAY_TCP;
	}
	/* Eager: inserted before anything was known about it. */
	reason = find_misfit(peer->sk, p, peer, 0);
	if (reason && reason != REASON_UNACCEPTED) {
		start_draining(p, reason);
		return WAY_TCP;
	}
	/* How it reads is known only after observe has seen it read. */
	if (reason || !d->primed)
		return WAY_TCP_WATCHED;
	d->fit = FIT;
	return WAY_REDIRECT;
}

/* Is it too much for the reader, or is TCP faster? Then the pair goes back. */
static __always_inline enum way
check_load(struct settings *s, struct pair *p, u32 progress, struct direction *d,
	   struct direction *back, struct receiver *receiver, u32 size, int is_last)
{
	if (is_overfull(s, d, receiver->queued, size)) {
		start_draining(p, REASON_BACKPRESSURE);
		return WAY_TCP;
	}
	if (progress == STATE_SPLICED && is_losing_stream(s, p, d, back, size, is_last)) {
		start_draining(p, REASON_STREAM);
		return WAY_TCP;
	}
	if (is_spinning(d, receiver) && progress == STATE_SPLICED)
		start_draining(p, REASON_SPINNING);
	return WAY_REDIRECT;
}

static __always_inline enum way
choose_way(struct sk_msg_md *msg, void *tp, struct pair *p, struct direction *d,
	   struct direction *back, struct end *peer, u32 *size)
{
	u32 progress = READ_ONCE(p->state);
	struct settings *s = get_settings();
	struct receiver receiver = {};
	u32 fit;
	enum way way;

	if (progress == STATE_DRAINING)
		__sync_fetch_and_add(&d->burst, 1);	/* a full barrier: see blind() */
	fit = READ_ONCE(d->fit);
	if (fit == FIT_BLIND && progress != STATE_PAIRED) {
		if (s && must_follow(peer, &receiver, tp)) {
			*size = take_one_element(msg);
			return !*size || is_overfull(s, d, receiver.queued, *size) ?
			       WAY_REFUSE : WAY_REDIRECT;
		}
		progress = STATE_DRAINING;
	}
	if (!may_redirect(s, p, progress, d, tp) || !look_at_receiver(peer, &receiver))
		return WAY_TCP;
	way = check_reader(p, d, fit, peer, &receiver, tp);
	if (way != WAY_REDIRECT)
		return way;
	*size = take_one_element(msg);
	if (!*size)
		return WAY_TCP_WATCHED;
	return check_load(s, p, progress, d, back, &receiver, *size, *size == msg->size);
}

/*
 * Our own name of the connection completes the key: should the record have been
 * reused meanwhile, nothing is found under it.
 */
static __always_inline int redirect(struct sk_msg_md *msg, struct end *peer, struct pair_id *id)
{
	struct end_key to = key_of(peer, *id);

	int found = spliced.msg_redirect_hash(msg, &to, BPF_F_INGRESS);
	return found == SK_PASS;
}

int verdict(struct sk_msg_md *msg)
{
	struct direction *d, *back;
	struct end *own, *peer;
	void *sk = msg->sk, *tp;
	struct pair_id id;
	struct pair *p;
	u32 size = 0;
	enum way way;
	int side;

	/* What the verdict on the element before has said holds until it is taken back. */
	bpf_msg_apply_bytes(msg, 0);
	if (!sk)
		return SK_PASS;
	tp = to_tcp_sock(sk);
	if (!tp)
		return SK_PASS;
	p = find_pair_of(tp, &id, &side);
	if (!p) {
		/* The peer is gone, or was never of this host: see take_hint(). */
		struct end_key *noted = ends.sk_storage_get(sk, 0, 0);

		if (noted)
			tell_orphan(noted);
		return SK_PASS;
	}
	if (side == CLIENT) {
		own = &p->end[CLIENT];
		d = &p->dir[CLIENT];
		back = &p->dir[SERVER];
		peer = &p->end[SERVER];
	} else {
		own = &p->end[SERVER];
		d = &p->dir[SERVER];
		back = &p->dir[CLIENT];
		peer = &p->end[CLIENT];
	}
	/*
	 * A name tells connections apart and is no secret: ISNs have no part in
	 * them that differs by network namespace, and TCP_REPAIR sets any.
	 */
	if (!is_end(own, tp))
		return SK_PASS;
	way = choose_way(msg, tp, p, d, back, peer, &size);
	if (way == WAY_REDIRECT && redirect(msg, peer, &id)) {
		d->redirected_bytes += size;
		d->redirected_messages++;
		count(COUNT_REDIRECTED_BYTES, size);
		count(COUNT_REDIRECTED_MESSAGES, 1);
		/* Goes on in tap, and returns from there, if somebody taps. */
		taps.call(msg, 0);
		return SK_PASS;
	}
	if (way == WAY_REFUSE) {
		/* All of it: of a part alone, the kernel would forget the pages of the rest. */
		bpf_msg_apply_bytes(msg, 0);
		return SK_DROP;
	}
	if (way == WAY_TCP_WATCHED)
		ask_for_watch(p);
	count_pass(d);
	return SK_PASS;
}
