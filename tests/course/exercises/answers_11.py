"""Answers to the exercises of lesson 11."""

import bisect

import torch

from qlora_helpers.training.packing import PackingCollator, rows_for
from tests.course.exercises.tried import Tried
from tests.course.provoke import random_llama

# ---- 11.1


def of(a, b, c, d):
    return dict(zip("ABCD", (a, b, c, d), strict=True))


# ---- 11.2


def best_fit(lengths, most):
    rows, left = [], []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        fitting = [row for row, room in enumerate(left) if room >= lengths[place]]
        if not fitting:
            rows.append([])
            left.append(most)
        row = min(fitting, key=lambda row: left[row], default=len(rows) - 1)
        rows[row].append(place)
        left[row] -= lengths[place]
    return rows


def first_fit(lengths, most):
    rows = []
    for length, place in sorted(((length, place) for place, length in enumerate(lengths)), reverse=True):
        for row in rows:
            if sum(lengths[other] for other in row) + length <= most:
                row.append(place)
                break
        else:
            rows.append([place])
    return rows


def worst_fit_of_few(lengths, most):
    """As the course does it: the number of rows first, and then evenly."""
    return rows_for(lengths, most)


def as_tuples(lengths, most):
    return tuple(tuple(row) for row in best_fit(lengths, most)[::-1])


def as_tensors(lengths, most):
    return [torch.tensor(row) for row in first_fit(lengths, most)]


def by_bisection(lengths, most):
    rows, left = [], []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        at = bisect.bisect_left(left, (lengths[place], -1))
        room, row = left.pop(at) if at < len(left) else (most, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(place)
        bisect.insort(left, (room - lengths[place], row))
    return rows


def in_their_order(lengths, most):
    rows, room = [], 0
    for place, length in enumerate(lengths):
        if length > room:
            rows.append([])
            room = most
        rows[-1].append(place)
        room -= length
    return rows


def first_fit_unsorted(lengths, most):
    rows = []
    for place, length in enumerate(lengths):
        for row in rows:
            if sum(lengths[other] for other in row) + length <= most:
                row.append(place)
                break
        else:
            rows.append([place])
    return rows


def the_shortest_first(lengths, most):
    order = sorted(range(len(lengths)), key=lambda place: lengths[place])
    return [[order[at] for at in row] for row in first_fit_unsorted([lengths[place] for place in order], most)]


def one_each(lengths, most):
    return [[place] for place in range(len(lengths))]


def all_in_one(lengths, most):
    return [list(range(len(lengths)))]


def the_lengths(lengths, most):
    return [[lengths[place] for place in row] for row in best_fit(lengths, most)]


def places_in_the_sorted_list(lengths, most):
    return best_fit(sorted(lengths, reverse=True), most)


def sorted_in_place(lengths, most):
    lengths.sort(reverse=True)
    return best_fit(lengths, most)


def with_an_empty_row(lengths, most):
    return [*best_fit(lengths, most), []]


def the_last_is_lost(lengths, most):
    return best_fit(lengths[:-1], most) or [[]]


def one_token_too_many(lengths, most):
    return best_fit(lengths, most + 1)


def filled_to_one_less(lengths, most):
    """With `<` for `<=`: a row is never quite full."""
    rows = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        for row in rows:
            if sum(lengths[other] for other in row) + lengths[place] < most:
                row.append(place)
                break
        else:
            rows.append([place])
    return rows


# ---- 11.3

torch.manual_seed(0)
MODEL = random_llama(num_hidden_layers=2).eval()
CHATS = [torch.randint(1, 1216, (length,)).tolist() for length in (12, 9, 14, 10, 8)]
GIVEN = {"model": MODEL, "chats": CHATS}


def row(ids, positions, labels, **more):
    return {"input_ids": ids[None], "position_ids": positions[None], "labels": labels[None], **more}


def joined(chats):
    return torch.tensor([token for chat in chats for token in chat])


def by_positions(chats):
    ids, positions = joined(chats), torch.cat([torch.arange(len(chat)) for chat in chats])
    return row(ids, positions, ids.masked_fill(positions == 0, -100))


def with_lists(chats):
    positions = [place for chat in chats for place in range(len(chat))]
    labels = [token if place else -100 for chat in chats for place, token in enumerate(chat)]
    return row(joined(chats), torch.tensor(positions), torch.tensor(labels))


def the_first_counts(chats):
    """Nothing predicts the first token of a row, so its label does not matter."""
    batch = with_lists(chats)
    batch["labels"][0, 0] = batch["input_ids"][0, 0]
    return batch


def as_the_course(chats):
    total = sum(map(len, chats))
    batch = PackingCollator(0, total)([{"input_ids": chat} for chat in chats])
    assert batch["input_ids"].shape == (1, total)
    # the course sorts the chats of a row by their length; here they stay in order
    return by_positions(chats)


def by_a_loop(chats):
    ids, positions, labels = [], [], []
    for chat in chats:
        ids.extend(chat)
        positions.extend(range(len(chat)))
        labels.extend([-100, *chat[1:]])
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "labels": torch.tensor([labels]),
    }


def as_it_was(chats):
    ids = joined(chats)
    return row(ids, torch.arange(len(ids)), ids)


def positions_alone(chats):
    ids, positions = joined(chats), torch.cat([torch.arange(len(chat)) for chat in chats])
    return row(ids, positions, ids)


def labels_alone(chats):
    ids = joined(chats)
    return row(ids, torch.arange(len(ids)), by_positions(chats)["labels"][0])


def with_a_mask(chats):
    batch = by_positions(chats)
    return batch | {"attention_mask": torch.ones_like(batch["input_ids"])}


def from_one(chats):
    """Beginnings are seen wherever positions do not go on, and only their differences count."""
    batch = by_positions(chats)
    return batch | {"position_ids": batch["position_ids"] + 1}


def the_chats_number(chats):
    numbers = torch.cat([torch.full((len(chat),), place) for place, chat in enumerate(chats)])
    return by_positions(chats) | {"position_ids": numbers[None]}


def nothing_counts(chats):
    batch = by_positions(chats)
    return batch | {"labels": torch.full_like(batch["labels"], -100)}


def the_first_chat_alone(chats):
    return by_positions(chats[:1])


def shifted(chats):
    batch = by_positions(chats)
    return batch | {"labels": batch["labels"].roll(-1, dims=1)}


RIGHT = {
    "faster": [
        Tried(of("larger passes", "packing", "nothing", "fewer checkpointed layers")),
        Tried(of("Larger Passes", "PACKING", "Nothing", "Fewer checkpointed layers")),
        Tried(of("larger-passes", "packing", "none", "fewer_checkpointed_layers")),
        Tried(of("more chats at once", "pack", "none of these", "checkpoint fewer layers")),
        Tried(of(" larger passes", "packing ", "nothing", "fewer layers")),
    ],
    "packer": [
        Tried(function)
        for function in (best_fit, first_fit, worst_fit_of_few, as_tuples, as_tensors, by_bisection)
    ],
    "repacked": [
        Tried(function, **GIVEN)
        for function in (by_positions, with_lists, the_first_counts, as_the_course, by_a_loop, from_one)
    ],
}  # fmt: skip

WRONG = {
    "faster": [
        Tried(of("compiling", "packing", "nothing", "fewer checkpointed layers"), says="run A"),
        Tried(of("larger passes", "larger passes", "nothing", "fewer checkpointed layers"), says="run B"),
        Tried(of("larger passes", "packing", "compiling", "fewer checkpointed layers"), says="run C"),
        Tried(of("larger passes", "packing", "nothing", "larger passes"), says="run D"),
        Tried(of("a faster GPU", "packing", "nothing", "nothing"), says="run A"),
        Tried("packing", says="a dictionary is needed"),
        Tried({"A": "larger passes"}, says="no change for B, C, D"),
    ],
    "packer": [
        Tried(in_their_order, says="fewer would do"),
        Tried(first_fit_unsorted, says="fewer would do"),
        Tried(the_shortest_first, says="fewer would do"),
        Tried(one_each, says="fewer would do"),
        Tried(all_in_one, says="tokens, where"),
        Tried(the_lengths, says="not lengths"),
        Tried(places_in_the_sorted_list, says="in the case"),
        Tried(sorted_in_place, says="changes the list"),
        Tried(with_an_empty_row, says="an empty row"),
        Tried(the_last_is_lost, says="into no row"),
        Tried(one_token_too_many, says="tokens, where"),
        Tried(filled_to_one_less, says="fewer would do"),
        Tried([[0, 1]], says="a function is needed"),
    ],
    "repacked": [
        Tried(as_it_was, says="the last token of a chat", **GIVEN),
        Tried(positions_alone, says="the last token of a chat", **GIVEN),
        Tried(labels_alone, says="not alone in it", **GIVEN),
        Tried(with_a_mask, says="not alone in it", **GIVEN),
        Tried(the_chats_number, says="not alone in it", **GIVEN),
        Tried(nothing_counts, says="should count", **GIVEN),
        Tried(the_first_chat_alone, says="not all tokens", **GIVEN),
        Tried(shifted, says="neither its token", **GIVEN),
        Tried(lambda chats: joined(chats), says="a dictionary", **GIVEN),
        Tried(3, says="a function is needed", **GIVEN),
    ],
}
