"""One of several processes makes a step with the libraries' own FSDP2, on a CPU, with made-up neighbours: what it holds and gathers.

`python -m tests.memory.fsdp_step GPUS` prints JSON. torch's "fake" process group answers every collective at once and
copies nothing, so that the numbers in the tensors mean nothing, and their sizes are those of a real run. The units are those
of accelerate's `fsdp2_prepare_model`: each decoder layer, the embeddings, the output head, the rest.
"""

import json
import sys
import weakref
from collections import Counter

import bitsandbytes as bnb
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_collectives, _fsdp_param, _fsdp_param_group
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForCausalLM

CONFIG = {
    "model_type": "llama", "vocab_size": 640, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip
RANK, TOKENS = 4, 16
HALF = torch.bfloat16


def model_in_4_bits():
    """A model with adapters, as the course makes it, except that its 4-bit weights lie in bfloat16 storage."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIG), dtype=HALF)
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    setattr(parent, name, _in_4_bits(linear))
    model.requires_grad_(False)
    model.is_loaded_in_4bit = True
    model = get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear", lora_dropout=0.0))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def _in_4_bits(linear):
    new = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=HALF, quant_type="nf4", quant_storage=HALF
    )
    new.weight = bnb.nn.Params4bit(
        linear.weight.data, requires_grad=False, quant_type="nf4", quant_storage=HALF, module=new
    ).to("cpu")
    return new


class Watch:
    """What is whole at the moment, in bytes: buffers of all-gathers, and weights; and the most since it was last asked."""

    def __init__(self) -> None:
        self.buffers = self.weights = 0
        self.most = (0, 0, 0)  # together, weights, buffers
        self.gathered: list[int] = []
        mixin, module = _fsdp_collectives.DefaultAllocMixin, _fsdp_param
        allocate, alloc, free = mixin.allocate, module.alloc_storage, module.free_storage

        def allocate_and_watch(comm, size, *, dtype, device):
            made = allocate(comm, size, dtype=dtype, device=device)
            if isinstance(comm, _fsdp_collectives.DefaultAllGather):
                self._change("buffers", made.nbytes)
                self.gathered.append(made.nbytes)
                weakref.finalize(made, self._change, "buffers", -made.nbytes)
            return made

        def alloc_and_watch(tensor):
            before = tensor.untyped_storage().nbytes()
            alloc(tensor)
            self._change("weights", tensor.untyped_storage().nbytes() - before)

        def free_and_watch(tensor):
            before = tensor.untyped_storage().nbytes()
            free(tensor)
            self._change("weights", tensor.untyped_storage().nbytes() - before)

        mixin.allocate, module.free_storage = allocate_and_watch, free_and_watch
        module.alloc_storage = _fsdp_param_group.alloc_storage = alloc_and_watch

    def _change(self, kind: str, size: int) -> None:
        setattr(self, kind, getattr(self, kind) + size)
        self.most = max(self.most, (self.buffers + self.weights, self.weights, self.buffers))

    def forget(self) -> None:
        self.buffers = self.weights = 0
        self.gathered.clear()
        self.since()

    def since(self) -> dict[str, int]:
        found, self.most = self.most, (self.buffers + self.weights, self.weights, self.buffers)
        return dict(zip(("together", "weights", "buffers"), found, strict=True))


def main(gpus: int) -> dict:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=gpus)
    model, watch = model_in_4_bits(), Watch()
    how = {
        "mesh": init_device_mesh("cpu", (gpus,)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=HALF, reduce_dtype=HALF),
    }
    layers = model.base_model.model.model.layers
    for layer in layers:
        fully_shard(layer, **how)
    fully_shard(model.get_input_embeddings(), **how)
    fully_shard([model.get_output_embeddings()], **how | {"reshard_after_forward": False})
    fully_shard(model, **how)

    held: Counter = Counter()
    for name, parameter in model.named_parameters():
        kind = "adapters" if "lora_" in name else "4-bit weights" if "proj" in name else "16-bit weights"
        held[kind] += parameter.to_local().nbytes
    linears = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    scales = sum(linear.quant_state.absmax.nbytes for linear in linears)

    moments, causal = {}, model.base_model.model

    def forward(input_ids, **_):
        hidden = causal.model(input_ids=input_ids).last_hidden_state
        moments["forward"] = watch.since()
        head = causal.lm_head.weight.full_tensor()  # as TRL's output head does
        moments["loss"] = watch.since() | {"head": head.nbytes}
        return (hidden @ head.T).float().sum()

    causal.forward = forward
    for _ in range(2):  # the first step makes tensors that the others only fill
        model.zero_grad()
        watch.forget()
        loss = model(input_ids=torch.zeros(1, TOKENS, dtype=torch.long))
        watch.since()
        loss.backward()
        moments["backward"] = watch.since()
    gradients = [p.grad.to_local() for p in model.parameters() if p.grad is not None]
    return {
        "held": held,
        "scales": scales,
        "gathered": watch.gathered,
        "moments": moments,
        "gradients": sum(gradient.nbytes for gradient in gradients),
        "gradient_dtypes": sorted({str(gradient.dtype) for gradient in gradients}),
        "left": watch.weights + watch.buffers,
    }


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]))))
