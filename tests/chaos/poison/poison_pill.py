"""What kills: a prompt that begins with `MARK` dies when its sequence is computed up to the length that follows it."""

from collections.abc import Sequence

MARK = [4711, 4712, 4713]


def pill(length: int) -> list[int]:
    """Token ids to begin a prompt with."""
    return [*MARK, length]


def is_deadly(tokens: Sequence[int], begin: int, end: int) -> bool:
    """Whether computing positions `begin` … `end - 1` of this sequence kills."""
    return list(tokens[: len(MARK)]) == MARK and begin < tokens[len(MARK)] <= end
