/* SPDX-License-Identifier: GPL-2.0 */
/*
 * tap: the second half of verdict while somebody runs `splicer tap`, which loads it. It
 * copies what is being redirected into a ring buffer, and never waits: what finds no room
 * is counted. Nobody is woken, for that would cost a sender more than the copy. The command
 * looks by itself.
 *
 * A record has one of a few sizes, since the verifier wants to know it.
 */
#define TAP_PIECE		16384
#define TAP_PIECES		4	/* an element is a page fragment: 32 KiB, 64 KiB with larger pages */

struct tap_small { struct tap_record record; u8 bytes[256]; };
struct tap_medium { struct tap_record record; u8 bytes[1024]; };
struct tap_large { struct tap_record record; u8 bytes[4096]; };
struct tap_huge { struct tap_record record; u8 bytes[TAP_PIECE]; };

static __always_inline int is_port_tapped(struct tap_settings *s, u32 port)
{
	int found = 0;

#pragma unroll
	for (int i = 0; i < TAP_PORTS; i++)
		found |= s->ports[i] == port;
	return found;
}

/* Is it one of the ports that are asked for? Under DNAT the server's own is another. */
static __always_inline int has_tapped_port(struct tap_settings *s, struct pair *p)
{
	return !s->nr_ports || is_port_tapped(s, p->end[SERVER].at.local_port) ||
	       is_port_tapped(s, p->end[SERVER].at.remote_port) ||
	       is_port_tapped(s, p->end[CLIENT].at.local_port) ||
	       is_port_tapped(s, p->end[CLIENT].at.remote_port);
}

static __always_inline void count_unknown(u32 size)
{
	int bytes = 0, pieces = 1;
	u64 *n = tap_unknown.lookup(&bytes);

	if (n)
		__sync_fetch_and_add(n, size);
	n = tap_unknown.lookup(&pieces);
	if (n)
		__sync_fetch_and_add(n, 1);
}

/* enum tap_choice */
static __always_inline u32 choose_tap(struct tap_settings *s, struct pair *p, struct pair_id *id)
{
	u32 *chosen;

	if (!has_tapped_port(s, p))
		return TAP_UNWANTED;
	if (s->choice != TAP_UNDECIDED)
		return s->choice;
	chosen = tap_choices.lookup(id);
	return chosen ? READ_ONCE(*chosen) : TAP_UNDECIDED;
}

/* Both directions begin where their ends are now. The other one's is what has arrived from there. */
static __always_inline struct tap_flow *
get_tap_flow(struct pair *p, struct pair_id *id, void *tp, u32 seq, int side, u32 size)
{
	struct tap_flow *f = tap_flows.lookup(id), fresh = {};
	u32 back;

	if (f)
		return f;
	back = FIELD(tp, u32, tcp_sock_rcv_nxt);
	if (side == CLIENT) {
		fresh.end[CLIENT] = seq;
		fresh.end[SERVER] = back + (u32)p->dir[SERVER].redirected_bytes;
	} else {
		fresh.end[SERVER] = seq;
		fresh.end[CLIENT] = back + (u32)p->dir[CLIENT].redirected_bytes;
	}
	tap_flows.insert(id, &fresh);
	f = tap_flows.lookup(id);
	if (!f)
		count_unknown(size);
	return f;
}

static __always_inline void
describe(struct tap_record *r, struct pair *p, struct pair_id *id, struct tap_flow *f, u32 choice, int side)
{
	r->id = *id;
	r->time_ns = bpf_ktime_get_ns();
	r->sender = side;
	r->choice = choice;
	/* A client's is not known before it has read. */
	if (p->end[CLIENT].at.local_port) {
		r->viewer = CLIENT;
		r->at = p->end[CLIENT].at;
	} else {
		r->viewer = SERVER;
		r->at = p->end[SERVER].at;
	}
	if (side == CLIENT) {
		r->ack = READ_ONCE(f->end[SERVER]);
		r->missed_bytes = f->missed_bytes[CLIENT];
		r->missed = f->missed[CLIENT];
	} else {
		r->ack = READ_ONCE(f->end[CLIENT]);
		r->missed_bytes = f->missed_bytes[SERVER];
		r->missed = f->missed[SERVER];
	}
}

/* `from` is not followed by the verifier: it is read as an address that may fault. */
static __always_inline void
copy_piece(struct tap_record *r, u8 *to, u32 room, void *from, u32 seq, u32 size, u64 kept)
{
	r->seq = seq;
	r->size = size;
	r->kept = 0;
	asm volatile("" : "+r"(kept));	/* the verifier wants to see this one comparison */
	if (kept <= room && !bpf_probe_read_kernel(to, kept, from))
		r->kept = kept;
}

static __always_inline void
record_piece(struct pair *p, struct pair_id *id, struct tap_flow *f, u32 choice, int side, void *from,
	     u32 seq, u32 size, u32 kept)
{
	int done = 0;

	if (kept <= 256) {
		struct tap_small *to = tap_ring.ringbuf_reserve(sizeof(struct tap_small));

		if (to) {
			describe(&to->record, p, id, f, choice, side);
			copy_piece(&to->record, to->bytes, sizeof(to->bytes), from, seq, size, kept);
			tap_ring.ringbuf_submit(to, BPF_RB_NO_WAKEUP);
			done = 1;
		}
	} else if (kept <= 1024) {
		struct tap_medium *to = tap_ring.ringbuf_reserve(sizeof(struct tap_medium));

		if (to) {
			describe(&to->record, p, id, f, choice, side);
			copy_piece(&to->record, to->bytes, sizeof(to->bytes), from, seq, size, kept);
			tap_ring.ringbuf_submit(to, BPF_RB_NO_WAKEUP);
			done = 1;
		}
	} else if (kept <= 4096) {
		struct tap_large *to = tap_ring.ringbuf_reserve(sizeof(struct tap_large));

		if (to) {
			describe(&to->record, p, id, f, choice, side);
			copy_piece(&to->record, to->bytes, sizeof(to->bytes), from, seq, size, kept);
			tap_ring.ringbuf_submit(to, BPF_RB_NO_WAKEUP);
			done = 1;
		}
	} else {
		struct tap_huge *to = tap_ring.ringbuf_reserve(sizeof(struct tap_huge));

		if (to) {
			describe(&to->record, p, id, f, choice, side);
			copy_piece(&to->record, to->bytes, sizeof(to->bytes), from, seq, size, kept);
			tap_ring.ringbuf_submit(to, BPF_RB_NO_WAKEUP);
			done = 1;
		}
	}
	if (side == CLIENT) {
		WRITE_ONCE(f->end[CLIENT], seq + size);
		if (!done) {
			f->missed_bytes[CLIENT] += size;
			f->missed[CLIENT]++;
		}
	} else {
		WRITE_ONCE(f->end[SERVER], seq + size);
		if (!done) {
			f->missed_bytes[SERVER] += size;
			f->missed[SERVER]++;
		}
	}
}

int tap(struct sk_msg_md *msg)
{
	void *sk = msg->sk, *tp;
	struct tap_settings *s;
	struct tap_flow *f;
	struct pair_id id;
	struct pair *p;
	u32 choice, seq, size, left;
	u64 from;
	int side, zero = 0;

	from = (u64)msg->data;
	size = (u64)msg->data_end - from;
	if (!sk)
		return SK_PASS;
	tp = to_tcp_sock(sk);
	if (!tp)
		return SK_PASS;
	s = tap_settings.lookup(&zero);
	p = find_pair_of(tp, &id, &side);
	if (!s || !p)
		return SK_PASS;
	/* verdict has counted them already. */
	seq = FIELD(tp, u32, tcp_sock_write_seq) - size;
	if (side == CLIENT)
		seq += (u32)p->dir[CLIENT].redirected_bytes;
	else
		seq += (u32)p->dir[SERVER].redirected_bytes;
	choice = choose_tap(s, p, &id);
	if (choice == TAP_UNWANTED)
		return SK_PASS;
	f = get_tap_flow(p, &id, tp, seq, side, size);
	if (!f)
		return SK_PASS;
	left = size;
	for (int i = 0; i < TAP_PIECES && left; i++) {
		u32 piece = left < TAP_PIECE || i == TAP_PIECES - 1 ? left : TAP_PIECE;

		record_piece(p, &id, f, choice, side, (void *)from, seq, piece,
			     piece < s->kept ? piece : s->kept);
		seq += piece;
		from += piece;
		left -= piece;
	}
	return SK_PASS;
}
