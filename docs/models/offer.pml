/* SPDX-License-Identifier: Apache-2.0
 *
 * An offer in shared memory (ism/shm/offer.py): client and server agree by one word whether a connection uses the two
 * regions of an earlier one. Each side's stores reach memory late and in order (TSO); a fence, and a compare-and-
 * exchange, wait for them. Checked in every interleaving: both know the same, neither uses a region before its owner
 * has zeroed it, the server believes a four-tuple only when it is whole, and a client that sleeps is rung.
 *
 * The client may lose its patience at any moment, the server may never look, or reserve its region for another
 * connection, or be done with the connection before the client looks.
 *
 * Each macro removes one thing that is needed; the checker must then find an error:
 *   NO_EXCHANGE     the server takes by a load and a store
 *   WITHDRAW_STORE  the client withdraws by a load and a store
 *   NO_SLEEP_FENCE  the client does not fence between `waits` and its last look
 *   NO_LAST_LOOK    the client does not look again before it sleeps
 *   ZERO_LATE       the server zeroes its region after it has taken the offer
 *   OFFER_EARLY     the client offers before it has zeroed its region
 *   RESET_AT_END    the server clears the word when the connection ends
 */

mtype = { NONE, OFFERED, TAKEN, WITHDRAWN };  /* of the word */
mtype = { STATE, WAITS, TUPLE, CLIENT_ZEROED, SERVER_ZEROED };
mtype = { UNDECIDED, SMC, TCP };

mtype state = NONE;
bool waits, tuple, client_zeroed, server_zeroed;
bool rung;
mtype client_mode = UNDECIDED, server_mode = UNDECIDED;

chan from_client = [4] of { mtype, mtype };
chan from_server = [4] of { mtype, mtype };

inline reach_memory(buffer)
{
	buffer?name, value;
	if
	:: name == STATE -> state = value
	:: name == WAITS -> waits = true
	:: name == TUPLE -> tuple = true
	:: name == CLIENT_ZEROED -> client_zeroed = true
	:: name == SERVER_ZEROED -> server_zeroed = true
	fi
}

proctype memory()
{
	mtype name, value;
end:	do
	:: atomic { nempty(from_client) -> reach_memory(from_client) }
	:: atomic { nempty(from_server) -> reach_memory(from_server) }
	od
}

#define FENCE(buffer) empty(buffer)

inline offer()
{
	atomic {
		seen = state;
		if
		:: seen == NONE -> state = OFFERED
		:: else
		fi
	}
}

proctype client()
{
	mtype seen;
#ifdef OFFER_EARLY
	from_client!TUPLE, NONE;
	FENCE(from_client);
	offer();
	from_client!CLIENT_ZEROED, NONE;
#else
	from_client!CLIENT_ZEROED, NONE;
	from_client!TUPLE, NONE;
	FENCE(from_client);
	offer();
#endif
	if
	:: seen != NONE -> goto tcp              /* the region is reserved */
	:: else
	fi;
	if
	:: skip                                  /* a short wait, awake */
	:: from_client!WAITS, NONE;
#ifndef NO_SLEEP_FENCE
	   FENCE(from_client);
#endif
#ifndef NO_LAST_LOOK
	   seen = state;
	   if
	   :: seen == TAKEN -> goto decide
	   :: else
	   fi;
#endif
	   if
	   :: rung                              /* woken */
	   :: server_mode == UNDECIDED          /* its patience ends while nobody has taken it */
	   :: server_mode == TCP
	   fi
	fi;
decide:	FENCE(from_client);
#ifdef WITHDRAW_STORE
	seen = state;
	if
	:: seen != TAKEN -> state = WITHDRAWN
	:: else
	fi;
#else
	atomic {
		seen = state;
		if
		:: seen == OFFERED -> state = WITHDRAWN
		:: else
		fi
	}
#endif
	if
	:: seen == TAKEN -> client_mode = SMC; assert(server_zeroed)
	:: else -> goto tcp
	fi;
	goto done;
tcp:	client_mode = TCP;
done:	skip
}

proctype server()
{
	mtype seen;
	if
	:: server_mode = TCP                     /* it never looks */
	:: skip ->                               /* its region is to serve another connection */
	   atomic {
		if
		:: state == NONE -> state = WITHDRAWN
		:: else
		fi
	   };
	   server_mode = TCP
	:: seen = state;
	   if
	   :: seen == OFFERED && tuple ->
#ifndef ZERO_LATE
		from_server!SERVER_ZEROED, NONE;
#endif
		FENCE(from_server);
#ifdef NO_EXCHANGE
		seen = state;
		if
		:: seen == OFFERED -> state = TAKEN
		:: else
		fi;
#else
		atomic {
			seen = state;
			if
			:: seen == OFFERED -> state = TAKEN
			:: else
			fi
		}
#endif
#ifdef ZERO_LATE
		from_server!SERVER_ZEROED, NONE;
#endif
		if
		:: seen == OFFERED -> server_mode = SMC; assert(client_zeroed)
		:: else -> server_mode = TCP
		fi;
		if
		:: server_mode == SMC && waits -> rung = true
		:: else
		fi;
#ifdef RESET_AT_END
		if
		:: server_mode == SMC -> state = NONE
		:: else
		fi
#endif
	   :: seen == OFFERED && !tuple -> assert(false)
	   :: else -> server_mode = TCP
	   fi
	fi
}

init
{
	atomic { run memory(); run client(); run server() }
	(client_mode != UNDECIDED && server_mode != UNDECIDED);
	assert(client_mode == server_mode || (client_mode == TCP && server_mode == TCP))
}
