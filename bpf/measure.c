/* SPDX-License-Identifier: GPL-2.0 */
/*
 * measure: a raw tracepoint program that is attached to nothing. The daemon runs it
 * (BPF_PROG_TEST_RUN) for somebody who looks at the connections one by one: how many
 * bytes wait unread at one end? Those that were redirected are in the psock's queue,
 * where no tool looks.
 *
 * As watch does, it finds the socket through its stored address, and takes no lock.
 */
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
	if (what & MEASURE_TCP)
		unread = probe_unread_data(e->sk, &copied_seq);
	else
		unread = count_redirected(psock_of(e->sk), e->sk);
	/* Last: what was read may be of a socket that has gone. */
	return is_still_in(e) ? unread : 0;
}
