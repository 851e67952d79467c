/* SPDX-License-Identifier: GPL-2.0 */
/*
 * observe: raw tracepoint tcp_rcv_space_adjust, which TCP passes each time an
 * application has read. Redirected bytes do not come by here.
 *
 * While a pair is plain it learns who reads each end and how, and announces
 * the pair once both ends are hot. On a spliced end it catches splice(2).
 */

/*
 * Before that many segments a connection is not looked at: most never get
 * there, and a look costs more than the rest of this program. Eager ones may
 * never get there either, since redirected messages are no segments.
 */
#define WARM_SEGMENTS	3
/* A client that has had so many, and whose server has not read, need not look for its pair each time. */
#define GROWN_SEGMENTS	64

/*
 * How long nobody looks at a socket whose pair is decided, or that has none, in
 * jiffies: 25 to 250 ms, and 1 to 20 ms while the other end may make it matter.
 */
#define MUTE_LONG	25
#define MUTE_SHORT	2

enum reader {
	READER_RECV,
	READER_DONTWAIT,
	READER_WAITALL,
	READER_SPLICE,
	READER_KERNEL,
	READER_UNKNOWN,
};

/* How is this socket being read? Only known system calls count as safe. */
static __always_inline enum reader get_reader(void)
{
	void *task = current_task(), *regs = task_regs(task);
	u32 flags = 0;
	u64 nr;

	if (FIELD(task, u32, task_struct_flags) & (PF_KTHREAD | PF_IO_WORKER))
		return READER_KERNEL;
	nr = FIELD(regs, CALL_TYPE, pt_regs_call);
	if (nr == SYSCALL_splice)
		return READER_SPLICE;
	if (nr == SYSCALL_recvmsg)
		flags = FIELD(regs, u64, pt_regs_arg3);
	else if (nr == SYSCALL_recvfrom || nr == SYSCALL_recvmmsg)
		flags = FIELD(regs, u64, pt_regs_arg4);
	else if (nr != SYSCALL_read && nr != SYSCALL_readv && nr != SYSCALL_preadv2 &&
		 nr != SYSCALL_io_uring_enter)
		return READER_UNKNOWN;
	if (flags & MSG_TRUNC)
		return READER_UNKNOWN;	/* discards, into no buffer */
	if (flags & MSG_WAITALL)
		return READER_WAITALL;
	return flags & MSG_DONTWAIT ? READER_DONTWAIT : READER_RECV;
}

/* Would this read sleep where nothing is there? Some set O_NONBLOCK for the time in between only. */
static __always_inline int is_sleepy(void *tp, enum reader reader)
{
	return reader != READER_DONTWAIT &&
	       find_misfit_file(FIELD(tp, u64, sock_sk_socket), 0) == REASON_BLOCKING;
}

/*
 * Did this read sleep? The kernel marks a thread that leaves its CPU, for what it has to
 * do before it goes back to user mode, and the mark is gone once it was there. Which mark
 * that is differs by kernel: the daemon has found out. One that lost its CPU to another
 * is taken for one that slept.
 */
static __always_inline int has_slept(struct settings *s)
{
	return FIELD(current_task(), u32, task_struct_thread_info_flags) & s->switched;
}

/* What does this read say about those to come? */
static __always_inline void
note_manner(void *tp, struct end *e, enum reader reader, struct settings *s)
{
	if (reader == READER_DONTWAIT)
		return;
	if (!is_sleepy(tp, reader)) {
		e->flags |= END_RELIANT;
		return;
	}
	e->flags |= END_BLOCKS;
	if (reader == READER_WAITALL || !s->switched || has_slept(s))
		e->flags |= END_SLEEPY;
}

/*
 * The other end reads where nothing keeps it from sleeping. Who has sent something waits
 * for the answer nearly always: where does it? Between its reads it may have O_NONBLOCK.
 */
static __always_inline void note_waiter(struct end *peer)
{
	switch (find_waiter(peer, 1)) {
	case WAITER_READ:
		peer->asleep = 1;
		break;
	case WAITER_POLL:
		if (peer->polls < POLLS_ENOUGH &&
		    find_misfit_file(socket_of(peer->sk), 0) == REASON_BLOCKING)
			peer->polls++;
		break;
	default:
		break;
	}
}

static __always_inline void forget_manner(struct end *e)
{
	e->reads = 0;
	e->polls = 0;
	e->asleep = 0;
	e->flags &= ~(END_SLEEPY | END_BLOCKS | END_RELIANT);
}

/*
 * The process splices: find_misfit() keeps it out from now on. Those of its
 * connections that are spliced are found by the watch, which had better come soon.
 */
static __always_inline void remember_splicer(u32 tgid)
{
	struct known_reader now = { .born = get_birth(current_task()), .reason = REASON_SPLICE };
	struct known_reader *known = splicers.lookup(&tgid);
	struct event e = { .type = EVENT_WATCH, .tgid = { tgid } };

	if (known && known->born == now.born)
		return;
	splicers.update(&tgid, &now);
	events.ringbuf_output(&e, sizeof(e), 0);
}

static __always_inline u32 refuse_reader(struct pair *p, enum reader reader)
{
	switch (reader) {
	case READER_RECV:
	case READER_DONTWAIT:
		return REASON_NONE;
	case READER_WAITALL:	/* means nothing on a non-blocking socket */
		return p->allow_blocking ? REASON_WAITALL : REASON_NONE;
	case READER_SPLICE:
		return REASON_SPLICE;
	case READER_KERNEL:
		return REASON_KERNEL;
	default:
		return REASON_READER;
	}
}

static __always_inline void note_reader(struct end *e, u32 tgid)
{
	if (e->tgid == tgid)
		return;
	e->tgid = tgid;
	e->born = get_birth(current_task());
}

/*
 * The server's first read of interest makes a pair of a seed. The client has
 * nothing to look for: without reads at both ends there is no splicing. In the table
 * no name is twice: whose seed is there, his is the pair, and not that of a young one
 * with the same name.
 */
static __always_inline struct pair *grow_seed(void *tp, struct pair_id *id, int *side)
{
	struct seed *seed, *young_one;
	struct pair *p;

	if (!(FIELD(tp, u8, tcp_sock_cb_flags) & SERVER_MARK))
		return 0;
	*id = server_id(first_sent(tp), first_received(tp));
	*side = SERVER;
	seed = seeds.lookup(id);
	young_one = seed ? 0 : find_young(*id);
	if (young_one)
		seed = young_one;
	if (!seed || seed->sk != (u64)tp)
		return 0;
	p = make_pair(id, seed, tp);
	if (!p)
		return 0;
	WRITE_ONCE(p->state, STATE_PAIRED);
	if (young_one)
		clear_place(young_one);
	else
		seeds.delete(id);
	return p;
}

/* A read by splice(2), said in a hurry: of a kernel thread it may say anything. */
static __always_inline int is_splice(void)
{
	void *regs = task_regs(current_task());

	return FIELD(regs, CALL_TYPE, pt_regs_call) == SYSCALL_splice;
}

/*
 * Most sockets stay plain, and are read for as long as they live. What was found out about
 * one holds for a while, so a read in that time costs a look at the slot and at the system
 * call: a process that begins to splice is noticed at once all the same. A slot that another
 * socket took, or that was written by two at once, costs one look more.
 */
static __always_inline int is_muted(u64 cookie)
{
	struct muted *m = muted_slot(cookie);

	return m && m->cookie == cookie && (s64)(m->until - jiffies64()) > 0 &&
	       (m->splices || !is_splice());
}

static __always_inline void mute(u64 cookie, u32 jiffies)
{
	struct muted *m = muted_slot(cookie);

	if (!m)
		return;
	m->cookie = cookie;
	m->until = jiffies64() + jiffies;
	m->splices = is_splice();
}

/* Its pair may be put in just now, and of spliced ends each read of TCP bytes is looked at. */
static __always_inline void mute_end(struct pair *p, struct end *e, u32 jiffies)
{
	mute(e->cookie, jiffies);
	/* A full barrier: we see the state, or are seen by begin_splicing(). */
	__sync_fetch_and_add(&p->half, 1);
	if (READ_ONCE(p->state) != STATE_PAIRED)
		unmute(e->cookie);
}

/*
 * A socket with a mark and without a pair. It is of another host, or its pair is yet to
 * grow, which takes a server that never reads for ever.
 */
static __always_inline u32 look_at_stranger(void *tp)
{
	struct pair_id id = client_id(first_sent(tp), first_received(tp));

	if (!(FIELD(tp, u8, tcp_sock_cb_flags) & CLIENT_MARK) || !find_seed(id))
		return MUTE_LONG;
	return FIELD(tp, u32, tcp_sock_data_segs_in) < GROWN_SEGMENTS ? 0 : MUTE_SHORT;
}

/* TCP bytes were read at an end that is in the SOCKHASH, or is on its way out. */
static __always_inline void
look_at_spliced(void *tp, struct pair *p, struct end *e, int side, enum reader reader, u32 tgid)
{
	u32 reason;

	if (!is_redirecting(p->state)) {
		if (side == CLIENT)
			note_settled(&p->dir[CLIENT], tp, 0);
		else
			note_settled(&p->dir[SERVER], tp, 0);
		return;
	}
	/* Whoever runs just now has nothing to do with what a program reads. */
	if (is_taken_over((u64)tp)) {
		remember_taken_over(e);
		start_draining(p, REASON_FOREIGN_PSOCK);
		return;
	}
	reason = refuse_reader(p, reader);
	if (!reason && !p->allow_blocking && is_sleepy(tp, reader) &&
	    (!(e->flags & END_SLEEPLESS) || reader == READER_WAITALL))
		reason = REASON_BLOCKING;
	if (reason) {
		if (reason != REASON_BLOCKING && reason != REASON_WAITALL)
			blind(p, side == CLIENT ? &p->dir[SERVER] : &p->dir[CLIENT]);
		start_draining(p, reason);
		return;
	}
	if (e->tgid != tgid) {
		struct settings *s = get_settings();

		note_reader(e, tgid);
		if (s && s->has_rules & 1 << RULE_PROCESS)
			p->policy = 0;	/* watch has it decided */
	}
	if (side == CLIENT)
		p->dir[SERVER].primed = 1;
	else
		p->dir[CLIENT].primed = 1;
}

/*
 * Count this read, and announce the pair once both ends have been seen reading often enough.
 * Returns for how long the socket need not be looked at.
 */
static __always_inline u32
look_at_plain(void *tp, struct pair *p, struct end *e, struct end *peer, struct settings *s,
	      enum reader reader, u32 tgid)
{
	u32 reason;

	if (s->has_rules & 1 << RULE_PROCESS && e->tgid != tgid) {
		note_reader(e, tgid);
		p->policy = 0;
	}
	if (p->policy != s->policy)
		decide_again(p, s);
	if (p->mode == MODE_OFF || !s->splicing)
		return MUTE_LONG;
	reason = own_psock(tp) && is_taken_over((u64)tp) ? REASON_FOREIGN_PSOCK :
							   refuse_reader(p, reader);
	if (reason) {
		if (p->announced && p->reason != REASON_PENDING)
			return MUTE_LONG;	/* known already, for this reason or another */
		p->announced = 1;
		p->reason = reason;
		count(COUNT_REFUSED + (reason < NR_REASONS ? reason : 0), 1);
		/* A full barrier: enlist sees the reason, or we see that it is about to put them in. */
		__sync_fetch_and_add(&p->half, 1);
		if ((e->flags | peer->flags) & END_IN_MAP)
			start_draining(p, reason);
		return 0;
	}
	if (p->announced)
		return p->reason == REASON_PENDING ? 0 : MUTE_LONG;
	if (p->retry_ns) {
		if (bpf_ktime_get_ns() < p->retry_ns)
			return MUTE_LONG;
		/* How they read may be another way by now. */
		p->retry_ns = 0;
		forget_manner(e);
		forget_manner(peer);
	}
	if (e->reads < s->hot_reads) {
		e->reads++;
		note_reader(e, tgid);
		if (unread_bytes(tp))
			e->flags |= END_PARTIAL;
		note_manner(tp, e, reader, s);
	}
	if (peer->flags & END_BLOCKS && !p->allow_blocking)
		note_waiter(peer);
	if (e->reads < s->hot_reads)
		return 0;
	if (peer->reads < s->hot_reads)
		return MUTE_SHORT;	/* a stream: its other end reads seldom or never */
	p->announced = ANNOUNCED_BY_NAME;
	p->reason = REASON_PENDING;
	if (tell(p, EVENT_ADOPT, REASON_NONE))
		p->announced = NOT_ANNOUNCED;
	return 0;
}

/* Returns for how long a socket that is no end of a pair need not be looked at again, in jiffies. */
static __always_inline u32 look(void *tp)
{
	enum reader reader = get_reader();
	u32 tgid = bpf_get_current_pid_tgid() >> 32;
	struct settings *s;
	struct pair_id id;
	struct end *e;
	struct pair *p;
	u32 jiffies;
	int side;

	count(COUNT_LOOKS, 1);
	if (reader == READER_SPLICE)
		remember_splicer(tgid);
	p = find_pair_of(tp, &id, &side);
	if (!p)
		p = grow_seed(tp, &id, &side);
	if (!p)
		return look_at_stranger(tp);
	e = side == CLIENT ? &p->end[CLIENT] : &p->end[SERVER];
	if (!is_end(e, tp)) {
		/*
		 * Two sockets with one name: somebody forges. Once spliced, the
		 * pair holds the true ones, for both have read.
		 */
		if (p->state == STATE_PAIRED) {
			p->announced = 1;
			p->reason = REASON_FORGED;
		}
		return MUTE_LONG;
	}
	if (!e->at.local_port) {
		read_tuple(&e->at, tp);
		e->at.netns = read_netns(tp);
		p->policy = 0;	/* it may be about the address */
	}
	if (p->state != STATE_PAIRED) {
		look_at_spliced(tp, p, e, side, reader, tgid);
		return 0;
	}
	s = get_settings();
	if (!s)
		return 0;
	jiffies = look_at_plain(tp, p, e, other_end(p, side), s, reader, tgid);
	if (jiffies)
		mute_end(p, e, jiffies);
	return 0;
}

int observe(u64 *ctx)
{
	void *sk = (void *)ctx[0], *tp;
	u64 cookie = FIELD(sk, u64, sock_skc_cookie);
	u32 jiffies;

	/* Who has a mark was given a cookie with it. */
	if (!cookie)
		return 0;
	tp = to_tcp_sock(sk);
	if (!tp)
		return 0;
	/* Before the slot of the muted, which is in no cache for a connection that has just begun. */
	if (FIELD(tp, u32, tcp_sock_data_segs_in) < WARM_SEGMENTS && !own_psock(tp))
		return 0;
	if (is_muted(cookie))
		return 0;
	if (!(FIELD(tp, u8, tcp_sock_cb_flags) & (SERVER_MARK | CLIENT_MARK)))
		jiffies = MUTE_LONG;
	else
		jiffies = look(tp);
	if (jiffies)
		mute(cookie, jiffies);
	return 0;
}
