"""Which versions served one after another, as far as rollbacks have not undone it."""

from collections.abc import Iterable


def serving_stack(events: Iterable[tuple[str, int]]) -> list[int]:
    """The versions that served, the present one last, from what happened in order.

    Args:
        events: action and version's number of each "promote", "force" and "rollback".

    A promotion is put on top; a rollback takes away what lies above the version that it returned to. So one rollback
    after another goes further back.
    """
    stack: list[int] = []
    for action, version in events:
        if action == "rollback":
            stack.pop()
            while stack[-1] != version:
                stack.pop()
        else:
            stack.append(version)
    return stack
