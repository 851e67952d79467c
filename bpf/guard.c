/* SPDX-License-Identifier: GPL-2.0 */
/*
 * guard: cgroup/setsockopt. An application asks a spliced end for something
 * that a psock cannot give: drain it. Ends that are not spliced need no mark,
 * adopt looks at the socket itself.
 */

static __always_inline u32 is_unfit_option(int level, int name)
{
	if (level == SOL_SOCKET) {
		if (name == SO_RCVLOWAT)
			return REASON_RCVLOWAT;
		if (name == SO_ZEROCOPY)
			return REASON_ZEROCOPY;
		if (name == SO_PEEK_OFF)
			return REASON_PEEK_OFF;
	} else if (level == SOL_TCP) {
		if (name == TCP_ULP)
			return REASON_ULP;
		if (name == TCP_REPAIR)
			return REASON_REPAIR;
	}
	return REASON_NONE;
}

int guard(struct bpf_sockopt *ctx)
{
	u32 reason = is_unfit_option(ctx->level, ctx->optname);
	struct bpf_tcp_sock *tp;
	struct pair_id id;
	struct pair *p;
	int side;

	/* The buffer holds one page; 0 lets the kernel use the caller's own. */
	if (ctx->optlen > PAGE_SIZE)
		ctx->optlen = 0;
	if (!reason || !ctx->sk)
		return 1;
	tp = to_bpf_tcp_sock(ctx->sk);
	if (!tp)
		return 1;
	p = find_pair(tp->snd_una - (u32)tp->bytes_acked,
		      tp->rcv_nxt - (u32)tp->bytes_received, 1, &id, &side);
	if (p && p->state == STATE_SPLICED)
		start_draining(p, reason);
	return 1;
}
