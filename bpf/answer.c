/* SPDX-License-Identifier: GPL-2.0 */
/*
 * answer: fexit on inet_ioctl and inet6_ioctl, where the kernel's own answer to FIONREAD
 * is short (classes A and B). Of an end that is in the SOCKHASH it puts right what the
 * kernel has just written to the caller: the bytes of both queues. 32-bit callers come by
 * here too. io_uring's SOCKET_URING_OP_SIOCINQ does not.
 *
 * What is ours is in the map ends: this generation has put that socket into its SOCKHASH.
 * That is for sure on every kernel, where the flags in sk_user_data are not. Whoever has
 * sk_user_data now is asked for its socket: a psock points back at it, and what others
 * keep there does not.
 *
 * The answer is computed from the beginning and not added to the kernel's: two of these
 * programs, of two generations, may come by one socket.
 *
 * No lock is taken; see count_redirected().
 */

#define FIONREAD		0x541B

static long (*write_user)(void *to, const void *from, u32 size) = (void *)BPF_FUNC_probe_write_user;

/* tcp_inq() in include/net/tcp.h. */
static __always_inline u32 count_unread(void *tp)
{
	u32 rcv_nxt = FIELD(tp, u32, tcp_sock_rcv_nxt), copied_seq = FIELD(tp, u32, tcp_sock_copied_seq);
	u32 unread = rcv_nxt - copied_seq, urgent;
	u64 flags;

	if (!unread)
		return 0;
	flags = FIELD(tp, u64, sock_sk_flags);
	urgent = FIELD(tp, u32, tcp_sock_urg_seq) - copied_seq;
	if (FIELD(tp, u16, tcp_sock_urg_data) && urgent < unread && !(flags & (1ULL << ENUM_SOCK_URGINLINE)))
		return urgent;
	return flags & (1ULL << ENUM_SOCK_DONE) ? unread - 1 : unread;	/* less a FIN */
}

/*
 * If the page is not there, which the kernel has written to this very moment, its own
 * answer stands.
 */
static __always_inline int correct(u64 *ctx)
{
	u64 psock, owner = 0;
	void *socket, *sk, *tp;
	int value;

	if ((u32)ctx[1] != FIONREAD || (int)ctx[3])
		return 0;
	socket = (void *)ctx[0];
	sk = FIELD(socket, void *, socket_sk);
	if (!sk)
		return 0;
	tp = to_tcp_sock(sk);
	if (!tp)
		return 0;
	psock = own_psock(tp);
	if (!psock || !ends.sk_storage_get(sk, 0, 0))
		return 0;
	PROBE(owner, psock, sk_psock_sk);
	if (owner != (u64)tp)
		return 0;
	value = count_redirected(psock, (u64)tp) + count_unread(tp);
	write_user((void *)ctx[2], &value, sizeof(value));
	return 0;
}

int answer4(u64 *ctx)
{
	return correct(ctx);
}

int answer6(u64 *ctx)
{
	return correct(ctx);
}
