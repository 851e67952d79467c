/* SPDX-License-Identifier: GPL-2.0 */
/*
 * measure: a raw tracepoint program that is attached to nothing. The daemon runs it
 * (BPF_PROG_TEST_RUN) for somebody who looks at the connections one by one: how many
 * bytes wait unread at one end? Those that were redirected are in the psock's queue,
 * where no tool looks. And of a connection that is to be explained: what is there that
 * the other programs decide by? (enum fact)
 *
 * As watch does, it finds the socket through its stored address, and takes no lock.
 */
static __always_inline u32 read_fact_bits(u64 sk)
{
	u64 flags = 0, pointer = 0, socket = socket_of(sk);
	u32 found = BIT_THERE, tsflags = 0;
	u8 bits = 0;

	if (socket)
		PROBE(pointer, socket, socket_file);
	found |= pointer ? BIT_FILE : 0;
	PROBE(bits, sk, sock_sk_kern_sock);
	found |= bits & MASK_sock_sk_kern_sock ? BIT_KERNEL : 0;
	found |= is_multipath(sk) ? BIT_MPTCP : 0;
	PROBE(flags, sk, sock_sk_flags);
	found |= flags & (1ULL << ENUM_SOCK_ZEROCOPY) ? BIT_ZEROCOPY : 0;
	PROBE(tsflags, sk, sock_sk_tsflags);
	found |= tsflags || flags & (1ULL << ENUM_SOCK_RCVTSTAMP) ? BIT_TIMESTAMPS : 0;
	PROBE(pointer, sk, inet_connection_sock_icsk_ulp_ops);
	found |= pointer ? BIT_ULP : 0;
	PROBE(bits, sk, tcp_sock_repair);
	found |= bits & MASK_tcp_sock_repair ? BIT_REPAIR : 0;
	PROBE(bits, sk, tcp_sock_recvmsg_inq);
	found |= bits & MASK_tcp_sock_recvmsg_inq ? BIT_INQ : 0;
	PROBE(pointer, sk, sock_sk_filter);
	found |= pointer ? BIT_FILTER : 0;
	PROBE(pointer, sk, sock_sk_user_data);
	found |= pointer ? BIT_USER_DATA : 0;
	return found | (is_taken_over(sk) ? BIT_TAKEN_OVER : 0);
}

/* One of enum fact. */
static __always_inline u32 read_fact(struct end *e, u64 fact)
{
	u64 sk = e->sk, pointer = 0;
	u32 value = 0;
	u8 byte = 0, shutdown = 0;
	int number = -1;

	switch (fact) {
	case FACT_BITS:
		return read_fact_bits(sk);
	case FACT_STATE:
		PROBE(byte, sk, sock_skc_state);
		PROBE(shutdown, sk, sock_sk_shutdown);
		return shutdown << 8 | byte;
	case FACT_FILE_FLAGS:
		pointer = socket_of(sk);
		PROBE(pointer, pointer, socket_file);
		PROBE(value, pointer, file_f_flags);
		return value;
	case FACT_MANNER:
		return (e->flags & 0xffff) | e->polls << 16 | e->asleep << 24;
	case FACT_RCVLOWAT:
		PROBE(value, sk, sock_sk_rcvlowat);
		return value;
	case FACT_PEEK_OFF:
		PROBE(number, sk, sock_sk_peek_off);
		return number + 1;
	case FACT_PACING:
		PROBE(pointer, sk, sock_sk_max_pacing_rate);
		return pointer > 0xffffffff ? 0xffffffff : pointer;
	case FACT_WAITER:
		return find_waiter(e, 1);
	case FACT_HABIT:
		return find_habit(e);
	case FACT_SEGMENTS:
		PROBE(value, sk, tcp_sock_data_segs_in);
		return value;
	default:
		return 0;
	}
}

/* Is the socket still the end that is meant? */
static __always_inline int is_still_there(struct end *e)
{
	u64 cookie = 0;

	PROBE(cookie, e->sk, sock_skc_cookie);
	return cookie && cookie == e->cookie;
}

int measure(struct measure_request *ctx)
{
	struct pair_id id = ctx->id;
	u64 what = ctx->what;
	u32 unread, copied_seq = 0;
	struct pair *p;
	struct end *e;

	p = pairs.lookup(&id);
	if (!p)
		return 0;
	if (what & MEASURE_ANY)
		return (is_still_in(&p->end[CLIENT]) && is_waiting(&p->end[CLIENT])) ||
		       (is_still_in(&p->end[SERVER]) && is_waiting(&p->end[SERVER]));
	e = what & MEASURE_SERVER ? &p->end[SERVER] : &p->end[CLIENT];
	if (what >> MEASURE_FACT_SHIFT) {
		unread = read_fact(e, what >> MEASURE_FACT_SHIFT);
		return is_still_there(e) ? unread : 0;
	}
	if (what & MEASURE_TCP)
		unread = probe_unread_data(e->sk, &copied_seq);
	else
		unread = count_redirected(psock_of(e->sk), e->sk);
	/* Last: what was read may be of a socket that has gone. */
	return is_still_in(e) ? unread : 0;
}
