/* SPDX-License-Identifier: GPL-2.0 */
/*
 * verdict: SK_MSG on the SOCKHASH, once per message, with the sender's socket
 * locked. Redirects a message into the peer's receive queue, or passes it to
 * TCP. It never drops: the application would see EACCES.
 */

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
 * Many messages and no answer: a stream. Small messages are better off in TCP,
 * which may merge them. The other direction's counters are in a cache line of
 * another CPU, so they are looked at once in a while only.
 */
static __always_inline int is_small_stream(struct settings *s, struct direction *d,
					   struct direction *back, u32 size)
{
	u32 answered;

	d->burst++;
	d->burst_bytes += size;
	if (d->burst & 15)
		return 0;
	answered = back->redirected_messages + back->passed_messages;
	if (answered != d->answered || d->burst >= 1 << 12) {
		d->answered = answered;
		d->burst = 0;
		d->burst_bytes = 0;
		return 0;
	}
	return d->burst >= s->stream_messages &&
	       d->burst_bytes < d->burst * s->stream_size;
}

/*
 * No verdict of this pair redirects any more. If the map and this system call
 * hold the only references to our psock, no other call is between its verdict
 * and the peer's queue either: everything redirected in this direction has
 * arrived. See adopt.c; a sender that never rests would not be seen quiet there.
 */
static __always_inline void note_settled(struct direction *d, void *tp)
{
	u32 references = 0;

	if (d->settled)
		return;
	PROBE(references, own_psock(tp), sk_psock_refcnt);
	if (references == 2)
		WRITE_ONCE(d->settled, 1);
}

/*
 * A reader whose buffer ends in memory that is not there gets EFAULT in the
 * middle of a message. If that message has several elements, sk_msg_recvmsg()
 * forgets then that it has let go of the pages of the first ones: the
 * connection is stuck in EFAULT, and closing it lets go of them once more, while
 * they may be somebody else's. (Linux up to 7.2 at least.) So nothing with more
 * than one element is queued. What fits into one page fragment is copied into
 * one; of more than that, each element goes by itself, with a verdict of its
 * own. Returns the bytes that this one is about, or 0.
 */
#define PAGE_FRAGMENT		32768

static __always_inline u32 take_one_element(struct sk_msg_md *msg)
{
	u32 size = msg->size, first = (u64)msg->data_end - (u64)msg->data;

	if (first == size)
		return size;
	if (size <= PAGE_FRAGMENT && !bpf_msg_pull_data(msg, 0, size, 0))
		return size;
	if (first)
		bpf_msg_apply_bytes(msg, first);
	return first;
}

int verdict(struct sk_msg_md *msg)
{
	u32 progress, state, size, reason, copied_seq = 0, queued = 0;
	struct direction *d, *back;
	u64 peer_sk, cookie = 0;
	struct settings *s;
	struct pair_id id;
	struct end_key to;
	struct end *own, *peer;
	u8 shutdown = 0;
	struct pair *p;
	int side;
	void *sk = msg->sk, *tp;

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
	s = get_settings();
	progress = READ_ONCE(p->state);
	if (!s || !is_redirecting(progress) ||
	    (!s->splicing && progress != STATE_LEAVING)) {
		if (progress == STATE_DRAINING)
			note_settled(d, tp);
		goto pass;
	}

	/* After shutdown(SHUT_WR) it is TCP that has to say EPIPE. */
	state = FIELD(tp, u8, sock_skc_state);
	if (!(TCPF(state) & (TCPF(BPF_TCP_ESTABLISHED) | TCPF(BPF_TCP_CLOSE_WAIT))))
		goto pass;

	/* kTLS hands plaintext to the verdict. */
	if (FIELD(tp, u64, inet_connection_sock_icsk_ulp_ops))
		goto pass;

	/*
	 * The address may be stale. Memory of sockets stays memory of sockets
	 * (SLAB_TYPESAFE_BY_RCU) and a new one starts without a cookie, so if
	 * the cookie is right at last, all that was read before it is.
	 */
	peer_sk = peer->sk;
	PROBE(copied_seq, peer_sk, tcp_sock_copied_seq);
	PROBE(queued, peer_sk, sock_sk_rmem_alloc);
	PROBE(shutdown, peer_sk, sock_sk_shutdown);
	PROBE(cookie, peer_sk, sock_skc_cookie);
	if (cookie != peer->cookie || shutdown & RCV_SHUTDOWN)
		goto pass;

	/*
	 * Order. Both ends share one sequence space and redirected bytes move
	 * neither number: equal means that all that ever went through TCP in
	 * this direction has been read.
	 */
	if (copied_seq != FIELD(tp, u32, tcp_sock_write_seq))
		goto pass_watched;
	/*
	 * A blocking reader may sleep in tcp_recvmsg() since before adoption
	 * and would not see redirected bytes. TCP bytes get it out of there;
	 * observe sees it return.
	 */
	if (p->allow_blocking && !d->primed)
		goto pass_watched;
	if (!d->fit) {
		/* Eager: inserted before anything was known about it. */
		reason = find_misfit(peer_sk, p, peer);
		if (reason == REASON_UNACCEPTED)
			goto pass_watched;
		if (reason) {
			start_draining(p, reason);
			goto pass;
		}
		/* How it reads is known only after observe has seen it read. */
		if (!d->primed)
			goto pass_watched;
		d->fit = 1;
	}
	size = take_one_element(msg);
	if (!size)
		goto pass_watched;
	if (is_overfull(s, d, queued, size)) {
		start_draining(p, REASON_BACKPRESSURE);
		goto pass;
	}
	if (progress == STATE_SPLICED && is_small_stream(s, d, back, size)) {
		start_draining(p, REASON_STREAM);
		goto pass;
	}

	/*
	 * Our own name of the connection completes the key: should the record
	 * have been reused meanwhile, nothing is found under it.
	 */
	to = peer->key;
	to.id = id;
	int found = spliced.msg_redirect_hash(msg, &to, BPF_F_INGRESS);
	if (found != SK_PASS)
		goto pass;
	d->redirected_bytes += size;
	d->redirected_messages++;
	count(COUNT_REDIRECTED_BYTES, size);
	count(COUNT_REDIRECTED_MESSAGES, 1);
	return SK_PASS;
pass_watched:
	ask_for_watch(p);
pass:
	count_pass(d);
	return SK_PASS;
}
