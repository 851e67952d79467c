/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What keeps a socket from being spliced, read from the socket itself.
 *
 * The address may be stale. adopt and verdict compare the cookie beside this, and
 * an eager end is looked at again before anything is redirected to it: a wrong
 * answer costs a splice and never a byte.
 */

/* What a socket is from its birth. */
static __always_inline u32 find_misfit_birth(u64 sk)
{
	u8 bits = 0;

	PROBE(bits, sk, sock_sk_kern_sock);
	if (bits & MASK_sock_sk_kern_sock)
		return REASON_KERNEL;
#ifdef OFF_tcp_sock_is_mptcp
	PROBE(bits, sk, tcp_sock_is_mptcp);
	if (bits & MASK_tcp_sock_is_mptcp)
		return REASON_MPTCP;
#endif
	return REASON_NONE;
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

static __always_inline int has_spliced(struct end *e)
{
	u32 tgid = e->tgid, *born = splicers.lookup(&tgid);

	return born && *born == e->born;
}

static __always_inline u32 find_misfit(u64 sk, struct pair *p, struct end *e)
{
	u32 reason = find_misfit_birth(sk);

	if (!reason)
		reason = find_misfit_file(socket_of(sk), p->allow_blocking);
	/* Its flag may be set now, and cleared before the next read. */
	if (!reason && e->flags & END_SLEEPY && !p->allow_blocking)
		reason = REASON_BLOCKING;
	if (!reason && has_spliced(e))
		reason = REASON_SPLICE;
	return reason ? reason : find_misfit_option(sk, p->allow_inq);
}
