/* SPDX-License-Identifier: Apache-2.0
 *
 * A stream that goes on in another ring (ism/shm/move.py, ism/shm/observe.py): a sender and a receiver, a home ring and
 * rings that the receiver offers, each of SIZE units. Checked in every interleaving: every unit is read once, in order,
 * from a cell that was written; an honest peer is never taken for a liar (the bounds that a receiver checks are
 * asserted); nobody writes or reads a region that its owner has let go; both sides come to the end.
 *
 * Each side's stores reach memory late and in order. That is x86-64; elsewhere it is what the release stores give, for
 * every word here but the cells is stored with release. Loads are taken in program order, as acquire has it.
 *
 * Each macro removes one thing that is needed; the checker must then find an error:
 *   MOVE_LATE     a unit behind the move is published before the move is
 *   CURSOR_LATE   the number of moves is stored before the place of the move
 *   OFFER_EARLY   the number of an offer is stored before its token
 *   TWO_MOVES     the sender moves again when the receiver has read up to its last move, but not beyond
 *   LOOK_FIRST    the receiver looks for a move before it loads the producer cursor
 *   NO_RELOAD     having found a move, the receiver goes on with the producer cursor that it loaded before
 *   NO_CLAMP      the receiver reads beyond the place of the move in the old ring
 *   RETIRE_EARLY  the receiver lets a ring go when it learns of the move
 */

#define SIZE  2
#define TOTAL 5
#define OFFERS 2

#define CELL(ring, index) ((ring) * SIZE + (index))
#define PRODUCER 6
#define CONSUMER 7
#define OFFER    8
#define TOKEN    9
#define MOVES    10
#define RING     11
#define CURSOR   12
#define LOCATIONS 13

byte memory[LOCATIONS];
bool held[3]; /* by the receiver, who owns the regions */
chan from_sender = [6] of { byte, byte };
chan from_receiver = [4] of { byte, byte };
bool sender_done, receiver_done;

proctype bus()
{
	byte where, what;
end:	do
	:: d_step {
		nempty(from_sender) -> from_sender?where, what;
		assert(where >= PRODUCER || held[where / SIZE]);
		memory[where] = what; where = 0; what = 0
	}
	:: d_step {
		nempty(from_receiver) -> from_receiver?where, what;
		memory[where] = what; where = 0; what = 0
	}
	od
}

#define STORE(buffer, where, what) buffer!where, what
#define MAX(a, b) ((a) > (b) -> (a) : (b))

inline announce_move()
{
	STORE(from_sender, RING, ring);
#ifdef CURSOR_LATE
	STORE(from_sender, MOVES, moves);
	STORE(from_sender, CURSOR, base)
#else
	STORE(from_sender, CURSOR, base);
	STORE(from_sender, MOVES, moves)
#endif
}

inline move_to(where)
{
	ring = where; base = p; moves++;
#ifdef MOVE_LATE
	late = true
#else
	announce_move()
#endif
}

proctype sender()
{
	byte p, base, ring, moves, c, ready, seen, token;
	bool late;
	do
	:: p < TOTAL ->
		c = memory[CONSUMER];
#ifdef TWO_MOVES
		if
		:: ready != 0 && c >= base -> move_to(ready); ready = 0
#else
		if
		:: ready != 0 && (moves == 0 || c > base) -> move_to(ready); ready = 0
#endif
		:: else
		fi;
		if
		:: SIZE > p - MAX(c, base) ->
			STORE(from_sender, CELL(ring, (p - base) % SIZE), p + 1);
			p++;
			STORE(from_sender, PRODUCER, p);
#ifdef MOVE_LATE
			if
			:: late -> late = false; announce_move()
			:: else
			fi
#endif
		:: else ->
			memory[CONSUMER] != c || memory[OFFER] != seen || ready != 0
		fi
	:: memory[OFFER] != seen ->
		seen = memory[OFFER];
		token = memory[TOKEN];
		assert(token == seen && held[token]);
		ready = seen
	:: ring != 0 && ready == 0 && !late && memory[CONSUMER] == p && p > base -> move_to(0)
	:: p == TOTAL -> break
	od;
	sender_done = true
}

inline let_go(where)
{
	if
	:: where != 0 -> held[where] = false
	:: else
	fi
}

inline note_move()
{
	assert(memory[MOVES] == moves + 1);
	nring = memory[RING];
	at = memory[CURSOR];
	assert((nring == 0 && ring != 0) || (nring == outstanding && nring != 0));
	assert(at >= accepted && at <= c + SIZE);
	if
	:: nring != 0 -> outstanding = 0
	:: else
	fi;
	moves++;
#ifdef RETIRE_EARLY
	let_go(ring);
#endif
	pending = true;
	accepted = at
}

inline cross()
{
#ifndef NO_RELOAD
	pr = memory[PRODUCER];
#endif
	assert(pr >= at && pr <= at + SIZE);
#ifdef NO_CLAMP
	if
	:: true ->
#else
	if
	:: c == at ->
#endif
		let_go(ring);
		ring = nring; base = at; pending = false; accepted = pr
	:: else
	fi
}

proctype receiver()
{
	byte c, base, ring, moves, accepted, at, nring, pr, offers, outstanding, unit;
	bool pending, moved;
	do
	:: c < TOTAL && (c < accepted || memory[PRODUCER] != accepted) ->
#ifdef LOOK_FIRST
		moved = (memory[MOVES] != moves);
		pr = memory[PRODUCER];
#else
		pr = memory[PRODUCER];
		moved = (memory[MOVES] != moves);
#endif
		if
		:: pr == accepted
		:: pr != accepted && pending -> cross()
		:: pr != accepted && !pending && moved -> note_move(); cross()
		:: pr != accepted && !pending && !moved ->
			assert(pr >= accepted && pr <= c + SIZE);
			accepted = pr
		fi;
		if
		:: c < accepted ->
			unit = memory[CELL(ring, (c - base) % SIZE)];
			assert(unit == c + 1 && held[ring]);
			c++;
			STORE(from_receiver, CONSUMER, c)
		:: else
		fi
	:: offers < OFFERS && outstanding == 0 && c < TOTAL ->
		offers++;
		outstanding = offers;
		held[offers] = true;
#ifdef OFFER_EARLY
		STORE(from_receiver, OFFER, offers);
		STORE(from_receiver, TOKEN, offers)
#else
		STORE(from_receiver, TOKEN, offers);
		STORE(from_receiver, OFFER, offers)
#endif
	:: !pending && memory[MOVES] != moves -> note_move(); cross() /* though nothing was sent since */
	:: c == TOTAL -> break
	od;
	receiver_done = true
}

init
{
	held[0] = true;
	atomic { run bus(); run sender(); run receiver() }
}
