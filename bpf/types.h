/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Types shared by the programs, and with splicer/kernel/layout.py, which mirrors them.
 * Every number is in host byte order.
 */
#ifndef SPLICER_TYPES_H
#define SPLICER_TYPES_H

/*
 * bcc takes a kernel whose /proc/kallsyms shows no addresses (kptr_restrict=2,
 * a container without CAP_SYSLOG) for one that lacks this helper, and puts a
 * macro in its place that the verifier refuses for most program types.
 */
#undef bpf_probe_read_kernel

/*
 * A connection is named by the first data byte's sequence number in each
 * direction. Both ends can compute the name at any time from their own
 * tcp_sock, and NAT leaves it alone: see client_id() in socket.h. It keeps out
 * whoever is remote. A local tenant can forge it (TCP_REPAIR), so whoever uses a
 * record compares the address of the socket as well.
 */
struct pair_id {
	u32 client_seq;
	u32 server_seq;
};

/*
 * Key of the SOCKHASH: the end's socket by its cookie, which no other socket is ever
 * given, and the connection. With the connection in the key no stale record can name
 * another connection's end, nor a socket in another life of it.
 */
struct end_key {
	u64 cookie;
	u64 netns;		/* cookie: whoever finds an end without a record looks there */
	struct pair_id id;
};

/* Where an end is: its own four-tuple, and its network namespace. IPv4 is written ::ffff:a.b.c.d. */
struct address {
	u32 local_ip[4];
	u32 remote_ip[4];
	u64 netns;		/* cookie */
	u32 local_port;
	u32 remote_port;
};

enum side {
	CLIENT,			/* called connect() */
	SERVER,			/* came out of accept() */
};

enum pair_state {
	STATE_PAIRED = 1,	/* plain TCP, both ends known */
	STATE_SPLICED,
	STATE_DRAINING,		/* plain TCP again, redirected bytes still unread */
	STATE_LEAVING,		/* spliced until both ends are seen at rest */
};

/* Why a pair is not spliced. Names and sentences: splicer/model.py. */
enum reason {
	REASON_NONE,
	REASON_COLD,		/* not enough reads yet */
	REASON_PENDING,		/* announced, waits for a quiet moment */
	REASON_BLOCKING,
	REASON_SPLICE,
	REASON_READER,
	REASON_RCVLOWAT,
	REASON_ZEROCOPY,
	REASON_ULP,
	REASON_MPTCP,
	REASON_REPAIR,
	REASON_KERNEL,
	REASON_PEEK_OFF,
	REASON_FOREIGN_PSOCK,
	REASON_POLICY,
	REASON_FULL,
	REASON_BACKPRESSURE,
	REASON_STREAM,
	REASON_RESCUE,
	REASON_STOP,
	REASON_REQUEST,		/* an operator asked */
	REASON_BUSY,		/* never quiet while adoption tried */
	REASON_CLOSING,
	REASON_WAITALL,
	REASON_CMSG,
	REASON_FILTER,
	REASON_PACING,
	REASON_UNACCEPTED,
	REASON_FORGED,
	REASON_MEMORY,
	REASON_SPINNING,
	REASON_NETWORK,		/* a link or address of an end is gone: as splicer/daemon/networks.py sees it */
	NR_REASONS,
};

/* Bits of struct end.flags. */
enum end_flag {
	END_IN_MAP	= 1 << 0,	/* in the SOCKHASH */
	END_FIT		= 1 << 1,	/* passed every check */
	END_PARTIAL	= 1 << 2,	/* was seen to leave bytes behind when reading */
	END_RESTED	= 1 << 3,	/* was seen with nothing unread or on its way to it */
	END_LEFT	= 1 << 4,	/* has been in the SOCKHASH before */
	END_MOVED	= 1 << 5,	/* leaving: was seen to take some of what waits for it */
	END_SLEEPY	= 1 << 6,	/* slept in a read, or said that it would */
	END_BLOCKS	= 1 << 7,	/* has read where nothing kept it from sleeping */
	END_RELIANT	= 1 << 8,	/* has read where O_NONBLOCK alone kept it from sleeping */
	END_SLEEPLESS	= 1 << 9,	/* has no O_NONBLOCK, and is in since it does not sleep */
};

/* struct pair.announced: whose it is to put both ends in. */
enum announced {
	NOT_ANNOUNCED,
	ANNOUNCED_BY_NAME,		/* enlist's */
	ANNOUNCED_BY_WALK,		/* adopt's: enlist does not find a socket of it */
};

enum mode {
	MODE_OFF,
	MODE_ADAPTIVE,
	MODE_EAGER,
};

/*
 * Bits of struct pair.care, above enum care. TCP is silent while messages are redirected,
 * so a pair on which something is sent has the daemon send a packet each way once in a while: a lease.
 */
enum talk {
	TALKS		= 1 << 7,	/* something was sent since this lease began */
	TALKED		= 1 << 6,	/* packets went each way as it began */
};

/* What is known of an end that is in the SOCKHASH. */
enum fit {
	FIT_UNKNOWN,		/* eager: it went in unseen */
	FIT,			/* passed every check */
	FIT_AWAKE,		/* the same, as long as it does not sleep in a read */
	FIT_BLIND,		/* draining: it was read by a call that does not see redirected bytes */
};

struct end {
	struct address at;	/* a client's is written when it is first observed */
	u64 sk;			/* kernel address of its struct sock */
	u64 cookie;		/* its socket cookie, to tell when sk is stale */
	u64 cgroup;		/* id of the cgroup the socket was made in */
	u32 waiting_ms;		/* in the map: since when bytes were seen to wait, or 0 */
	u32 born;		/* when the process below was, to tell a pid from its next use */
	u16 reads;		/* while plain, stops at settings.hot_reads */
	u8 polls;		/* has no O_NONBLOCK: so often seen waiting in poll(2) or the like */
	u8 asleep;		/* was seen asleep in a read, by who sends to it or by watch */
	u32 tgid;		/* the process that read last, init namespace */
	u32 flags;
	u32 waiting_for;	/* what had been read at that time */
};

/*
 * What one end sends. Only its sender writes here, so it has cache lines of
 * its own apart from the other direction.
 */
struct direction {
	u64 redirected_bytes;
	u64 redirected_messages;	/* a send(2), or an element of one: see verdict.c */
	u64 passed_messages;
	u64 mark_bytes;		/* redirected_bytes when the mark was set */
	u32 mark_messages;
	u32 read_messages;	/* at least so many redirected messages were read */
	u32 answered;		/* the other direction's messages, at the last look */
	u32 primed;		/* blocking readers: was seen to return with TCP bytes */
	u32 burst;		/* messages since the other direction spoke */
	u32 burst_bytes;	/* their size */
	u16 settled;		/* draining: every redirected message has arrived */
	u16 fit;		/* enum fit: of the end it leads to */
	u32 contended;		/* rises when the reader had its lock, and nothing to read */
};

struct pair {
	struct pair_id id;
	u32 state;
	u32 reason;
	struct end end[2];
	u64 born_ns;		/* CLOCK_MONOTONIC */
	u64 changed_ns;		/* last change of state */
	union {
		u64 retry_ns;	/* plain: no adoption before */
		u64 data_ready;	/* spliced: both sockets' sk_data_ready */
	};
	union {
		u32 half;	/* plain: visits since the first end went in */
		u32 messages;	/* spliced: how many there were when watch last looked */
	};
	u32 policy;		/* settings.policy when the next three were decided */
	u8 mode;
	u8 allow_blocking : 1;
	u8 allow_inq : 1;
	u8 stricter : 1;	/* allow_inq was taken back: watch looks at the options each time */
	u8 announced;		/* enum announced */
	u8 was_spliced;		/* since it was last plain */
	union {
		u8 attempts;	/* plain: visits that found no quiet moment */
		u8 care;	/* spliced: enum care and enum talk, see watch.c */
	};
	u8 drains;		/* lengthens the cool-down */
	u8 refusals;		/* lengthens the time to the next attempt */
	u8 watched;		/* the watch was told about it */
	u32 tenant;		/* whose it is: see has_room() */
	u32 older;		/* as in its seed */
	struct direction dir[2];
};

/*
 * Elements are allocated one by one, aligned, and the value follows 64 bytes of what
 * the kernel keeps: so each direction has a cache line to itself.
 */
_Static_assert(__builtin_offsetof(struct pair, dir) % 64 == 0, "directions share cache lines");
_Static_assert(sizeof(struct direction) == 64, "a direction is a cache line");

/*
 * A connection that is too young to be worth a struct pair: most never get
 * older, and writing a whole pair for each would be the dearest thing that
 * splicer does to them. It goes when the pair comes.
 */
struct seed {
	struct address at;	/* the server's */
	u64 sk;			/* 0 where a place is free */
	u64 client_sk;
	u64 client_cookie;
	u64 born_ns;
	struct pair_id id;
	u16 reason;		/* enum reason: it will never read, and so never have a pair */
	u8 older;		/* than the programs: what it had sent until then is in the map bases */
	u8 pad;
	u32 tenant;		/* whose it is: see has_room() */
};

/* What is known of a process: why its sockets stay plain. */
struct known_reader {
	u32 born;		/* to tell its pid from the pid's next use */
	u32 reason;		/* REASON_SPLICE, REASON_FOREIGN_PSOCK */
};

/* Where a client is that waits for its server. */
enum waiting {
	WAITING_OUT,		/* not in the SOCKHASH */
	WAITING_IN,
	WAITING_TAKEN,		/* was in, for so long that adopt took it for an orphan */
};

/* Left by a client at ACTIVE_ESTABLISHED for its server to find. */
struct rendezvous {
	struct pair_id id;	/* written last */
	u64 sk;
	u64 cookie;
	u8 in_map;		/* eager: enum waiting */
	u8 is_multipath;
	u16 tenant;
	u32 barrier;		/* of no meaning */
};

_Static_assert(sizeof(struct rendezvous) == 32, "there are as few cache lines and pages as can be");

struct muted {
	u64 cookie;		/* of the socket */
	u64 until;		/* jiffies */
	u64 splices;		/* it is read by splice(2), and its reader is remembered */
	u64 pad;
};

/* Eager only: a listener on this port of this host is answering this client. */
struct hint_key {
	u32 ip[4];
	u32 port;
	u32 service;
};

/* Whom a rule is about. See policy.h for how rules combine. */
enum rule_kind {
	RULE_PORT,		/* a server's port, whoever the server is */
	RULE_CGROUP,		/* sockets made in this cgroup or below it */
	RULE_NETWORK,		/* ends with an address in this network */
	RULE_NETNS,		/* eager only: listeners in this network namespace */
	RULE_PROCESS,		/* ends that this process was the last to read */
};

struct rule_key {
	u64 who;		/* cgroup id, number of a network, netns cookie, pid */
	u32 kind;
	u32 port;		/* the server's own; 0: any */
};

/*
 * What a rule says, for each value by itself: its place in the order of rules in
 * the upper half, the value in the lower, so that the smaller number wins. Of
 * two rules of one source the one that names the port comes first.
 */
struct rule {
	u64 mode;
	u64 allow_blocking;
	u64 allow_inq;
};

#define NOTHING_SAID	(~0ULL >> 1)

struct network_key {
	u32 prefix;		/* bits; IPv4 addresses count as ::ffff:a.b.c.d */
	u32 ip_be[4];
};

/* Closed connections, added up by who talked to whom. */
struct traffic_key {
	u64 client;		/* cgroup ids */
	u64 server;
};

struct traffic {
	u64 connections;
	u64 redirected_bytes;
	u64 redirected_messages;
};

/*
 * Bytes of local connections that TCP has carried: between whom, and why they were not
 * redirected. A connection counts with the reason that it has when one looks.
 */
struct volume_key {
	u64 client;		/* cgroup ids, 0 if not known */
	u64 server;
	u64 reason;		/* enum reason */
};

struct volume {
	u64 connections;
	u64 bytes;		/* both ways */
};

/* Closed connections that were not added to the map volumes yet. */
struct recent_volume {
	struct volume_key key;
	struct volume sum;
};

/* A server's socket whose connection is local and not followed, for there was no room. */
struct stranger {
	u64 client;		/* cgroup id */
};

struct settings {
	u32 mode;		/* where no rule says anything */
	u32 allow_blocking;
	u32 splicing;		/* 0: every verdict passes, but of pairs that are leaving */
	u32 stopping;		/* not 0: adopt takes everything out, for this reason */
	u32 hot_reads;
	u32 policy;		/* another number after every change of policy, never 0 */
	u32 has_rules;		/* a bit for each enum rule_kind that is in use */
	u32 has_eager;		/* some policy is eager, so clients need the hint */
	u32 queue_messages;	/* bound on redirected, unread messages */
	u32 queue_bytes;	/* bound on redirected, unread bytes */
	u32 stream_messages;	/* so many unanswered sends are a stream */
	u32 stream_size;	/* one of messages at least so big stays, between namespaces */
	u32 registering;	/* 0: new connections are left alone */
	u32 finishing;		/* adopt puts in second ends only */
	u32 walking;		/* there is no enlist: adopt puts everything in */
	u32 allow_inq;
	u32 census;		/* enum census_state */
	u32 switched;		/* flags of a thread that has left its CPU since it was in user mode; 0: not known */
	u64 cgroup;		/* the census is of sockets made in it or below it; 0: of all */
};

/* How far the search for connections that are older than the programs has come. */
enum census_state {
	CENSUS_NONE,
	CENSUS_LISTS,		/* sockets are listed */
	CENSUS_JOINS,		/* those that belong together are joined */
	CENSUS_DONE,
};

enum older_flag {
	OLDER_OUTSIDE	= 1 << 0,	/* made in another cgroup than ours */
	OLDER_REPAIRED	= 1 << 1,	/* under TCP_REPAIR */
	OLDER_KNOWN	= 1 << 2,	/* a server that has its seed already */
};

/* What census writes of each socket, for the daemon to read. */
struct older_socket {
	u64 sk;
	u64 cookie;
	u64 netns;
	u32 sent;		/* first data sequence number: see client_id() */
	u32 received;
	u64 flags;		/* enum older_flag */
};

/* The two sockets that have one name. */
struct older {
	u64 sk[2];
	u64 cookie[2];
};

enum older_outcome {
	OLDER_JOINED,
	OLDER_GONE,		/* an end was closed meanwhile */
	OLDER_FULL,
	OLDER_UNMARKED,		/* this kernel sets no callback flags from here */
};

/* What census writes of each server that it was to join. */
struct older_joined {
	struct pair_id id;
	u64 outcome;		/* enum older_outcome */
};

enum event_type {
	EVENT_ADOPT = 1,	/* both ends are hot */
	EVENT_DRAIN,
	EVENT_WATCH,		/* TCP bytes for a spliced end; or for all that a process (tgid) reads */
};

struct event {
	u32 type;
	u32 reason;
	struct pair_id id;
	u64 netns[2];
	u32 tgid[2];
};

enum counter {
	COUNT_PAIRED,
	COUNT_CLOSED,
	COUNT_SPLICED,
	COUNT_DRAINED,
	COUNT_REDIRECTED_BYTES,
	COUNT_REDIRECTED_MESSAGES,
	COUNT_PASSED_MESSAGES,
	COUNT_RESCUED,
	COUNT_EVENTS_LOST,
	COUNT_ORPHANS,		/* when it moves, an end may be in the SOCKHASH without a record */
	COUNT_LOOKS,		/* reads that observe looked into */
	COUNT_REFUSED,		/* + enum reason */
	COUNT_PLAIN = COUNT_REFUSED + NR_REASONS,	/* + enum reason: bytes of closed connections through TCP */
	COUNT_WENT_BACK = COUNT_PLAIN + NR_REASONS,	/* + enum reason: COUNT_DRAINED, by why */
	NR_COUNTERS = COUNT_WENT_BACK + NR_REASONS,
};

/* What one run of adopt saw. Cleared by the daemon before the run. */
enum sweep_counter {
	SWEEP_ADOPTED,		/* pairs that became spliced */
	SWEEP_DRAINED,		/* pairs that became plain */
	SWEEP_TO_ADOPT,		/* ends that still wait for adoption */
	SWEEP_HALF,		/* ends of pairs with one end in */
	SWEEP_TO_DRAIN,		/* ends that still wait to be taken out */
	NR_SWEEP,
};

/* So many pairs does one run of watch look at: a context has room for twelve numbers. */
#define WATCH_PAIRS	8

struct watch_request {
	struct pair_id id[WATCH_PAIRS];	/* there need not be such a pair (any more) */
	u64 question;			/* enum question */
};

/* What watch is asked. Those after the first two are answered without a look at anything else. */
enum question {
	ASK_NOTHING,
	ASK_POLICY,		/* have the first pair decided anew */
	ASK_WHO_TALKED,		/* a lease ends: a bit for each pair on which something was sent during it */
	ASK_SENT,		/* of the first pair's client: the sequence number of what TCP sends next */
	ASK_RECEIVED,		/* that of what it receives next */
	ASK_DEVICE,		/* the device that it is bound to, 0: none */
	ASK_MARK,		/* the mark of its packets (SO_MARK) */
};

/* What the daemon has to do about a pair, in so many bits each of what watch returns. */
#define LOOK_BITS	4
enum look {
	LOOK_AGAIN	= 1 << 0,	/* TCP bytes wait at an end: look again soon */
	LOOK_RESCUED	= 1 << 1,	/* they did not move, so it is drained: say so */
	LOOK_OUTDATED	= 1 << 2,	/* the policy has changed: have it decided */
	LOOK_TALKS	= 1 << 3,	/* something is sent, after a lease of silence */
};

/* Which bytes at which end measure shall count: redirected ones at the client's, unless these say else. */
#define MEASURE_SERVER	1
#define MEASURE_TCP	2
#define MEASURE_ANY	4	/* is there anything at all, at either end? */
/* Or something else about an end, for splicer explain: enum fact, shifted so far. */
#define MEASURE_FACT_SHIFT	8

enum fact {
	FACT_UNREAD,		/* what is said above */
	FACT_BITS,		/* enum fact_bit */
	FACT_STATE,		/* TCP's state, and above it sk_shutdown */
	FACT_FILE_FLAGS,	/* O_NONBLOCK and its like */
	FACT_MANNER,		/* struct end: flags, polls above them, asleep above these */
	FACT_RCVLOWAT,
	FACT_PEEK_OFF,		/* plus one: 0 is off */
	FACT_PACING,		/* bytes per second, as far as they go; all ones: none */
	FACT_WAITER,		/* enum waiter, of an end whose socket blocks */
	FACT_HABIT,		/* enum reason: what its process did with another socket */
	FACT_SEGMENTS,		/* data segments that it has received */
};

enum fact_bit {
	BIT_THERE	= 1 << 0,	/* the socket is the one that is meant */
	BIT_FILE	= 1 << 1,	/* it has a file: it was accepted */
	BIT_KERNEL	= 1 << 2,
	BIT_MPTCP	= 1 << 3,
	BIT_ZEROCOPY	= 1 << 4,
	BIT_TIMESTAMPS	= 1 << 5,
	BIT_ULP		= 1 << 6,
	BIT_REPAIR	= 1 << 7,
	BIT_INQ		= 1 << 8,
	BIT_FILTER	= 1 << 9,
	BIT_USER_DATA	= 1 << 10,	/* somebody uses sk_user_data */
	BIT_TAKEN_OVER	= 1 << 11,	/* an sk_skb program reads it */
};

struct measure_request {
	struct pair_id id;		/* there need not be such a pair (any more) */
	u64 what;
};

/* So many connections does one run of tally look at: a context has no room for more. */
#define TALLY_PAIRS	12

struct tally_request {
	struct pair_id id[TALLY_PAIRS];	/* there need not be such a connection (any more) */
};

/*
 * What enlist is given: a packet, since a packet can be written to. One run is about
 * one request, the next run about the next one, and after the last comes the first.
 */
#define ENLIST_PAIRS	128	/* with them the packet is about as large as one can be */

enum enlist_task {
	ENLIST_NOTHING,
	ENLIST_TRY,		/* put both ends in, at a moment of rest */
	ENLIST_TRY_EASED,	/* the same, where one who reads everything may have bytes to read */
	ENLIST_LOOK,		/* both are in: has anything slipped by? */
	ENLIST_GIVE_UP,		/* there is no such moment */
	ENLIST_HAND_OVER,	/* there is no way to its sockets: it is adopt's from now on */
};

enum enlist_outcome {
	ENLIST_LATER,		/* the same again */
	ENLIST_IN,		/* both ends are in: look at them soon */
	ENLIST_OVER,		/* nothing is left to be done */
	ENLIST_WALK,		/* it is adopt's */
};

struct enlist_request {
	struct pair_id id;
	u32 netns[2];		/* of the ends: as the network namespace that enlist runs in calls them */
	u32 task;
	u32 outcome;
};

struct enlist_batch {
	u32 ethernet[4];	/* all zero: a packet begins with such a header */
	u32 turn;
	u32 requests;		/* how many there are */
	struct enlist_request request[ENLIST_PAIRS];
};

/* For `splicer tap`. Which connections it wants is decided by the command; until it has, they are undecided. */
enum tap_choice {
	TAP_UNDECIDED,		/* recorded: the command keeps the records until it knows */
	TAP_WANTED,
	TAP_UNWANTED,
};

#define TAP_PORTS	8

struct tap_settings {
	u32 choice;		/* enum tap_choice: of a connection that is met first */
	u32 kept;		/* so many bytes of a piece at most */
	u32 nr_ports;		/* if not 0: only connections with one of these, as either end calls them */
	u32 ports[TAP_PORTS];
	u32 pad;
};

/* What is known of a connection. One direction is written by its sender only, which has its socket locked. */
struct tap_flow {
	u32 end[2];		/* by who sends: the sequence number behind all that was recorded or missed */
	u64 missed_bytes[2];	/* redirected while there was no room in the ring buffer */
	u64 missed[2];		/* the same in pieces */
};

/* What stands before the bytes of one piece of a message. */
struct tap_record {
	struct pair_id id;
	u64 time_ns;		/* CLOCK_MONOTONIC */
	struct address at;
	u32 seq;		/* of the first byte: where TCP is in this direction, and all redirected bytes */
	u32 ack;
	u32 size;
	u32 kept;		/* bytes that are here */
	u8 sender;		/* enum side */
	u8 viewer;		/* enum side: whose addresses these are */
	u8 choice;		/* enum tap_choice */
	u8 pad[5];
	u64 missed_bytes;	/* of this direction, so far */
	u64 missed;
};

/* As splicer/kernel/layout.py has them. */
_Static_assert(sizeof(struct tap_settings) == 48, "a setting was added");
_Static_assert(sizeof(struct tap_flow) == 40, "a number was added");
_Static_assert(sizeof(struct tap_record) == 104, "a field was added");

#endif
