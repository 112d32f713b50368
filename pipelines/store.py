"""`hasten store`: lists, verifies or prunes the store of finished stages."""

from __future__ import annotations

from hasten.session import Session


def main(session: Session) -> int:
    """The command; its exit code is 1 where `verify` found a broken stage."""
    node = session.recipe.config["store"]
    store = session.store
    match node["action"]:
        case "verify":
            lines = list(store.verify())
        case "prune":
            lines = list(store.prune(node["days"]))
        case _:
            lines = list(store.listing())
    session.screen.store(lines)
    return 1 if node["action"] == "verify" and any(line.state == "broken" for line in lines) else 0
