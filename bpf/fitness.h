/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What keeps a socket from being spliced, read from the socket itself.
 *
 * The address may be stale. adopt and verdict compare the cookie beside this, and
 * an eager end is looked at again before anything is redirected to it: a wrong
 * answer costs a splice and never a byte.
 */

/* Somebody else reads it then: a socket of Multipath TCP has it. */
static __always_inline int is_multipath(u64 sk)
{
	u8 bits = 0;

#ifdef OFF_tcp_sock_is_mptcp
	PROBE(bits, sk, tcp_sock_is_mptcp);
	bits &= MASK_tcp_sock_is_mptcp;
#endif
	return bits;
}

/* The same of a socket at hand. */
static __always_inline int is_multipath_here(void *tp)
{
#ifdef OFF_tcp_sock_is_mptcp
	return (FIELD(tp, u8, tcp_sock_is_mptcp) & MASK_tcp_sock_is_mptcp) != 0;
#else
	return 0;
#endif
}

/* What a socket is from its birth. */
static __always_inline u32 find_misfit_birth(u64 sk)
{
	u8 bits = 0;

	PROBE(bits, sk, sock_sk_kern_sock);
	if (bits & MASK_sock_sk_kern_sock)
		return REASON_KERNEL;
	return is_multipath(sk) ? REASON_MPTCP : REASON_NONE;
}

/*
 * What an application can ask for at any time. Of TCP_INQ and timestamps a psock
 * gives no control message. That the first one is missing is no answer, and who
 * asks for it reads on: the policy allows it. A time cannot be had otherwise.
 */
static __always_inline u32 find_misfit_option(u64 sk, int allow_inq)
{
	u32 rcvlowat = 0, tsflags = 0;
	u64 flags = 0, pointer = 0, pacing = ~0UL;
	u8 bits = 0;
	int peek_off = -1;

	PROBE(rcvlowat, sk, sock_sk_rcvlowat);
	if (rcvlowat > 1)
		return REASON_RCVLOWAT;
	PROBE(flags, sk, sock_sk_flags);
	if (flags & (1ULL << ENUM_SOCK_ZEROCOPY))
		return REASON_ZEROCOPY;
	PROBE(pointer, sk, inet_connection_sock_icsk_ulp_ops);
	if (pointer)
		return REASON_ULP;
	PROBE(bits, sk, tcp_sock_repair);
	if (bits & MASK_tcp_sock_repair)
		return REASON_REPAIR;
	PROBE(peek_off, sk, sock_sk_peek_off);
	if (peek_off >= 0)
		return REASON_PEEK_OFF;
	PROBE(bits, sk, tcp_sock_recvmsg_inq);
	if (bits & MASK_tcp_sock_recvmsg_inq && !allow_inq)
		return REASON_CMSG;
	PROBE(tsflags, sk, sock_sk_tsflags);
	if (tsflags || flags & (1ULL << ENUM_SOCK_RCVTSTAMP))
		return REASON_CMSG;
	PROBE(pointer, sk, sock_sk_filter);
	if (pointer)
		return REASON_FILTER;
	PROBE(pacing, sk, sock_sk_max_pacing_rate);
	if (pacing != ~0UL)
		return REASON_PACING;
	return REASON_NONE;
}

/* Does a recv sleep? The file tells; before accept() there is none. */
static __always_inline u32 find_misfit_file(u64 socket, int allow_blocking)
{
	u64 file = 0;
	u32 flags = 0;

	if (!socket)
		return REASON_UNACCEPTED;
	PROBE(file, socket, socket_file);
	if (!file)
		return REASON_UNACCEPTED;
	PROBE(flags, file, file_f_flags);
	if (!(flags & O_NONBLOCK) && !allow_blocking)
		return REASON_BLOCKING;
	return REASON_NONE;
}

/* Why this end may not go in because of what its process did with another one, or REASON_NONE. */
static __always_inline u32 find_habit(struct end *e)
{
	u32 tgid = e->tgid;
	struct known_reader *known = splicers.lookup(&tgid);

	return known && known->born == e->born ? known->reason : REASON_NONE;
}

/* An sk_skb program reads it: its owner has put it into a sockmap that has one. */
static __always_inline int is_taken_over(u64 sk)
{
	u64 psock = psock_of(sk), parser = 0, verdict = 0, stream_verdict = 0;

	if (!psock)
		return 0;
	PROBE(parser, psock, sk_psock_stream_parser);
	PROBE(stream_verdict, psock, sk_psock_stream_verdict);
	PROBE(verdict, psock, sk_psock_skb_verdict);
	return (parser | stream_verdict | verdict) != 0;
}

/* The same will happen to the next socket of its process, and what was redirected by then nobody sees. */
static __always_inline void remember_taken_over(struct end *e)
{
	struct known_reader reader = { .born = e->born, .reason = REASON_FOREIGN_PSOCK };
	u32 tgid = e->tgid;

	if (tgid)
		splicers.update(&tgid, &reader);
}

static __always_inline int is_known_sleeper(struct end *e)
{
	u32 tgid = e->tgid, *born = sleepers.lookup(&tgid);

	return born && *born == e->born;
}

/* Its process sleeps in reads of a blocking socket: find_misfit() keeps such ends out from now on. */
static __always_inline void remember_sleeper(struct end *e)
{
	u32 tgid = e->tgid, born = e->born;

	e->asleep = 1;
	sleepers.update(&tgid, &born);
}

/* What somebody waits in who waits for a socket. */
enum waiter {
	WAITER_NONE,
	WAITER_POLL,		/* poll, select, epoll, io_uring */
	WAITER_READ,		/* it sleeps in the read itself */
};

/* The last one to come is the first, but for some of epoll. */
#define MAX_WAITERS	4
/* No kernel stack is larger than 1 << this. */
#define STACK_SHIFT	16

/*
 * Is this a place on the stack of a task? What is given for one may be anything.
 * Without a branch: each would double the ways that the verifier walks.
 */
static __always_inline u64 is_on_stack(u64 place, u64 task)
{
	u64 stack = 0;

	PROBE(stack, task, task_struct_stack);
	return ((place - stack) >> STACK_SHIFT) - 1 >> 63;
}

/*
 * Who is in the wait queue of a socket that blocks? An entry tells by where it is,
 * and by what it says it belongs to. One who sleeps in a system call has it on its
 * stack, and it belongs to the task. That of poll and select belongs to a structure
 * on the stack of the task that polls. Those of epoll and io_uring belong to nobody,
 * and stay while their owner does something else. (Nobody's stack begins at 0, so what
 * belongs to nobody is on it.)
 *
 * A send that waits for room sleeps in the same queue in the same way. TCP counts
 * those (sk_write_pending), each from after it came into the queue until before it
 * goes, and with the lock in between. The socket is not locked, its address may be
 * stale, and entries come and go: so the answer is a witness and no proof.
 */
static __always_inline enum waiter find_waiter(struct end *e, int asks_for_poll)
{
	u64 sk = e->sk, wq = 0, head, at = 0, cookie = 0, asleep = 0, polling = 0;
	u32 before = 0, after = 0, owned = 1;

	PROBE(before, sk, sock_sk_write_pending);
	PROBE(wq, sk, sock_sk_wq);
	head = wq + OFF_socket_wq_wait_head;
	bpf_probe_read_kernel(&at, sizeof(at), (void *)head);
	for (int i = 0; i < MAX_WAITERS && at && at != head; i++) {
		u64 entry = at - OFF_wait_queue_entry_entry, owner = 0, task = 0;

		PROBE(owner, entry, wait_queue_entry_private);
		asleep += is_on_stack(entry, owner);
		if (asks_for_poll) {
			PROBE(task, owner, poll_wqueues_polling_task);
			polling |= is_on_stack(owner, task);
		}
		PROBE(at, entry, wait_queue_entry_entry);
	}
	PROBE(after, sk, sock_sk_write_pending);
	PROBE(owned, sk, sock_sk_lock_owned);
	PROBE(cookie, sk, sock_skc_cookie);
	if (cookie != e->cookie)
		return WAITER_NONE;
	if (asleep > before && asleep > after)
		return owned ? WAITER_NONE : WAITER_READ;
	return polling ? WAITER_POLL : WAITER_NONE;
}

static __always_inline int is_asleep(struct end *e)
{
	return find_waiter(e, 0) == WAITER_READ;
}

/* So many looks that found it waiting in poll(2) or the like are enough. */
#define POLLS_ENOUGH	2

/*
 * Its socket blocks. Do its reads sleep all the same never? With MSG_DONTWAIT they
 * cannot. Else it must have been seen to wait elsewhere, and never there. What kept
 * it from sleeping so far may not be O_NONBLOCK, for it is not there any more.
 */
static __always_inline int is_sleepless(struct end *e)
{
	if (!e->reads || e->asleep || e->flags & (END_SLEEPY | END_RELIANT))
		return 0;
	if (!(e->flags & END_BLOCKS))
		return 1;
	return (e->polls >= POLLS_ENOUGH || e->polls >= e->reads) && !is_known_sleeper(e);
}

/* Does a read of it sleep, or may it? */
static __always_inline u32 find_misfit_reads(u64 sk, struct pair *p, struct end *e)
{
	u32 reason = find_misfit_file(socket_of(sk), p->allow_blocking);

	e->flags &= ~END_SLEEPLESS;
	if (p->allow_blocking || reason == REASON_UNACCEPTED)
		return reason;
	if (reason == REASON_BLOCKING) {
		if (!is_sleepless(e))
			return reason;
		e->flags |= END_SLEEPLESS;
	} else if (e->flags & (END_SLEEPY | END_BLOCKS)) {
		/* Its flag is set now, and may be cleared before the next read. */
		return REASON_BLOCKING;
	}
	/* Maybe since before its flag was set: it would never see redirected bytes. */
	return is_asleep(e) ? REASON_BLOCKING : REASON_NONE;
}

/* is_seen: its reads through TCP were looked at before. Those of an eager end were not. */
static __always_inline u32 find_misfit(u64 sk, struct pair *p, struct end *e, int is_seen)
{
	u32 reason = find_misfit_birth(sk);

	if (!reason)
		reason = is_seen ? find_misfit_reads(sk, p, e) :
				   find_misfit_file(socket_of(sk), p->allow_blocking);
	if (!reason)
		reason = find_habit(e);
	return reason ? reason : find_misfit_option(sk, p->allow_inq);
}
