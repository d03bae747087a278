/* SPDX-License-Identifier: Apache-2.0
 *
 * One TCP connection and the decision whether it uses shared memory: a client, a server, the device manager between
 * them. Checked, in every interleaving and with the manager dying at any step: both ends come to the same mode, every
 * unit of both applications arrives once and in order, no unit is taken for a handshake message nor the reverse, and
 * nobody waits for ever. `docs/directory.md` has the rules in words.
 *
 * What may happen besides: the server is a plain one that never claims; there is a NAT or proxy, so the server sees
 * another four-tuple; the INTEND is refused; an event is lost; the client waits as long as it likes before it retracts
 * and before it gives up waiting for the answer; either end declines where the grammar of the handshake lets it; either
 * application, or both, speak first; the first unit of an application looks like a handshake message, without the nonce.
 *
 * Each macro below removes one thing the protocol needs; the checker must then find an error:
 *   NO_EXCLUSION     a claimed intent can still be retracted
 *   EVENT_FIRST      the client is told of a claim before its ack is on the server's ring
 *   NO_LAST_LOOK     a server whose manager has died does not look for the ack that was written
 *   INTEND_UNCHECKED RETRACT is answered ENOENT, and the client does not ask whether its INTEND was recorded at all
 *   SERVER_NO_NONCE  a server that claimed takes whatever looks like a handshake message for one
 *   CLIENT_NO_NONCE  a client that cannot know drops whatever looks like a DECLINE
 *   NO_DROP          a client that cannot know drops nothing
 *   NO_ANSWER        an end that is declined does not answer with its own DECLINE
 */

#define UNITS 2 /* of each application, numbered from 1 */

/* what bytes look like */
mtype = { APP, PROPOSAL, ACCEPT, CONFIRM, DECLINE };
mtype = { NONE, OK, ENOENT };
mtype = { UNDECIDED, TCP, SMC };

/* TCP: what the bytes look like; whether they carry the nonce; ghost: the application's unit, 0 for a message */
chan to_server = [UNITS + 3] of { mtype, bit, byte };
chan to_client = [UNITS + 3] of { mtype, bit, byte };
/* the rings in shared memory */
chan ring_to_server = [UNITS] of { byte };
chan ring_to_client = [UNITS] of { byte };

/* queues: memory that outlives the manager. The client's commands are served in order */
bool alive = true;
bool intend_sent, retract_sent, claim_sent;
mtype intend_ack = NONE, retract_ack = NONE, claim_ack = NONE;
bool claimed_event;

bool connected;
bool translated;        /* a NAT or proxy: the server sees another four-tuple */
bool client_first, server_first; /* who speaks first; both may */
mtype client_mode = UNDECIDED, server_mode = UNDECIDED;
byte finished;

inline may_die()
{
	if
	:: true
	:: true -> goto dead
	fi
}

proctype manager()
{
	bool intended, intend_done, retract_done, claim_done;

end:	do
	:: intend_sent && !intend_done ->
		intend_done = true;
		if
		:: true -> intended = true; may_die(); intend_ack = OK
		:: true -> intend_ack = ENOENT
		fi
	:: intend_done && retract_sent && !retract_done ->
		retract_done = true;
		if
		:: intended -> intended = false; may_die(); retract_ack = OK
		:: else -> retract_ack = ENOENT
		fi
	:: claim_sent && !claim_done ->
		claim_done = true;
		if
		:: intended && !translated ->
#ifdef EVENT_FIRST
			claimed_event = true;
			may_die();
			claim_ack = OK;
#else
			claim_ack = OK;
			may_die();
			if
			:: true -> claimed_event = true
			:: true /* too many events are under way */
			fi;
#endif
#ifndef NO_EXCLUSION
			intended = false
#endif
		:: else -> claim_ack = ENOENT
		fi
	:: true -> goto dead
	od;
dead:	alive = false
}

/* An application's unit, which may look like anything that has no nonce. */
inline send_unit(tcp, ring, mode, unit)
{
	if
	:: mode == SMC -> ring!unit
	:: else ->
		if
		:: true -> tcp!APP, 0, unit
		:: unit == 1 -> tcp!DECLINE, 0, unit
		:: unit == 1 -> tcp!PROPOSAL, 0, unit
		fi
	fi
}

inline finish()
{
	atomic {
		finished++;
		if
		:: finished == 2 ->
			assert(client_mode == server_mode);
			assert(len(to_server) == 0 && len(to_client) == 0);
			assert(len(ring_to_server) == 0 && len(ring_to_client) == 0)
		:: else
		fi
	}
}

inline client_receives()
{
	if
	:: client_mode == SMC -> ring_to_client?unit; got++; assert(unit == got)
	:: else ->
		to_client?kind, nonce, unit;
		if
		:: drain ->
			/* it has declined: the server's only message is still to come */
			assert(unit == 0 && (kind == ACCEPT || kind == DECLINE));
			drain = false
#ifndef NO_DROP
#ifdef CLIENT_NO_NONCE
		:: !drain && unconfirmed && got == 0 && kind == DECLINE ->
#else
		:: !drain && unconfirmed && got == 0 && kind == DECLINE && nonce ->
#endif
			assert(unit == 0);
			unconfirmed = false
#endif
		:: else -> got++; assert(unit == got)
		fi;
		kind = NONE; nonce = 0
	fi;
	unit = 0
}

proctype client()
{
	mtype kind = NONE;
	bit nonce;
	byte unit, sent, got;
	bool unconfirmed, drain;

	intend_sent = true;
	connected = true;

	/* wait to be claimed: for a while when it wants to send, until something comes when it wants to receive */
	if
	:: claimed_event -> goto agreed
	:: intend_ack == ENOENT -> goto speak_tcp
	:: client_first -> skip
	:: nempty(to_client) -> skip
	:: !alive -> goto last_look
	fi;
	retract_sent = true;
	if
	:: retract_ack == OK -> goto speak_tcp
	:: retract_ack == ENOENT -> goto was_claimed
	:: !alive -> goto last_look
	:: true -> goto cannot_know /* no answer in time */
	fi;
last_look:
	if
	:: claimed_event -> goto agreed
	:: !claimed_event && retract_ack == OK -> goto speak_tcp
	:: !claimed_event && retract_ack == ENOENT -> goto was_claimed
	:: else -> goto cannot_know
	fi;
was_claimed:
#ifndef INTEND_UNCHECKED
	if
	:: intend_ack == OK -> goto agreed
	:: else -> goto speak_tcp
	fi;
#endif
agreed:
	if
	:: to_client?kind, nonce, unit ->
		/* the server cannot wait, and speaks TCP */
		assert(unit == 0 && kind == DECLINE);
		to_server!DECLINE, 1, 0;
		goto speak_tcp
	:: true -> to_server!DECLINE, 1, 0; drain = true; goto speak_tcp
	:: true -> to_server!PROPOSAL, 1, 0
	fi;
	if
	:: to_client?kind, nonce, unit ->
		assert(unit == 0 && (kind == ACCEPT || kind == DECLINE));
		if
		:: kind == ACCEPT -> to_server!CONFIRM, 1, 0; client_mode = SMC; goto application
		:: kind == ACCEPT -> to_server!DECLINE, 1, 0
		:: kind == DECLINE ->
#ifndef NO_ANSWER
			to_server!DECLINE, 1, 0
#endif
		fi
	:: true -> to_server!DECLINE, 1, 0; drain = true /* no answer in time */
	fi;
	goto speak_tcp;
cannot_know:
	unconfirmed = true;
speak_tcp:
	client_mode = TCP;
application:
	kind = NONE; nonce = 0; unit = 0;
	do
	:: sent < UNITS && (client_first || got == UNITS) ->
		sent++;
		send_unit(to_server, ring_to_server, client_mode, sent)
	:: got < UNITS && (sent == UNITS || !client_first) -> client_receives()
	:: sent == UNITS && got == UNITS -> break
	od;
	finish()
}

inline server_receives()
{
	if
	:: server_mode == SMC -> ring_to_server?unit; got++; assert(unit == got)
	:: else ->
		to_server?kind, nonce, unit;
		if
		:: drain == 1 && nonce ->
			/* declined before the client's first message came; behind a PROPOSAL comes one more */
			assert(unit == 0 && (kind == PROPOSAL || kind == DECLINE));
			drain = (kind == PROPOSAL -> 2 : 0)
		:: drain == 2 ->
			assert(unit == 0 && kind == DECLINE);
			drain = 0
		:: else -> drain = 0; got++; assert(unit == got)
		fi;
		kind = NONE; nonce = 0
	fi;
	unit = 0
}

proctype server()
{
	mtype kind = NONE;
	bit nonce;
	byte unit, sent, got;
	byte drain; /* 1: the client's first message is still to be read, 2: its last */

	connected;
	if
	:: true -> goto speak_tcp /* a plain server */
	:: true -> claim_sent = true
	fi;
	if
	:: claim_ack == OK -> goto agreed
	:: claim_ack == ENOENT -> goto speak_tcp
	:: !alive
	fi;
#ifndef NO_LAST_LOOK
	if
	:: claim_ack == OK -> goto agreed
	:: else
	fi;
#endif
	goto speak_tcp;
agreed:
	if
	:: to_server?[kind, nonce, unit] -> to_server?<kind, nonce, unit>
	:: server_first -> to_client!DECLINE, 1, 0; drain = 1; goto speak_tcp /* it has waited long enough */
	fi;
	if
#ifdef SERVER_NO_NONCE
	:: kind != APP ->
#else
	:: nonce ->
#endif
		to_server?kind, nonce, unit;
		assert(unit == 0 && (kind == PROPOSAL || kind == DECLINE))
	:: else -> to_client!DECLINE, 1, 0; goto speak_tcp /* the client could not know of the claim */
	fi;
	if
	:: kind == DECLINE -> to_client!DECLINE, 1, 0; goto speak_tcp
	:: kind == PROPOSAL -> to_client!DECLINE, 1, 0; drain = 2; goto speak_tcp
	:: kind == PROPOSAL -> to_client!ACCEPT, 1, 0
	fi;
	to_server?kind, nonce, unit;
	assert(unit == 0 && (kind == CONFIRM || kind == DECLINE));
	if
	:: kind == CONFIRM -> server_mode = SMC; goto application
	:: kind == DECLINE
	fi;
speak_tcp:
	server_mode = TCP;
application:
	kind = NONE; nonce = 0; unit = 0;
	do
	:: sent < UNITS && (server_first || got == UNITS) ->
		sent++;
		send_unit(to_client, ring_to_client, server_mode, sent)
	:: got < UNITS && (sent == UNITS || !server_first) -> server_receives()
	:: sent == UNITS && got == UNITS -> break
	od;
	finish()
}

init {
	atomic {
		if
		:: client_first = true
		:: server_first = true
		:: client_first = true; server_first = true
		fi;
		if
		:: translated = true
		:: true
		fi;
		run manager();
		run client();
		run server()
	}
}
