"""What exercises of this lesson share."""


def receivers(one):
    """The ranks, as the whole world numbers them, to which an answer sent on one rank. one: its `Seen`."""
    made = [call for call in one.calls if call.op == "send" and call.bytes]
    return {call.group[call.peer] if call.group else call.peer for call in made}
