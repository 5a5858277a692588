"""Chats for tests."""

GOOD = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}]


def chat(*turns):
    """A chat of turns (role, content)."""
    return [dict(zip(("role", "content"), turn, strict=True)) for turn in turns]
