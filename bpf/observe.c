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

enum reader {
	READER_RECV,
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
	return flags & MSG_WAITALL ? READER_WAITALL : READER_RECV;
}

/*
 * The process splices: find_misfit() keeps it out from now on. Those of its
 * connections that are spliced are found by the watch, which had better come soon.
 */
static __always_inline void remember_splicer(u32 tgid)
{
	u32 born = get_birth(current_task()), *known = splicers.lookup(&tgid);
	struct event e = { .type = EVENT_WATCH, .tgid = { tgid } };

	if (known && *known == born)
		return;
	splicers.update(&tgid, &born);
	events.ringbuf_output(&e, sizeof(e), 0);
}

static __always_inline u32 refuse_reader(struct pair *p, enum reader reader)
{
	switch (reader) {
	case READER_RECV:
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
 * nothing to look for: without reads at both ends there is no splicing.
 */
static __always_inline struct pair *grow_seed(void *tp, struct pair_id *id, int *side)
{
	struct seed *seed;
	struct pair *p;

	if (!(FIELD(tp, u8, tcp_sock_cb_flags) & SERVER_MARK))
		return 0;
	*id = server_id(first_sent(tp), first_received(tp));
	*side = SERVER;
	seed = seeds.lookup(id);
	if (!seed || seed->grown || seed->sk != (u64)tp)
		return 0;
	p = make_pair(id, seed);
	if (!p)
		return 0;
	seed->grown = 1;
	WRITE_ONCE(p->state, STATE_PAIRED);
	return p;
}

int observe(u64 *ctx)
{
	void *tp = to_tcp_sock((void *)ctx[0]);
	struct settings *s;
	enum reader reader;
	struct pair_id id;
	struct end *e;
	struct pair *p;
	u32 reason, tgid;
	int side;

	if (!tp || !(FIELD(tp, u8, tcp_sock_cb_flags) & (SERVER_MARK | CLIENT_MARK)) ||
	    (FIELD(tp, u32, tcp_sock_data_segs_in) < WARM_SEGMENTS && !own_psock(tp)))
		return 0;
	/* Whether its pair waits, is off, cools down, is too young, or is of another host. */
	tgid = bpf_get_current_pid_tgid() >> 32;
	reader = get_reader();
	if (reader == READER_SPLICE)
		remember_splicer(tgid);
	p = find_pair_of(tp, &id, &side);
	if (!p)
		p = grow_seed(tp, &id, &side);
	if (!p)
		return 0;
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
		return 0;
	}
	if (!e->key.local_port) {
		read_tuple(&e->key, tp);
		e->key.netns = read_netns(tp);
		e->key.id = id;
		p->policy = 0;	/* it may be about the address */
	}
	if (p->state != STATE_PAIRED) {
		reason = refuse_reader(p, reader);
		if (!is_redirecting(p->state))
			return 0;
		if (reason) {
			start_draining(p, reason);
			return 0;
		}
		note_reader(e, tgid);
		if (side == CLIENT)
			p->dir[SERVER].primed = 1;
		else
			p->dir[CLIENT].primed = 1;
		return 0;
	}
	s = get_settings();
	if (!s)
		return 0;
	if (p->policy != s->policy)
		decide_again(p, s);
	if (p->mode == MODE_OFF || !s->splicing)
		return 0;
	reason = refuse_reader(p, reader);
	if (reason) {
		if (p->announced && p->reason != REASON_PENDING)
			return 0;	/* known already, for this reason or another */
		p->announced = 1;
		p->reason = reason;
		count(COUNT_REFUSED + (reason < NR_REASONS ? reason : 0), 1);
		if ((e->flags | other_end(p, side)->flags) & END_IN_MAP)
			start_draining(p, reason);
		return 0;
	}
	if (p->announced)
		return 0;
	if (e->reads < s->hot_reads) {
		e->reads++;
		note_reader(e, tgid);
		if (unread_bytes(tp))
			e->flags |= END_PARTIAL;
	}
	if (p->end[CLIENT].reads < s->hot_reads || p->end[SERVER].reads < s->hot_reads)
		return 0;
	if (p->retry_ns && bpf_ktime_get_ns() < p->retry_ns)
		return 0;
	p->announced = 1;
	p->reason = REASON_PENDING;
	if (tell(p, EVENT_ADOPT, REASON_NONE))
		p->announced = 0;
	return 0;
}
