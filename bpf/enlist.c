/* SPDX-License-Identifier: GPL-2.0 */
/*
 * enlist: a tc program (SCHED_CLS) that is attached to nothing. The daemon runs it
 * (BPF_PROG_TEST_RUN) on the pairs it names, some of them many times over: each run is
 * about one request of the packet, and the next run about the next.
 *
 * Such a program may look a socket up by its four-tuple, and put what it found into a
 * SOCKHASH. So it needs no walk over all sockets and no lock, and both ends go in
 * within microseconds of each other. The daemon runs it in a network namespace of its
 * own, where each other one has a number.
 *
 * The good moment is one at which both have read all that the other has sent, and
 * neither is in a system call that has its lock. Reading happens in any of a hundred
 * runs, and the moment is looked for again right before the ends go in. What slips by
 * all the same, for a sender was on its way into TCP and waited for the lock that the
 * insertion takes, does not see the verdict, and goes to a reader that may not see it
 * on class B. That is what ENLIST_LOOK is for.
 *
 * A reader that empties its socket whenever it reads hardly asks FIONREAD about the
 * rest. Where there is never a good moment, for a queue of many connections is never
 * empty on both sides, bytes that it has yet to read are no hindrance (ENLIST_TRY_EASED).
 */

/* TCP bytes that a reader who leaves some behind has not moved in so long: it does not see them. */
#define SLIPPED_MS	1

/* By way of memory the verifier forgets which it was, and walks on once and not once for each. */
static __always_inline u32 forget_number(struct pair *p, u32 reason)
{
	WRITE_ONCE(p->reason, reason);
	return READ_ONCE(p->reason);
}

/* Somebody is in a system call that has its lock. */
static __always_inline int is_owned(struct end *e)
{
	u32 owned = 1;

	PROBE(owned, e->sk, sock_sk_lock_owned);
	return owned;
}

/* In this order: when the second one was read, all that had been sent was read. */
static __always_inline int has_read_all(struct end *e, struct end *peer)
{
	u32 copied_seq = 0, write_seq = 1;

	PROBE(copied_seq, e->sk, tcp_sock_copied_seq);
	PROBE(write_seq, peer->sk, tcp_sock_write_seq);
	return copied_seq == write_seq;
}

/* May it go in with what it has to read, if anything? */
static __always_inline int is_ready(struct end *e, struct end *peer, int is_eased)
{
	return (is_eased && !(e->flags & END_PARTIAL)) || has_read_all(e, peer);
}

static __always_inline int is_moment(struct end *client, struct end *server, u32 task)
{
	int is_eased = task == ENLIST_TRY_EASED;

	return !is_owned(client) && !is_owned(server) && is_ready(client, server, is_eased) &&
	       is_ready(server, client, is_eased);
}

/*
 * The four-tuple of a packet for it, and the size of that: they differ by family. Of a
 * socket that is bound to a device nothing is found from elsewhere.
 */
static __always_inline u32 make_tuple(struct bpf_sock_tuple *tuple, struct address *at)
{
	if (!at->local_ip[0] && !at->local_ip[1] && at->local_ip[2] == 0xffff) {
		tuple->ipv4.saddr = bpf_htonl(at->remote_ip[3]);
		tuple->ipv4.daddr = bpf_htonl(at->local_ip[3]);
		tuple->ipv4.sport = bpf_htons(at->remote_port);
		tuple->ipv4.dport = bpf_htons(at->local_port);
		return sizeof(tuple->ipv4);
	}
	for (int i = 0; i < 4; i++) {
		tuple->ipv6.saddr[i] = bpf_htonl(at->remote_ip[i]);
		tuple->ipv6.daddr[i] = bpf_htonl(at->local_ip[i]);
	}
	tuple->ipv6.sport = bpf_htons(at->remote_port);
	tuple->ipv6.dport = bpf_htons(at->local_port);
	return sizeof(tuple->ipv6);
}

static __always_inline struct bpf_sock *
find_socket(struct __sk_buff *skb, struct address *at, u32 netns)
{
	struct bpf_sock_tuple tuple = {};
	u32 size = make_tuple(&tuple, at);

	return bpf_sk_lookup_tcp(skb, &tuple, size, netns, 0);
}

static __always_inline u32 hand_over(struct pair *p)
{
	p->attempts = 0;
	p->announced = ANNOUNCED_BY_WALK;
	return ENLIST_WALK;
}

/* The lookup found nothing, or somebody else: is there an end that a walk would come by? */
static __always_inline u32 miss(struct pair *p, struct end *e)
{
	u64 cookie = 0;
	u8 state = 0;

	PROBE(state, e->sk, sock_skc_state);
	PROBE(cookie, e->sk, sock_skc_cookie);
	if (cookie == e->cookie && state == BPF_TCP_ESTABLISHED)
		return hand_over(p);
	refuse(p, REASON_CLOSING, REFUSED_RETRY_NS);
	return ENLIST_OVER;
}

/* The record may be somebody else's by now: the server closes, and its place is taken at once. */
static __always_inline int is_of(struct pair *p, struct pair_id *id)
{
	return is_same(*(volatile struct pair_id *)&p->id, *id);
}

/*
 * The client is in and its server is not, since it is about to be closed, or there
 * was no memory. Nothing was redirected. adopt takes the client out, and pokes it.
 */
static __always_inline void
take_back(struct pair *p, struct pair_id *id, struct end_key *client)
{
	if (is_of(p, id)) {
		p->end[SERVER].flags &= ~END_IN_MAP;
		start_draining(p, REASON_CLOSING);
	}
	/* Is it an orphan already, or about to be one? */
	count(COUNT_ORPHANS, 1);
	tell_orphan(client);
}

/*
 * The client first: as the server went in it was not closed, so the record was ours
 * still. Who looks at the record beside this is to know that they are in the map before
 * they are, and not after.
 *
 * Whoever begins to send from here to begin_splicing() slips by. So nothing is done
 * here that can be done before.
 */
static __always_inline u32
put_both_in(struct pair *p, struct pair_id *id, struct bpf_sock *client, struct bpf_sock *server,
	    struct end_key *client_key, struct end_key *server_key)
{
	u32 reason;
	long err;

	p->end[CLIENT].flags |= END_IN_MAP;
	err = spliced.update(client_key, client);
	if (err) {
		p->end[CLIENT].flags &= ~END_IN_MAP;
		refuse(p, REASON_FULL, REFUSED_RETRY_NS);
		return ENLIST_OVER;
	}
	p->end[SERVER].flags |= END_IN_MAP;
	err = spliced.update(server_key, server);
	if (err || !is_of(p, id)) {
		take_back(p, id, client_key);
		return ENLIST_OVER;
	}
	p->was_spliced = 1;
	begin_splicing(p);
	count(COUNT_SPLICED, 1);
	/* Meanwhile somebody may have found a reason against it: see look_at_plain() in observe.c. */
	reason = READ_ONCE(p->reason);
	if (reason != REASON_PENDING) {
		start_draining(p, reason);
		return ENLIST_OVER;
	}
	p->reason = REASON_NONE;
	return ENLIST_IN;
}

static __always_inline u32
enlist_found(struct pair *p, struct pair_id *id, struct settings *s, u32 task,
	     struct bpf_sock *client_sk, struct bpf_sock *server_sk)
{
	struct end *client = &p->end[CLIENT], *server = &p->end[SERVER];
	void *client_tp = to_tcp_sock(client_sk), *server_tp = to_tcp_sock(server_sk);
	struct end_key client_key, server_key;
	u32 reason;

	if (!client_tp || !is_end(client, client_tp))
		return miss(p, client);
	if (!server_tp || !is_end(server, server_tp))
		return miss(p, server);
	if (p->policy != s->policy)
		decide(p, s);
	reason = find_refusal(client_tp, p, client);
	if (!reason)
		reason = find_refusal(server_tp, p, server);
	if (reason) {
		refuse(p, forget_number(p, reason), REFUSED_RETRY_NS);
		return ENLIST_OVER;
	}
	/* Our own psock of last time, on its way out. */
	if (FIELD(client_tp, u64, sock_sk_user_data) || FIELD(server_tp, u64, sock_sk_user_data))
		return ENLIST_LATER;
	/* With our own id the keys are ours. */
	client_key = key_of(client, *id);
	server_key = key_of(server, *id);
	if (!note_key(client_sk, &client_key) || !note_key(server_sk, &server_key)) {
		refuse(p, REASON_FULL, REFUSED_RETRY_NS);
		return ENLIST_OVER;
	}
	if (!is_moment(client, server, task) || !is_of(p, id))
		return ENLIST_LATER;
	return put_both_in(p, id, client_sk, server_sk, &client_key, &server_key);
}

static __always_inline u32
try_enlist(struct __sk_buff *skb, struct pair *p, struct pair_id *id, u32 client_netns,
	   u32 server_netns, u32 task)
{
	struct settings *s = get_settings();
	struct bpf_sock *client, *server;
	u32 outcome;

	if (p->state == STATE_SPLICED)
		return ENLIST_IN;	/* a run of ours that was interrupted */
	if (p->state != STATE_PAIRED || p->announced != ANNOUNCED_BY_NAME ||
	    p->reason != REASON_PENDING)
		return ENLIST_OVER;
	if (!s || !s->splicing || s->stopping)
		return ENLIST_LATER;
	/* Who never rests is told at the first attempt why it may not go in. */
	if (!is_moment(&p->end[CLIENT], &p->end[SERVER], task) && p->attempts)
		return ENLIST_LATER;
	p->attempts = 1;
	client = find_socket(skb, &p->end[CLIENT].at, client_netns);
	if (!client)
		return miss(p, &p->end[CLIENT]);
	server = find_socket(skb, &p->end[SERVER].at, server_netns);
	if (server) {
		outcome = enlist_found(p, id, s, task, client, server);
		bpf_sk_release(server);
	} else {
		outcome = miss(p, &p->end[SERVER]);
	}
	bpf_sk_release(client);
	return outcome;
}

/* TCP bytes wait at this end, and its reader has had time enough. */
static __always_inline int is_unseen(struct end *e, u32 *unread)
{
	u32 copied_seq = 0, waited;

	*unread = probe_unread_data(e->sk, &copied_seq);
	if (e->waiting_ms && e->waiting_for != copied_seq)
		e->waiting_ms = 0;	/* it has come further since */
	waited = note_waiting(e, *unread, copied_seq);
	return waited >= (e->flags & END_PARTIAL ? SLIPPED_MS : STRANDED_MS);
}

/*
 * Both ends went in a moment ago. Has something slipped by? Nothing can any more
 * once both were seen outside of system calls, with nothing unread.
 */
static __always_inline u32 look_at_enlisted(struct pair *p)
{
	struct end *client = &p->end[CLIENT], *server = &p->end[SERVER];
	u32 reason, at_client = 0, at_server = 0;

	if (p->state != STATE_SPLICED || !is_still_in(client) || !is_still_in(server))
		return ENLIST_OVER;
	/* An option that was asked for while they went in: see guard.c. */
	reason = find_misfit_option(client->sk, p->allow_inq);
	if (!reason)
		reason = find_misfit_option(server->sk, p->allow_inq);
	if (!reason && (is_unseen(client, &at_client) | is_unseen(server, &at_server)))
		reason = REASON_BUSY;
	if (reason) {
		start_draining(p, forget_number(p, reason));
		return ENLIST_OVER;
	}
	if (at_client || at_server || is_owned(client) || is_owned(server) || !is_quiet(client) ||
	    !is_quiet(server))
		return ENLIST_LATER;
	p->refusals = 0;
	return ENLIST_OVER;
}

static __always_inline u32
work_on(struct __sk_buff *skb, struct pair_id *id, u32 client_netns, u32 server_netns, u32 task)
{
	struct pair *p = pairs.lookup(id);

	if (!p)
		return ENLIST_OVER;
	switch (task) {
	case ENLIST_TRY:
	case ENLIST_TRY_EASED:
		return try_enlist(skb, p, id, client_netns, server_netns, task);
	case ENLIST_LOOK:
		return look_at_enlisted(p);
	}
	if (p->state != STATE_PAIRED || p->announced != ANNOUNCED_BY_NAME ||
	    p->reason != REASON_PENDING)
		return ENLIST_OVER;
	if (task == ENLIST_HAND_OVER)
		return hand_over(p);
	refuse(p, REASON_BUSY, BUSY_RETRY_NS);
	return ENLIST_OVER;
}

int enlist(struct __sk_buff *skb)
{
	void *data = (void *)(long)skb->data, *data_end = (void *)(long)skb->data_end;
	struct enlist_batch *batch = data;
	struct enlist_request *request;
	struct pair_id id;
	u32 turn;

	if ((void *)(batch + 1) > data_end)
		return 0;
	turn = batch->turn;
	if (turn >= batch->requests || turn >= ENLIST_PAIRS)
		turn = 0;
	batch->turn = turn + 1;
	request = &batch->request[turn];
	/* One pointer for all of its fields: the verifier knows the bounds of that one only. */
	asm volatile("" : "+r"(request));
	if ((void *)(request + 1) > data_end || request->outcome != ENLIST_LATER ||
	    request->task == ENLIST_NOTHING)
		return 0;
	id = request->id;
	request->outcome = work_on(skb, &id, request->netns[CLIENT], request->netns[SERVER],
				   request->task);
	return 0;
}
