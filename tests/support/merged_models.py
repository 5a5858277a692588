"""The shipped adapter merged into each base, once for all tests of a process; none of them changes the models."""

from functools import cache

from qlora_helpers.adapters.files import load_adapter
from qlora_helpers.adapters.merge import BASES, merge
from qlora_helpers.models.loading import load_model
from qlora_helpers.models.weights import linear_layers
from qlora_helpers.paths import data_path
from tests.support.short_runs import CPU

SHIPPED, BASE = data_path("adapters", "sentences"), data_path("tiny-llama")


def weights(model):
    return {name: layer.weight.detach() for name, layer in linear_layers(model)}


@cache
def merged_models():
    """The unmerged model, and the merged one of each way."""
    merged = {into: merge(SHIPPED, into, hardware=CPU) for into in BASES}
    return {"unmerged": load_adapter(load_model(hardware=CPU), SHIPPED)} | merged
