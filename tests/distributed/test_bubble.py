"""The closed form of the bubble against the schedules themselves, action by action."""

from types import SimpleNamespace

import pytest
from torch.distributed.pipelining import schedules

from hasten.distributed.bubble import bubble_share

TICKS = {"F": 1, "B": 2, "I": 1, "W": 1}
"""Of a forward pass, a backward pass, and the two halves that a backward pass may be divided into."""


def orders(name, stages, micro_batches):
    """For each process what it does: (stage, action, micro-batch); and how many stages it has."""
    if name == "GPipe":
        return 1, [[(rank, action, mb) for action in "FB" for mb in range(micro_batches)] for rank in range(stages)]
    if name == "1F1B":
        found = []
        for rank in range(stages):
            ahead = min(micro_batches, stages - rank)
            order = [(rank, "F", mb) for mb in range(ahead)]
            for mb in range(micro_batches):
                order.append((rank, "B", mb))
                if mb + ahead < micro_batches:
                    order.append((rank, "F", mb + ahead))
            found.append(order)
        return 1, found
    kind = schedules.get_schedule_class(name)
    place = SimpleNamespace(group_size=stages, group_rank=0, num_stages=2 * stages, submod=None)
    order = kind([place, place], n_microbatches=micro_batches, loss_fn=lambda outputs, targets: None).pipeline_order
    return 2, [[each for action in order[rank] if action for each in single(action)] for rank in range(stages)]


def single(action):
    return [
        (each.stage_index, each.computation_type.value, each.microbatch_index)
        for each in action.sub_actions or (action,)
    ]


def idle_share(name, stages, micro_batches):
    held, order = orders(name, stages, micro_batches)
    last, clocks, places, ended = held * stages - 1, [0] * stages, [0] * stages, {}
    while any(place < len(each) for place, each in zip(places, order, strict=True)):
        before = list(places)
        for rank, actions in enumerate(order):
            while places[rank] < len(actions):
                stage, action, mb = actions[places[rank]]
                needed = {
                    "F": [("F", stage - 1, mb)] if stage else [],
                    "W": [("B", stage, mb)],
                }.get(action, [("F", stage, mb), *([("B", stage + 1, mb)] if stage < last else [])])
                if any(each not in ended for each in needed):
                    break
                clocks[rank] = max([clocks[rank], *(ended[each] for each in needed)]) + TICKS[action]
                ended["B" if action == "I" else action, stage, mb] = clocks[rank]
                places[rank] += 1
        assert places != before, "nothing can go on"
    return 1 - 3 * held * micro_batches / max(clocks)


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(
    "name", ["GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"]
)
def test_is_what_the_schedule_leaves_idle(name, stages):
    tried = 0
    for micro_batches in range(1, 25):
        try:
            share = idle_share(name, stages, micro_batches)
        except ValueError:
            continue  # PyTorch does not take so many
        tried += 1
        assert bubble_share(name, stages, micro_batches) == pytest.approx(share, abs=1e-12), micro_batches
    assert tried > 4
