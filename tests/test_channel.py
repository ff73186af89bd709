"""What comes through a channel whose other end is gone."""

from __future__ import annotations

from replica_plugin.channel import FREE, LEAVE, pair, receive_now


def test_what_was_said_before_the_end_is_read_though_not_all_had_been_heard():
    ours, theirs = pair()
    with ours:
        ours.send(LEAVE)
        theirs.send(FREE)
        theirs.close()
        assert [receive_now(ours) for _ in range(2)] == [(FREE, []), (b"", [])]
