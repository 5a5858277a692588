"""torch's allocator on a GPU beside its simulation (`qlora_helpers.memory.allocator`), event by event.

    python -m data.scripts.measure.allocator --out FILE      # needs a GPU; under a minute, writes nothing else

Random traces are performed with `torch.empty` and `del`, and torch is asked after each event what it has allocated and
reserved. The simulator gets the same trace. One more trace is what torch's own history recorded of four training steps
of a small transformer. Each of SETTINGS runs in its own process, since torch reads them when it starts.

A row of the table is one trace:
    settings, trace, events, failed      the last: requests for which there was no memory
    segments, ascending                  segments taken from the card, and how many of them lie above all earlier ones
    peak_reserved_bytes                  torch's
    agreement                            by where the simulator takes new segments to lie: each above the last
                                         ("ascending"), each below ("descending", what it does by default), or where
                                         the driver really put them ("real": whatever differs then is a wrong rule)
        reserved, allocated, failed      share of events after which the simulator says what torch says
        largest_difference_bytes         of the reserved bytes, after any event
        peak_difference_bytes            of the peaks: simulated less torch's
        first_difference                 the number of the event; null if there is none
    differing_events                     the trace up to where "real" differs, and null if it does not
    streams, history_is_complete         of the history: on how many streams it allocates (the simulator knows one), and
                                         whether it adds up to what torch has reserved at its end
"""

import argparse
import gc
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path

from qlora_helpers.memory.allocator import CachingAllocator, replay
from qlora_helpers.units import GIB, KIB, MIB

# What torch is told, and what the simulator is.
SETTINGS = {
    "default": ("", {}),
    "max_split_size": ("max_split_size_mb:64", {"max_split_size": 64 * MIB}),
    "expandable_segments": ("expandable_segments:True", {"expandable_segments": True}),
}
EVENTS, LIVE, LIMIT = 4_000, 10 * GIB, 4 * GIB
EMPTY = None  # an event: torch.cuda.empty_cache()
Trace = list[int | None]  # a size of 0 or more allocates, ~n frees the trace's allocation number n
Held = tuple[int | None, int, bool]  # after an event: allocated (None: not known), reserved, whether the request failed


# ---------------------------------------------------------------- traces


class Draw:
    """A trace as it is drawn, and what it holds."""

    def __init__(self, seed: int) -> None:
        self.random, self.trace, self.sizes = random.Random(seed), [], []
        self.live, self.live_bytes = set(), 0

    def size(self, least: int = KIB, most: int = 300 * MIB) -> int:
        return int(least * (most / least) ** self.random.random())

    def allocate(self, size: int) -> int:
        number = len(self.sizes)
        self.trace.append(size)
        self.sizes.append(size)
        self.live.add(number)
        self.live_bytes += size
        return number

    def free(self, number: int) -> None:
        self.trace.append(~number)
        self.live.remove(number)
        self.live_bytes -= self.sizes[number]


def mixed_trace(seed: int, events: int = EVENTS, most: int = LIVE, empties: bool = False) -> Trace:
    """Sizes from 1 KiB to 300 MiB, freed in any order."""
    draw = Draw(seed)
    while len(draw.trace) < events:
        if draw.live and (draw.live_bytes > most or draw.random.random() < 0.48):
            draw.free(draw.random.choice(sorted(draw.live)))
        elif empties and draw.random.random() < 0.01:
            draw.trace.append(EMPTY)
        else:
            draw.allocate(draw.size())
    return draw.trace


def training_trace(seed: int, events: int = EVENTS, most: int = LIVE) -> Trace:
    """Weights that stay; then steps of other lengths: activations that are freed in reverse, temporaries in between."""
    draw = Draw(seed)
    layers, weights = draw.random.randint(8, 24), [draw.size(64 * KIB, 40 * MIB) for _ in range(5)]
    for _ in range(layers):
        for size in weights:
            draw.allocate(size)
    per_token = [draw.size(256, 64 * KIB) for _ in range(6)]
    state = False
    while len(draw.trace) < events:
        tokens, kept = draw.random.choice((512, 700, 1_024, 2_048, 3_000)), []
        for _ in range(layers):
            for bytes_of_one in per_token:
                temporary = draw.allocate(2 * bytes_of_one * tokens)
                kept.append(draw.allocate(bytes_of_one * tokens))
                draw.free(temporary)
                if draw.live_bytes > most:
                    draw.free(kept.pop(0))
        gradients = []
        for number in reversed(kept):
            temporary = draw.allocate(draw.sizes[number])
            if draw.random.random() < 0.4:
                gradients.append(draw.allocate(draw.random.choice(weights) // 8))
            draw.free(number)
            draw.free(temporary)
        if not state:
            for size in weights * layers:
                draw.allocate(size // 4)
            state = True
        for number in gradients:
            draw.free(number)
    return draw.trace


# ---------------------------------------------------------------- who performs a trace


class Gpu:
    """torch, which holds a tensor for each allocation."""

    def __init__(self) -> None:
        import torch

        self.torch, self.tensors = torch, {}

    def allocate(self, number: int, size: int) -> bool:
        try:
            self.tensors[number] = self.torch.empty(size, dtype=self.torch.uint8, device="cuda")
        except self.torch.cuda.OutOfMemoryError:
            return False
        return True

    def free(self, number: int) -> None:
        del self.tensors[number]

    def empty_cache(self) -> None:
        self.torch.cuda.empty_cache()

    def held(self) -> tuple[int, int]:
        stats = self.torch.cuda.memory_stats_as_nested_dict()
        return tuple(stats[name]["all"]["current"] for name in ("allocated_bytes", "reserved_bytes"))


class Simulated:
    """The simulator."""

    def __init__(self, allocator: CachingAllocator) -> None:
        self.allocator, self.handles = allocator, {}

    def allocate(self, number: int, size: int) -> bool:
        try:
            self.handles[number] = self.allocator.allocate(size)
        except MemoryError:
            return False
        return True

    def free(self, number: int) -> None:
        self.allocator.free(self.handles.pop(number))

    def empty_cache(self) -> None:
        self.allocator.empty_cache()

    def held(self) -> tuple[int, int]:
        return self.allocator.allocated, self.allocator.reserved


def perform(trace: Trace, card: Gpu | Simulated) -> list[Held]:
    """What is held after each event. What could not be allocated is not freed."""
    after, number, failed = [], 0, set()
    for event in trace:
        fails = False
        if event is EMPTY:
            card.empty_cache()
        elif event >= 0:
            fails = not card.allocate(number, event)
            if fails:
                failed.add(number)
            number += 1
        elif ~event not in failed:
            card.free(~event)
        after.append((*card.held(), fails))
    return after


# ---------------------------------------------------------------- the comparison


def addresses(real: Sequence[int]) -> dict[str, Iterator[int] | None]:
    return {"ascending": count(0, 2**33), "descending": None, "real": iter(real)}


def compared(real: Sequence[Held], simulated: Sequence[Held]) -> dict:
    same = [[a in (None, b) for a, b in zip(*held, strict=True)] for held in zip(real, simulated, strict=True)]
    allocated, reserved, failed = (sum(column) / len(same) for column in zip(*same, strict=True))
    differences = [ours[1] - theirs[1] for theirs, ours in zip(real, simulated, strict=True)]
    return {
        "reserved": reserved,
        "allocated": None if real[0][0] is None else allocated,
        "failed": failed,
        "largest_difference_bytes": max(differences, key=abs),
        "peak_difference_bytes": max(held[1] for held in simulated) - max(held[1] for held in real),
        "first_difference": next((at for at, event in enumerate(same) if not all(event)), None),
    }


def row(
    settings: str, name: str, trace: Trace, real: Sequence[Held], segments: Sequence[int], limit: int | None
) -> dict:
    """The simulator's figures beside torch's, for one trace."""
    agreement = {}
    for way, where in addresses(segments).items():
        allocator = CachingAllocator(limit=limit, addresses=where, **SETTINGS[settings][1])
        try:
            agreement[way] = compared(real, perform(trace, Simulated(allocator)))
        except StopIteration:
            agreement[way] = {"error": "the simulator asks the card for more segments than torch did"}
    differs = agreement["real"].get("first_difference", len(trace) - 1)
    return {
        "settings": settings,
        "trace": name,
        "events": len(trace),
        "failed": sum(held[2] for held in real),
        "segments": len(segments),
        "ascending": sum(all(address > earlier for earlier in segments[:at]) for at, address in enumerate(segments)),
        "peak_reserved_bytes": max(held[1] for held in real),
        "agreement": agreement,
        "differing_events": None if differs is None else trace[: differs + 1],
    }


# ---------------------------------------------------------------- torch's history


class History:
    """What torch's allocator recorded while this was open."""

    def __enter__(self) -> "History":
        import torch

        torch.cuda.init()
        torch.cuda.memory._record_memory_history("all", context=None, max_entries=2_000_000)
        return self

    def __exit__(self, *_: object) -> None:
        import torch

        self.entries = torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]
        torch.cuda.memory._record_memory_history(None)

    @property
    def segments(self) -> list[int]:
        return [entry["addr"] for entry in self.entries if entry["action"] == "segment_alloc"]


def from_history(entries: Iterable[dict]) -> tuple[Trace, list[Held]]:
    """A trace and what torch had reserved after each of its events, from a history that begins with empty pools.

    What torch had allocated is not in the history.
    """
    trace, real, numbers, reserved, allocations = [], [], {}, 0, 0
    for entry in entries:
        action, address, size = entry["action"], entry.get("addr"), entry["size"]
        if action in ("segment_alloc", "segment_map"):
            reserved += size
        elif action in ("segment_free", "segment_unmap"):
            reserved -= size
        elif action == "alloc":
            numbers[address] = allocations
            allocations += 1
            trace.append(size)
            real.append((None, reserved, False))
        elif action == "free_completed":
            trace.append(~numbers.pop(address))
            real.append((None, reserved, False))
    return trace, real


def train(
    lengths: Sequence[int] = (512, 900, 300, 1_100), width: int = 1_024, layers: int = 6, device: str = "cuda"
) -> None:
    """Training steps of a small transformer in bfloat16, on chats of these many tokens."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(width, width // 64, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
    model = nn.Sequential(nn.Embedding(32_000, width), encoder, nn.Linear(width, 32_000, bias=False))
    model = model.to(device, torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters())
    for length in lengths:
        tokens = torch.randint(0, 32_000, (4, length), device=device)
        logits = model(tokens[:, :-1])
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


# ---------------------------------------------------------------- one process


def plan(settings: str) -> Iterator[tuple[str, Trace, int | None]]:
    """The random traces of these settings: a name, the trace, and torch's limit."""
    seeds = range(4 if settings == "default" else 2)
    for seed in seeds:
        yield f"mixed {seed}", mixed_trace(seed), None
        yield f"training {seed}", training_trace(100 + seed), None
        yield f"mixed, cache emptied {seed}", mixed_trace(200 + seed, empties=True), None
        # torch's limit counts the whole of an expandable segment's next block, and the simulator's counts pages
        if settings != "expandable_segments":
            yield f"mixed, with a limit {seed}", mixed_trace(300 + seed, most=2 * LIMIT), LIMIT
            trace = training_trace(400 + seed)
            yield f"training, with a limit {seed}", trace, int(0.95 * replay(trace).peak_allocated)


def measured(settings: str) -> list[dict]:
    """The rows of these settings, in this process, which must have been started with them."""
    import torch

    total, rows = torch.cuda.get_device_properties(0).total_memory, []
    for name, trace, limit in plan(settings):
        gc.collect()
        torch.cuda.empty_cache()
        if torch.cuda.memory_reserved():
            raise RuntimeError(f"{torch.cuda.memory_reserved()} bytes are still reserved before {name!r}")
        fraction = 1.0 if limit is None else limit / total
        torch.cuda.set_per_process_memory_fraction(fraction)
        card = Gpu()
        with History() as history:
            real = perform(trace, card)
        del card
        rows.append(row(settings, name, trace, real, history.segments, limit and int(fraction * total)))
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.0)
    with History() as history:
        train()
        reserved = torch.cuda.memory_reserved()
    trace, real = from_history(history.entries)
    rows.append(row(settings, "steps of a transformer", trace, real, history.segments, None))
    rows[-1]["history_is_complete"] = real[-1][1] == reserved
    rows[-1]["streams"] = len({entry["stream"] for entry in history.entries if entry["action"] == "alloc"})
    return rows


def _in_a_process(settings: str) -> list[dict]:
    option = SETTINGS[settings][0]
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")}
    if option:  # the second is the name that older versions know
        environment |= {"PYTORCH_ALLOC_CONF": option, "PYTORCH_CUDA_ALLOC_CONF": option}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "data.scripts.measure.allocator", "--settings", settings, "--out", str(out)]
        subprocess.run(command, env=environment, check=True)
        return json.loads(out.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", required=True, type=Path, help="where the table is written")
    parser.add_argument(
        "--settings", choices=SETTINGS, help="only these, in this process: what the script calls itself"
    )
    args = parser.parse_args()
    if args.settings:
        args.out.write_text(json.dumps(measured(args.settings)), encoding="utf-8")
        return
    import torch

    start, rows = time.perf_counter(), []
    for settings in SETTINGS:
        rows += _in_a_process(settings)
    table = {
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "seconds": round(time.perf_counter() - start, 1),
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(table, indent=1), encoding="utf-8")
    for line in rows:
        shares = ", ".join(f"{way} {found.get('reserved', 0):.2%}" for way, found in line["agreement"].items())
        print(f"{line['settings']}, {line['trace']}: {line['events']} events; reserved agrees: {shares}")


if __name__ == "__main__":
    main()
