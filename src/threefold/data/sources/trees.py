"""Conversation trees of OpenAssistant (Köpf et al. 2023): every question with all of its replies, ranked by people."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from threefold.data.sources.fields import (
    BadRowError,
    Messages,
    UnansweredRowError,
    field,
    ranking,
    text_field,
    type_name,
    wrong_type,
)
from threefold.data.sources.tables import LocatedRow, Row
from threefold.types import Example, Message, Prompt, Role

NODE_ROLES: dict[str, Role] = {"prompter": "user", "assistant": "assistant"}
ORPHAN = "orphan"


def read_tree(row: Row, origin: str) -> list[Example]:
    """One example per question that has replies: the path to it, and its replies by rank (0 is the best).

    Of replies without ranks, or of one reply alone, the first is a demonstration. Messages that were deleted, or that
    did not pass review, are left out with all below them.
    """
    if row.get(ORPHAN) is not None:
        raise BadRowError(
            "without their parent message",
            f"field 'parent_id' of message {row[ORPHAN]!r} names no message before it in its tree (the rows of one "
            "message_tree_id must stand one after the other)",
        )
    root = field(row, "prompt")
    if not _is_usable(root):
        raise UnansweredRowError(
            "with a question that was deleted or failed review", "the question of the tree was deleted or failed review"
        )
    examples: list[Example] = []
    waiting: list[tuple[Any, Messages]] = [(root, ())]
    while waiting:
        node, before = waiting.pop()
        role, text = _node(node, "assistant" if before and before[-1].role == "user" else "user")
        path = (*before, Message(role, text))
        replies = [reply for reply in _replies(node) if _is_usable(reply)]
        if role == "user" and replies:
            examples.append(_question(path, replies, origin))
        waiting += [(reply, path) for reply in reversed(replies)]
    if not examples:
        raise UnansweredRowError("without a reply", "the tree has no reply to its question")
    return examples


def _question(path: Messages, replies: list[Row], origin: str) -> Example:
    texts = [_node(reply, "assistant")[1] for reply in replies]
    ranked = [(text, reply["rank"]) for text, reply in zip(texts, replies, strict=True) if _has_rank(reply)]
    if len(ranked) < 2:
        return Example(Prompt(path), ranked[0][0] if ranked else texts[0], (), origin)
    return ranking(path, [text for text, _ in ranked], [rank for _, rank in ranked], origin)


def _replies(node: Row) -> list[Any]:
    replies = node.get("replies") or []
    if not isinstance(replies, list):
        raise wrong_type(replies, "replies", "a list of messages")
    return replies


def _has_rank(reply: Row) -> bool:
    rank = reply.get("rank")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int | float)):
        raise BadRowError("with a wrong 'rank'", f"field 'rank' of a reply is {type_name(rank)}, and must be a number")
    return rank is not None and rank == rank  # a column of a data frame has NaN for none


def _is_usable(reply: Any) -> bool:
    return not (isinstance(reply, dict) and (reply.get("deleted") or reply.get("review_result") is False))


def _node(node: Any, wanted: Role) -> tuple[Role, str]:
    """Role and text of a message, whose role must be the one wanted: questions and replies take turns."""
    if not isinstance(node, dict):
        raise BadRowError("with a wrong type of 'prompt'", f"field 'prompt' or a reply is {type_name(node)}")
    role = NODE_ROLES.get(str(node.get("role")))
    if role != wanted:
        name = "prompter" if wanted == "user" else "assistant"
        raise BadRowError("with an unknown role", f"field 'role' is {node.get('role')!r}, and must be {name!r} here")
    return role, text_field(node, "text")


def gather_trees(rows: Iterator[LocatedRow]) -> Iterator[LocatedRow]:
    """Rows of one message each, those of a tree one after the other, as rows of one tree each.

    A message whose parent is not before it in its tree becomes a row that cannot be used.
    """
    for _, members in groupby(rows, key=lambda row: row.values.get("message_tree_id")):
        nodes: dict[str, Row] = {}
        root: LocatedRow | None = None
        for member in members:
            values = member.values
            node = {**values, "replies": []}
            nodes[str(values.get("message_id"))] = node
            parent = values.get("parent_id")
            if not parent and root is None:
                root = LocatedRow(member.origin, {"prompt": node})
            elif str(parent) in nodes:
                nodes[str(parent)]["replies"].append(node)
            else:
                yield LocatedRow(member.origin, {ORPHAN: values.get("message_id") or "?"})
        if root is not None:
            yield root
