/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Policy: may this pair be spliced, and how?
 *
 * Each end has what the rules say about its cgroup (or one above it), its address,
 * the process that reads it and, for the server, its port; the rule of the lowest rank wins. The
 * pair is off if either end is; else the server's word counts, else the
 * client's, else the settings'.
 *
 * A decision is kept in the pair with the number of the policy it was made
 * under: another number in the settings makes observe, adopt and watch decide
 * again. So connections are not asked about before they are worth it, and a
 * change of policy reaches living ones.
 */

/* Deeper cgroups than any container runtime makes. */
#define CGROUP_DEPTH	12

/*
 * The smaller one, without a branch: each would double the paths that the
 * verifier walks, and there are up to 48 rules to look at.
 */
static __always_inline u64 choose_rule(u64 a, u64 b)
{
	u64 difference = a - b;

	asm volatile("" : "+r"(difference));
	return b + (difference & (u64)((s64)difference >> 63));
}

static __always_inline void
consider_one(struct rule *best, u32 kind, u64 who, u32 port)
{
	struct rule_key key = { .who = who, .kind = kind, .port = port };
	struct rule *r = rules.lookup(&key);

	if (!r)
		return;
	best->mode = choose_rule(best->mode, r->mode);
	best->allow_blocking = choose_rule(best->allow_blocking, r->allow_blocking);
	best->allow_inq = choose_rule(best->allow_inq, r->allow_inq);
}

static __always_inline void consider(struct rule *best, u32 kind, u64 who, u32 port)
{
	consider_one(best, kind, who, port);
	consider_one(best, kind, who, 0);
}

/* What the rules say about one end. sk may be stale, tgid 0, ip is in host byte order. */
static __always_inline void
consider_end(struct rule *best, struct settings *s, u64 sk, u32 tgid, u32 ip[4], u32 port)
{
	if (s->has_rules & 1 << RULE_CGROUP) {
		u64 cgroup = cgroup_of(sk);

		for (int level = 0; level < CGROUP_DEPTH && cgroup; level++) {
			consider(best, RULE_CGROUP, cgroup_id(cgroup), port);
			cgroup = parent_cgroup(cgroup);
		}
	}
	if (s->has_rules & 1 << RULE_NETWORK) {
		struct network_key key = { .prefix = 128 };
		u32 *number;

		key.ip_be[0] = bpf_htonl(ip[0]);
		key.ip_be[1] = bpf_htonl(ip[1]);
		key.ip_be[2] = bpf_htonl(ip[2]);
		key.ip_be[3] = bpf_htonl(ip[3]);
		number = networks.lookup(&key);
		if (number)
			consider(best, RULE_NETWORK, *number, port);
	}
	if (s->has_rules & 1 << RULE_PROCESS && tgid)
		consider(best, RULE_PROCESS, tgid, port);
}

static __always_inline void decide(struct pair *p, struct settings *s)
{
	struct end *client = &p->end[CLIENT], *server = &p->end[SERVER];
	u32 mode = s->mode, allow_blocking = s->allow_blocking, allow_inq = s->allow_inq;
	u32 version = s->policy;
	u32 port = server->at.local_port;
	struct rule by_client = { NOTHING_SAID, NOTHING_SAID, NOTHING_SAID };
	struct rule by_server = { NOTHING_SAID, NOTHING_SAID, NOTHING_SAID };

	if (!(s->has_rules & ~(1 << RULE_NETNS)))
		goto out;
	consider_end(&by_client, s, client->sk, client->tgid,
		     client->at.local_port ? client->at.local_ip : server->at.remote_ip, port);
	consider_end(&by_server, s, server->sk, server->tgid, server->at.local_ip, port);
	if (s->has_rules & 1 << RULE_PORT)
		consider_one(&by_server, RULE_PORT, 0, port);

	if (by_client.mode != NOTHING_SAID)
		mode = by_client.mode;
	if (by_server.mode != NOTHING_SAID &&
	    (by_client.mode == NOTHING_SAID || mode != MODE_OFF))
		mode = by_server.mode;
	if (by_client.allow_blocking != NOTHING_SAID)
		allow_blocking = by_client.allow_blocking;
	if (by_server.allow_blocking != NOTHING_SAID)
		allow_blocking = by_server.allow_blocking;
	if (by_client.allow_inq != NOTHING_SAID)
		allow_inq = by_client.allow_inq;
	if (by_server.allow_inq != NOTHING_SAID)
		allow_inq = by_server.allow_inq;
out:
	p->mode = mode;
	p->stricter = !allow_inq && (p->allow_inq || p->stricter);
	p->allow_blocking = allow_blocking;
	p->allow_inq = allow_inq;
	p->policy = version;
}

/* The policy has changed since it was last asked: what follows from that? */
static __always_inline void decide_again(struct pair *p, struct settings *s)
{
	u32 could_block = p->allow_blocking, could_ask = p->allow_inq;

	decide(p, s);
	if (p->mode == MODE_OFF) {
		if (p->reason != REASON_POLICY)
			count(COUNT_REFUSED + REASON_POLICY, 1);
		if ((p->end[CLIENT].flags | p->end[SERVER].flags) & END_IN_MAP)
			start_draining(p, REASON_POLICY);
		else
			p->reason = REASON_POLICY;
	} else if (p->reason == REASON_POLICY ||
		   (p->reason == REASON_BLOCKING && p->allow_blocking && !could_block) ||
		   (p->reason == REASON_CMSG && p->allow_inq && !could_ask)) {
		p->reason = REASON_COLD;
		p->announced = 0;
		if (p->state == STATE_PAIRED)
			p->retry_ns = 0;
	}
}
