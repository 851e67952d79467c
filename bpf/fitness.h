/* SPDX-License-Identifier: GPL-2.0 */
/* What keeps a socket from being spliced, read from the socket itself. */

/* What a psock cannot serve; 0 if nothing stands in the way. */
static __always_inline u32 find_misfit(void *tp, struct pair *p, struct end *e)
{
	u64 socket = FIELD(tp, u64, sock_sk_socket), file = 0, ulp;
	u32 flags = 0;
	u32 tgid = e->tgid;

	if (FIELD(tp, u8, sock_skc_state) != BPF_TCP_ESTABLISHED)
		return REASON_CLOSING;
	if (FIELD(tp, u8, sock_sk_shutdown))
		return REASON_CLOSING;
	if (!socket || FIELD(tp, u8, sock_sk_kern_sock) & MASK_sock_sk_kern_sock)
		return REASON_KERNEL;
	PROBE(file, socket, socket_file);
	if (!file)
		return REASON_KERNEL;
	PROBE(flags, file, file_f_flags);
	if (!(flags & O_NONBLOCK) && !p->allow_blocking)
		return REASON_BLOCKING;
	if (tgid && splicers.lookup(&tgid))
		return REASON_SPLICE;
	if (FIELD(tp, u32, sock_sk_rcvlowat) > 1)
		return REASON_RCVLOWAT;
	if (FIELD(tp, u64, sock_sk_flags) & (1ULL << ENUM_SOCK_ZEROCOPY))
		return REASON_ZEROCOPY;
	ulp = FIELD(tp, u64, inet_connection_sock_icsk_ulp_ops);
	if (ulp)
		return REASON_ULP;
#ifdef OFF_tcp_sock_is_mptcp
	if (FIELD(tp, u8, tcp_sock_is_mptcp) & MASK_tcp_sock_is_mptcp)
		return REASON_MPTCP;
#endif
	if (FIELD(tp, u8, tcp_sock_repair) & MASK_tcp_sock_repair)
		return REASON_REPAIR;
	if ((int)FIELD(tp, u32, sock_sk_peek_off) >= 0)
		return REASON_PEEK_OFF;
	return REASON_NONE;
}
