/* SPDX-License-Identifier: Apache-2.0
 *
 * One direction of a connection: a writer and a reader, a ring of SIZE units, two doorbells. Checked: no wake-up is
 * lost (an invalid end state), every unit is visible when its cursor is, EOF comes after all data, and a sleep is
 * rung at most once. `docs/memory-order.md` explains the protocol; `ism/shm/park.py` and `ism/shm/ring.py` are it.
 *
 * Memory is weaker than either x86-64 or arm64 allows for stores: each side has a store buffer whose entries become
 * visible in any order, except that two stores to one location keep theirs and a release store becomes visible after
 * everything stored before it. With -DTSO the buffer is a FIFO, as on x86-64. A fence waits for the buffer to be
 * empty. Loads take effect in program order, which acquire loads and the fence guarantee; -DNO_ACQUIRE drops that.
 *
 * Each macro below removes one thing the protocol needs; the checker must then find an error:
 *   NO_PUBLISH_FENCE NO_PARK_READER_FENCE   the two halves of waking a reader
 *   NO_CONSUME_FENCE NO_PARK_WRITER_FENCE   the two halves of waking a writer
 *   NO_FLAG_FENCE    flags are set and the sleep number is read without a fence between
 *   NO_RELEASE       the producer cursor is an ordinary store
 *   NO_ACQUIRE       bytes are read before the cursor that covers them
 *   NO_RECHECK       a reader sleeps without looking again
 *   NO_RUNG          the ringing side forgets which sleep it rang for
 *   DRAIN_LATE       the eventfd is drained after parking instead of before
 *   FLAGS_LATE       the producer cursor is read before the flags that end the stream
 *   NO_FLUSH         a reader goes to sleep without waking a writer it had held back
 * NO_CONSUME_FENCE is found with -DPOLLING, a reader that never parks and takes all there is: one that parks makes up
 * for a ring it missed.
 */

#define SIZE   4 /* units in the ring */
#define WINDOW 3 /* room worth waking a writer for, unless the ring is empty */
#define TOTAL  6 /* units of the stream: records of 1, 4 and 1, so that a record can be wider than what is left */
#ifdef POLLING
#define NEED(record) 1
#else
#define NEED(record) (record == 1 -> 4 : 1)
#endif

#define DATA 0 /* units whose bytes are written */
#define PROD 1 /* producer cursor */
#define CONS 2 /* consumer cursor */
#define RPARK 3 /* sleep number of the reader */
#define WPARK 4 /* sleep number of the writer */
#define DONE 5 /* flag: done writing */
#define LOCATIONS 6

#define WRITER 0
#define READER 1

#define DEPTH 6 /* entries of a store buffer: more than either side has between two fences */
typedef Buffer {
	byte location[DEPTH];
	byte value[DEPTH];
	bool release[DEPTH];
	byte used
}

byte memory[LOCATIONS];
Buffer buffer[2];
byte bell[2];     /* eventfd of each side */
byte rings[2];    /* ghost: doorbells for the current sleep of each side */
byte current[2];  /* ghost: sleep number each side announced last */

inline store(side, where, what, released)
{
	d_step {
		buffer[side].used < DEPTH ->
		buffer[side].location[buffer[side].used] = where;
		buffer[side].value[buffer[side].used] = what;
		buffer[side].release[buffer[side].used] = released;
		buffer[side].used++
	}
}

inline full_fence(side)
{
	buffer[side].used == 0
}

/* Entry i may become visible: nothing older for the same location; nothing older at all if released or under TSO. */
inline may_leave(side, i, answer)
{
	answer = (i < buffer[side].used);
	j = 0;
	do
	:: j < i && j < buffer[side].used ->
		if
#ifdef TSO
		:: true -> answer = false
#else
		:: buffer[side].release[i] || buffer[side].location[j] == buffer[side].location[i] -> answer = false
		:: else
#endif
		fi;
		j++
	:: else -> break
	od
}

inline leave(side, i)
{
	memory[buffer[side].location[i]] = buffer[side].value[i];
	j = i;
	do
	:: j + 1 < buffer[side].used ->
		buffer[side].location[j] = buffer[side].location[j + 1];
		buffer[side].value[j] = buffer[side].value[j + 1];
		buffer[side].release[j] = buffer[side].release[j + 1];
		j++
	:: else -> break
	od;
	buffer[side].used--;
	buffer[side].location[buffer[side].used] = 0;
	buffer[side].value[buffer[side].used] = 0;
	buffer[side].release[buffer[side].used] = 0
}

/* The memory system: makes one pending store of one side visible at a time, any that may be. */
proctype drain_stores(byte side)
{
	byte i, j;
	bool allowed;
end:	do
	:: atomic {
		buffer[side].used > 0 ->
		i = 0;
		do
		:: i + 1 < buffer[side].used -> i++
		:: break
		od;
		d_step {
			may_leave(side, i, allowed);
			if
			:: allowed -> leave(side, i)
			:: else
			fi;
			i = 0; j = 0; allowed = false
		}
	}
	od
}

/* owes_reader, owes_writer: ring the sleeper unless it was rung for this sleep. */
inline ring_sleeper(where, side)
{
	sleep = memory[where];
	if
#ifdef NO_RUNG
	:: sleep % 2 == 1 ->
#else
	:: sleep % 2 == 1 && sleep != rung ->
#endif
		rung = sleep;
		atomic {
			/* a number that is no longer the sleeper's own was read just before it woke: one ring too many at
			   most, and never two for one sleep */
			if
			:: sleep == current[side] -> rings[side]++; assert(rings[side] <= 1)
			:: else
			fi;
			bell[side] = 1
		}
	:: else
	fi;
	sleep = 0
}

inline announce_sleep(side, where)
{
	atomic {
		number = number + 1 + number % 2;
		current[side] = number;
		rings[side] = 0
	}
	store(side, where, number, true)
}

inline announce_awake(side, where)
{
	number++;
	store(side, where, number, true)
}

proctype writer()
{
	byte sent, consumed, number, rung, sleep, count;

	do
	:: sent == TOTAL -> break
	:: else ->
		consumed = memory[CONS];
		assert(consumed <= sent && sent - consumed <= SIZE);
		if
		:: sent - consumed < SIZE ->
			/* send some of what fits */
			count = 1;
			do
			:: sent + count < TOTAL && sent + count - consumed < SIZE -> count++
			:: break
			od;
			sent = sent + count;
			store(WRITER, DATA, sent, false);
#ifdef NO_RELEASE
			store(WRITER, PROD, sent, false);
#else
			store(WRITER, PROD, sent, true);
#endif
			count = 0;
			consumed = 0;
#ifndef NO_PUBLISH_FENCE
			full_fence(WRITER);
#endif
			ring_sleeper(RPARK, READER)
		:: else ->
			consumed = 0;
#ifndef DRAIN_LATE
			bell[WRITER] = 0;
#endif
			announce_sleep(WRITER, WPARK);
#ifndef NO_PARK_WRITER_FENCE
			full_fence(WRITER);
#endif
			consumed = memory[CONS];
			if
			:: sent - consumed == SIZE ->
#ifdef DRAIN_LATE
				bell[WRITER] = 0;
#endif
				atomic { bell[WRITER] > 0 -> bell[WRITER] = 0 }
			:: else
			fi;
			consumed = 0;
			announce_awake(WRITER, WPARK)
		fi
	od;
	store(WRITER, DONE, 1, true);
#ifndef NO_FLAG_FENCE
	full_fence(WRITER);
#endif
	ring_sleeper(RPARK, READER)
}

proctype reader()
{
	byte got, accepted, data, record, number, rung, sleep, beyond;
	bool done;

	do
	::
#ifdef NO_ACQUIRE
		data = memory[DATA];
		accepted = memory[PROD];
#else
		accepted = memory[PROD];
		data = memory[DATA];
#endif
		assert(accepted >= got && accepted - got <= SIZE);
		assert(data >= accepted);
		data = 0;
		if
		:: got < TOTAL && accepted - got >= NEED(record) ->
			got = got + NEED(record);
			record++;
			store(READER, CONS, got, true);
			if
			:: accepted == got || SIZE - (accepted - got) >= WINDOW ->
#ifndef NO_CONSUME_FENCE
				full_fence(READER);
#endif
				ring_sleeper(WPARK, WRITER)
			:: else
			fi;
			accepted = 0
		:: else ->
#ifdef POLLING
			if
			:: memory[PROD] != accepted
			:: memory[DONE] ->
				accepted = memory[PROD];
				if
				:: accepted == got -> assert(got == TOTAL); break
				:: else
				fi
			fi;
			accepted = 0
#else
			beyond = accepted - got;
#ifndef DRAIN_LATE
			bell[READER] = 0;
#endif
			announce_sleep(READER, RPARK);
#ifndef NO_PARK_READER_FENCE
			full_fence(READER);
#endif
#ifndef NO_RECHECK
#ifdef FLAGS_LATE
			accepted = memory[PROD];
			done = memory[DONE];
#else
			done = memory[DONE];
			accepted = memory[PROD];
#endif
#endif
			if
			:: done && accepted - got <= beyond ->
				/* end of stream: all of it must have been there */
				assert(accepted == TOTAL && got == TOTAL);
				break
			:: !done && accepted - got <= beyond ->
#ifndef NO_FLUSH
				ring_sleeper(WPARK, WRITER);
#endif
#ifdef DRAIN_LATE
				bell[READER] = 0;
#endif
				atomic { bell[READER] > 0 -> bell[READER] = 0 }
			:: else
			fi;
			accepted = 0;
			beyond = 0;
			announce_awake(READER, RPARK)
#endif
		fi
	od
}

init {
	atomic {
		run drain_stores(WRITER);
		run drain_stores(READER);
		run writer();
		run reader()
	}
}
