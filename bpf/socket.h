/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Reading kernel sockets. Offsets (OFF_*) and bit masks (MASK_*) come from the
 * running kernel's BTF by way of the loader, so nothing here knows a version.
 */
#ifndef SPLICER_SOCKET_H
#define SPLICER_SOCKET_H

#define AF_INET			2
#define AF_INET6		10
#define SOL_SOCKET		1
#define SOL_TCP			6
#define SO_RCVLOWAT		18
#define SO_PEEK_OFF		42
#define SO_ATTACH_FILTER	26
#define SO_TIMESTAMP		29
#define SO_TIMESTAMPNS		35
#define SO_TIMESTAMPING		37
#define SO_MAX_PACING_RATE	47
#define SO_ATTACH_BPF		50
#define SO_ZEROCOPY		60
#define SO_TIMESTAMP_NEW	63
#define SO_TIMESTAMPNS_NEW	64
#define SO_TIMESTAMPING_NEW	65
#define TCP_REPAIR		19
#define TCP_NOTSENT_LOWAT	25
#define TCP_ULP			31
#define TCP_INQ			36
#define TCP_BPF_SOCK_OPS_CB_FLAGS	1008
#define RCV_SHUTDOWN		1
#define SOCK_NOSPACE		(1 << 2)
#define MSG_TRUNC		0x20
#define MSG_DONTWAIT		0x40
#define MSG_WAITALL		0x100
#define O_NONBLOCK		04000
#define PF_IO_WORKER		0x00000010
#define PF_KTHREAD		0x00200000

#define USER_DATA_POINTER	(~7ULL)		/* SK_USER_DATA_PTRMASK */

#define TCPF(state)		(1 << (state))

#ifndef READ_ONCE
#define READ_ONCE(x)		(*(volatile typeof(x) *)&(x))
#define WRITE_ONCE(x, v)	(*(volatile typeof(x) *)&(x) = (v))
#endif

/* A load the verifier checks against BTF; ptr is a trusted pointer. */
#define FIELD(ptr, type, where) (*(type *)((void *)(ptr) + (OFF_##where)))

/* A load that may fault: ptr is an address that may be stale. */
#define PROBE(dst, ptr, where) \
	bpf_probe_read_kernel(&(dst), sizeof(dst), (void *)(ptr) + (OFF_##where))

/*
 * The same where every message pays for it, of numbers in a tcp_sock. Since Linux
 * 6.2 a call that becomes a move makes a pointer of any address, whose loads give
 * 0 if they fault: less than half of what the helper's cost. The loader puts the
 * kernel's number in the place of this one. A pointer read like this is nothing
 * to calculate with, and the more types there are the more the verifier has to do:
 * so not for PROBE in general.
 */
#ifdef CALL_RDONLY_CAST
static void *(*rdonly_cast)(void *address, u32 type) = (void *)CALL_RDONLY_CAST;

#define SOCK_AT(address)	rdonly_cast((void *)(address), TYPE_tcp_sock)
#define PROBE_NUMBER(dst, sock, where) \
	((dst) = READ_ONCE(FIELD(sock, typeof(dst), where)))
#else
#define SOCK_AT(address)	((void *)(address))
#define PROBE_NUMBER(dst, sock, where)	PROBE(dst, sock, where)
#endif

/* What a program of iter/tcp is given. */
struct bpf_iter__tcp {
	void *meta;
	void *sk_common;
	u32 uid;
};

/* Helpers that bcc declares for other program types only, or not at all. */
static void *(*to_tcp_sock)(void *sk) = (void *)BPF_FUNC_skc_to_tcp_sock;
static u64 (*netns_cookie)(void *ctx) = (void *)BPF_FUNC_get_netns_cookie;
static u64 (*socket_cookie)(void *ctx) = (void *)BPF_FUNC_get_socket_cookie;
static void *(*to_bpf_tcp_sock)(void *sk) = (void *)BPF_FUNC_tcp_sock;
static long (*set_sockopt)(void *sk, int level, int name, void *value, int len) =
	(void *)BPF_FUNC_setsockopt;
static void *(*current_task)(void) = (void *)BPF_FUNC_get_current_task_btf;
static u64 (*jiffies64)(void) = (void *)BPF_FUNC_jiffies64;
static u64 (*coarse_ns)(void) = (void *)BPF_FUNC_ktime_get_coarse_ns;
static void *(*task_regs)(void *task) = (void *)BPF_FUNC_task_pt_regs;

/*
 * First data sequence number of each direction, as the socket itself counts:
 * what was acknowledged (received) so far, taken back. A client's own SYN is
 * among its acknowledged bytes and not among a server's, hence the + 1.
 */
static __always_inline struct pair_id client_id(u32 sent, u32 received)
{
	struct pair_id id = { .client_seq = sent + 1, .server_seq = received };

	return id;
}

static __always_inline struct pair_id server_id(u32 sent, u32 received)
{
	struct pair_id id = { .client_seq = received, .server_seq = sent };

	return id;
}

static __always_inline u32 first_sent(void *tp)
{
	return FIELD(tp, u32, tcp_sock_snd_una) -
	       (u32)FIELD(tp, u64, tcp_sock_bytes_acked);
}

static __always_inline u32 first_received(void *tp)
{
	return FIELD(tp, u32, tcp_sock_rcv_nxt) -
	       (u32)FIELD(tp, u64, tcp_sock_bytes_received);
}

static __always_inline u32 unread_bytes(void *tp)
{
	return FIELD(tp, u32, tcp_sock_rcv_nxt) - FIELD(tp, u32, tcp_sock_copied_seq);
}

/* States in which rcv_nxt counts the peer's FIN. */
#define FIN_RECEIVED	(TCPF(BPF_TCP_CLOSE_WAIT) | TCPF(BPF_TCP_LAST_ACK) | \
			 TCPF(BPF_TCP_CLOSING) | TCPF(BPF_TCP_CLOSE))

/* A FIN waits behind redirected bytes, as it should. */
static __always_inline u32 without_fin(u32 unread, u8 state)
{
	return unread && TCPF(state) & FIN_RECEIVED ? unread - 1 : unread;
}

static __always_inline u32 unread_data(void *tp)
{
	return without_fin(unread_bytes(tp), FIELD(tp, u8, sock_skc_state));
}

/* The same for a socket that is not locked, and how far its reader has come. */
static __always_inline u32 probe_unread_data(u64 sk, u32 *copied_seq)
{
	u32 rcv_nxt = 0;
	u8 state = 0;

	PROBE(rcv_nxt, sk, tcp_sock_rcv_nxt);
	PROBE(*copied_seq, sk, tcp_sock_copied_seq);
	if (rcv_nxt == *copied_seq)
		return 0;
	PROBE(state, sk, sock_skc_state);
	return without_fin(rcv_nxt - *copied_seq, state);
}

static __always_inline void read_ip4(u32 to[4], u32 ip_be)
{
	to[0] = 0;
	to[1] = 0;
	to[2] = 0xffff;
	to[3] = bpf_ntohl(ip_be);
}

/* A v4-mapped address of an AF_INET6 socket comes out as ::ffff:a.b.c.d too. */
static __always_inline void read_ip6(u32 to[4], void *tp, int local)
{
	if (local) {
		to[0] = bpf_ntohl(FIELD(tp, u32, sock_skc_v6_rcv_saddr));
		to[1] = bpf_ntohl(FIELD(tp, u32, sock_skc_v6_rcv_saddr + 4));
		to[2] = bpf_ntohl(FIELD(tp, u32, sock_skc_v6_rcv_saddr + 8));
		to[3] = bpf_ntohl(FIELD(tp, u32, sock_skc_v6_rcv_saddr + 12));
	} else {
		to[0] = bpf_ntohl(FIELD(tp, u32, sock_skc_v6_daddr));
		to[1] = bpf_ntohl(FIELD(tp, u32, sock_skc_v6_daddr + 4));
		to[2] = bpf_ntohl(FIELD(tp, u32, sock_skc_v6_daddr + 8));
		to[3] = bpf_ntohl(FIELD(tp, u32, sock_skc_v6_daddr + 12));
	}
}

static __always_inline u32 local_port(void *tp)
{
	return FIELD(tp, u16, sock_skc_num);
}

static __always_inline u32 remote_port(void *tp)
{
	return bpf_ntohs(FIELD(tp, u16, sock_skc_dport));
}

static __always_inline void read_tuple(struct address *at, void *tp)
{
	if (FIELD(tp, u16, sock_skc_family) == AF_INET6) {
		read_ip6(at->local_ip, tp, 1);
		read_ip6(at->remote_ip, tp, 0);
	} else {
		read_ip4(at->local_ip, FIELD(tp, u32, sock_skc_rcv_saddr));
		read_ip4(at->remote_ip, FIELD(tp, u32, sock_skc_daddr));
	}
	at->local_port = local_port(tp);
	at->remote_port = remote_port(tp);
}

static __always_inline int is_psock_empty(u64 psock)
{
	u64 head = psock + OFF_sk_psock_ingress_msg, first = 0;

	if (!psock)
		return 1;
	bpf_probe_read_kernel(&first, sizeof(first), (void *)head);
	return first == head;
}

/*
 * Half as many again as the bound on unread messages; a reader of more is told of so many
 * at once. In steps, for the verifier compares each turn of a loop with all those before it.
 */
#define COUNTED_MESSAGES	1536
#define COUNTED_STEP		32

/*
 * What was redirected and not read, in bytes. No lock is taken. Messages leave the queue at its
 * front only: if the first one is the same at last, all that were met were there.
 */
static __always_inline u32 count_redirected(u64 psock, u64 sk)
{
	u64 head = psock + OFF_sk_psock_ingress_msg, first = 0, item;
	u32 total = 0, size = 0, charged = 0;

	PROBE(first, psock, sk_psock_ingress_msg);
	item = first;
	for (int i = 0; i < COUNTED_MESSAGES / COUNTED_STEP; i++) {
#pragma unroll
		for (int j = 0; j < COUNTED_STEP; j++) {
			if (!item || item == head)
				goto counted;
			PROBE(size, item - OFF_sk_msg_list, sk_msg_sg_size);
			total += size;
			bpf_probe_read_kernel(&item, sizeof(item), (void *)item);
		}
	}
counted:
	/* Bytes are charged before they are in the queue, so there are no more than that. */
	PROBE(charged, sk, sock_sk_rmem_alloc);
	item = 0;
	PROBE(item, psock, sk_psock_ingress_msg);
	if (first != head && item != first)
		return charged;		/* another thread has read meanwhile: no less than that */
	return total < charged ? total : charged;
}

/* For programs that have no helper for it. */
static __always_inline u64 read_netns(void *tp)
{
	u64 net = FIELD(tp, u64, sock_skc_net), cookie = 0;

	PROBE(cookie, net, net_net_cookie);
	return cookie;
}

/* The cgroup a socket was made in (an accepted one: its listener), or 0. */
static __always_inline u64 cgroup_of(u64 sk)
{
	u64 cgroup = 0;

	PROBE(cgroup, sk, sock_sk_cgroup);
	return cgroup;
}

static __always_inline u64 cgroup_id(u64 cgroup)
{
	u64 node = 0, id = 0;

	PROBE(node, cgroup, cgroup_kn);
	PROBE(id, node, kernfs_node_id);
	return id;
}

static __always_inline u64 parent_cgroup(u64 cgroup)
{
	u64 parent = 0;

	PROBE(parent, cgroup, cgroup_self_parent);
	return parent ? parent - OFF_cgroup_self : 0;
}

/* The psock of a socket at an address that may be stale, or 0. */
static __always_inline u64 psock_of(u64 sk)
{
	u64 user_data = 0;

	PROBE(user_data, sk, sock_sk_user_data);
	return user_data & USER_DATA_POINTER;
}

static __always_inline u64 own_psock(void *tp)
{
	return FIELD(tp, u64, sock_sk_user_data) & USER_DATA_POINTER;
}

/* A socket that is in more sockmaps than this, ours among them, does not get out of ours. */
#define MAX_LINKS		5

/* In how many sockmaps is the socket of this psock? */
static __always_inline u32 count_links(u64 psock)
{
	u64 head = psock + OFF_sk_psock_link, at = 0;
	u32 links = 0;

	bpf_probe_read_kernel(&at, sizeof(at), (void *)head);
	for (int i = 0; i < MAX_LINKS && at && at != head; i++) {
		links++;
		bpf_probe_read_kernel(&at, sizeof(at), (void *)at);
	}
	return links;
}

/*
 * Is no system call of others on this psock, besides `own`? Each holds a reference, and
 * so does each map that the socket is in: ours (is_in), and whoever else's. One that
 * takes the socket in has its reference before it is in the list, one that lets go of
 * it has left the list before, so a change of the list shows as somebody who is here.
 */
static __always_inline int is_unused(u64 psock, int is_in, u32 own)
{
	u32 references = 0, links;

	PROBE(references, psock, sk_psock_refcnt);
	if (is_in && references == own + 1)
		return 1;
	links = count_links(psock);
	PROBE(references, psock, sk_psock_refcnt);
	return references == own + links && count_links(psock) == links;
}

/* When the current process was born; in units that 32 bits hold for two years. */
static __always_inline u32 get_birth(void *task)
{
	u64 leader = FIELD(task, u64, task_struct_group_leader), born = 0;

	PROBE(born, leader, task_struct_start_boottime);
	return born >> 24;
}

/* The struct socket of a socket, 0 before accept() and after close(). */
static __always_inline u64 socket_of(u64 sk)
{
	u64 socket = 0;

	PROBE(socket, sk, sock_sk_socket);
	return socket;
}

/* Did it wait for room to send, and nobody has told it of any since? */
static __always_inline int waits_for_room(u64 socket)
{
	u64 flags = 0;

	if (socket)
		PROBE(flags, socket, socket_flags);
	return flags & SOCK_NOSPACE;
}

/*
 * A send on a spliced socket found no socket memory, in its cgroup or on the
 * host, and was told to wait. Nothing of it is in TCP, so no ACK will ever say
 * that there is room again. TCP itself never refuses a first segment.
 */
static __always_inline int is_out_of_memory(u64 sk, u64 socket)
{
	u32 queued = 0;

	if (!waits_for_room(socket))
		return 0;
	PROBE(queued, sk, sock_sk_wmem_queued);
	return !queued;
}

/* Has an end that may be gone anything to read, redirected or through TCP? */
static __always_inline int is_waiting(struct end *e)
{
	u32 rcv_nxt = 0, copied_seq = 0;
	u64 sk = e->sk;

	PROBE(rcv_nxt, sk, tcp_sock_rcv_nxt);
	PROBE(copied_seq, sk, tcp_sock_copied_seq);
	return rcv_nxt != copied_seq || !is_psock_empty(psock_of(sk));
}

#endif
