/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The least that redirects: each end of each connection below the cgroup goes into a
 * SOCKHASH when it is established, and each message to the other end, if that is there.
 * For naive.py. It hangs, reorders and loses: see HAZARDS.md.
 */

struct name {
	u32 local_ip, remote_ip;	/* network byte order */
	u32 local_port, remote_port;	/* host byte order */
};

BPF_SOCKHASH(ends, struct name, 65536);
BPF_PERCPU_ARRAY(redirected, u64, 1);

int put_in(struct bpf_sock_ops *skops)
{
	struct name own = {};
	u32 op = skops->op;

	if (skops->family != 2)
		return 1;
	if (op != BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB && op != BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB)
		return 1;
	own.local_ip = skops->local_ip4;
	own.remote_ip = skops->remote_ip4;
	own.local_port = skops->local_port;
	own.remote_port = bpf_ntohl(skops->remote_port);
	ends.sock_hash_update(skops, &own, BPF_NOEXIST);
	return 1;
}

int redirect(struct sk_msg_md *msg)
{
	struct name peer = {};
	int zero = 0;

	peer.local_ip = msg->remote_ip4;
	peer.remote_ip = msg->local_ip4;
	peer.local_port = bpf_ntohl(msg->remote_port);
	peer.remote_port = msg->local_port;
	/* If nobody is there it goes its usual way. */
	if (ends.msg_redirect_hash(msg, &peer, BPF_F_INGRESS) == SK_PASS)
		redirected.increment(zero);
	return SK_PASS;
}
