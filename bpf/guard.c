/* SPDX-License-Identifier: GPL-2.0 */
/*
 * guard: cgroup/setsockopt. An application asks a spliced end for something
 * that a psock cannot give: drain it. Ends that are not spliced need no mark,
 * adopt looks at the socket itself.
 */

static __always_inline u32 get_unfit_option(int level, int name)
{
	if (level == SOL_SOCKET) {
		switch (name) {
		case SO_RCVLOWAT:
			return REASON_RCVLOWAT;
		case SO_ZEROCOPY:
			return REASON_ZEROCOPY;
		case SO_PEEK_OFF:
			return REASON_PEEK_OFF;
		case SO_TIMESTAMP:
		case SO_TIMESTAMPNS:
		case SO_TIMESTAMPING:
		case SO_TIMESTAMP_NEW:
		case SO_TIMESTAMPNS_NEW:
		case SO_TIMESTAMPING_NEW:
			return REASON_CMSG;
		case SO_ATTACH_FILTER:
		case SO_ATTACH_BPF:
			return REASON_FILTER;
		case SO_MAX_PACING_RATE:
			return REASON_PACING;
		}
	} else if (level == SOL_TCP) {
		switch (name) {
		case TCP_ULP:
			return REASON_ULP;
		case TCP_REPAIR:
			return REASON_REPAIR;
		case TCP_INQ:
			return REASON_CMSG;
		}
	}
	return REASON_NONE;
}

int guard(struct bpf_sockopt *ctx)
{
	u32 reason = get_unfit_option(ctx->level, ctx->optname);
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
	if (!p || p->end[side].sk != (u64)tp)
		return 1;
	if (ctx->level == SOL_TCP && ctx->optname == TCP_INQ && p->allow_inq)
		return 1;
	if (is_redirecting(p->state)) {
		start_draining(p, reason);
	} else {
		/* Adoption may be half-way: let it look at both again. */
		forget_findings(p);
	}
	return 1;
}
