"""The memory of a real training step, counted on fake tensors: the libraries' own code, no GPU, no values.

It does on purpose by other means what `qlora_helpers.memory.fake` does: torch's `FakeTensorMode`, which checks devices and
dtypes as real kernels do, torch's own autocast for the CPU, all layers, and a plain count of bytes. So each can be held
against the other, and the layers that are written out against both.

transformers, PEFT, a stand-in for bitsandbytes' layer, autograd, checkpointing and TRL's fused output head run as they do
on a GPU, on tensors that have a shape and a dtype and no memory. Every storage that is made is counted, rounded up to 512
bytes, until it is freed. Where a CUDA build differs from this machine's, it is imitated, with the reason given below.
"""

import inspect
import weakref
from contextlib import contextmanager

import bitsandbytes
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers import AutoConfig, AutoModelForCausalLM, masking_utils
from trl.kernels import chunked_logprob
from trl.trainer import utils as trl_utils

import qlora_helpers  # noqa: F401  before bitsandbytes: it quietens the libraries
from qlora_helpers.memory.tape import rounded


class Ledger(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.live = self.peak = 0

    def _free(self, key: int) -> None:
        self.live -= self.sizes.pop(key, 0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_flatten(result)[0]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = size = rounded(storage.nbytes())
                    self.live += size
                    weakref.finalize(storage, self._free, storage._cdata)
        self.peak = max(self.peak, self.live + self._inside(str(function), args))
        return result

    @staticmethod
    def _inside(name: str, args: tuple) -> int:
        """What a CUDA kernel takes internally, which no operation shows."""
        if (
            "flash_attention_backward" in name
        ):  # aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp, mha_bwd
            query, key = args[1], args[2]
            batch, heads, tokens, head = query.shape
            rows = batch * heads * (-(-tokens // 128) * 128)
            taken = rounded(rows * 4) + rounded(rows * (-(-head // 32) * 32) * 4)
            return taken + (2 * rounded(query.numel() * query.element_size()) if key.shape[1] != heads else 0)
        if "_softmax_backward_data" in name:  # softmax_backward_cuda_out: grad * output
            return rounded(args[1].numel() * args[1].element_size())
        return 0


class _Product4bit(torch.autograd.Function):
    """bitsandbytes' MatMul4Bit on a GPU: dequantise (scales first), multiply; and again in the backward pass."""

    @staticmethod
    def _weight(layer, dtype):
        scales = torch.empty(-(-layer.in_features * layer.out_features // 64)) if layer.double_quant else None
        weight = torch.empty(layer.out_features, layer.in_features, dtype=dtype)
        del scales
        return weight

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return F.linear(x, _Product4bit._weight(layer, x.dtype), layer.bias)

    @staticmethod
    def backward(ctx, gradient):
        return torch.matmul(gradient, _Product4bit._weight(ctx.layer, gradient.dtype)), None


class _Fake4bit(bitsandbytes.nn.Linear4bit):
    """A 4-bit layer as PEFT sees it; its packed weight has the right number of bytes."""

    def __init__(self, linear: torch.nn.Linear, dtype: torch.dtype, double_quant: bool):
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.compute_dtype, self.double_quant = dtype, double_quant
        weights = self.in_features * self.out_features
        self.weight = torch.nn.Parameter(torch.empty(weights // 2, 1, dtype=torch.uint8), requires_grad=False)
        self.weight.compress_statistics, self.weight.quant_type = double_quant, "nf4"
        self.bias = linear.bias

    def forward(self, x):
        return _Product4bit.apply(x.to(self.compute_dtype), self).to(x.dtype)


class _Pick(torch.autograd.Function):
    """`hidden_states[mask]` with every token scored: on a GPU a copy, and zeros to write its gradient into."""

    @staticmethod
    def forward(ctx, hidden):
        ctx.shape = hidden.shape
        return torch.empty(hidden.shape[0] * hidden.shape[1], hidden.shape[2], dtype=hidden.dtype)

    @staticmethod
    def backward(ctx, gradient):
        return torch.zeros(ctx.shape, dtype=gradient.dtype)


def _fused_head():
    """TRL's `add_fused_lm_head`, whose tiles are folded by a Triton kernel on a GPU and so take nothing besides the tile."""
    source = inspect.getsource(trl_utils.add_fused_lm_head)
    picks = "hidden_states[mask] if compact else hidden_states.reshape(-1, hidden_states.size(-1))"
    assert picks in source, "TRL's fused head has changed: look at what it does with the masked tokens"
    space = dict(vars(trl_utils), _pick=_Pick.apply)
    exec(source.replace(picks, "_pick(hidden_states)"), space)
    return space["add_fused_lm_head"]


@contextmanager
def _as_on_a_gpu(kernel: str):
    """CPU kernels and CPU autocast replaced by what a GPU does."""
    softmax, layer_norm, power = F.softmax, F.layer_norm, torch.pow
    on = torch.is_autocast_enabled

    def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if on("cpu"):
            q, k, v = (t.to(torch.get_autocast_dtype("cpu")) for t in (q, k, v))
        if kernel == "math":
            groups = q.shape[1] // k.shape[1]
            k, v = (t.repeat_interleave(groups, -3) if groups > 1 else t for t in (k, v))
            with torch.autocast("cpu", enabled=False):
                return torch.ops.aten._scaled_dot_product_attention_math(
                    q, k, v, None, dropout_p, is_causal, scale=scale
                )[0]
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]

    def softmax_in_float32(x, dim=None, _stacklevel=3, dtype=None):
        return softmax(x.float() if dtype or on("cpu") else x, dim)

    def layer_norm_in_float32(x, shape, weight=None, bias=None, eps=1e-5):
        if not on("cpu"):
            return layer_norm(x, shape, weight, bias, eps)
        with torch.autocast("cpu", enabled=False):
            return layer_norm(x.float(), shape, weight.float(), bias.float(), eps)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", attention)
        patch.setattr(
            F,
            "dropout",
            lambda x, p=0.5, training=True, inplace=False: (
                torch.native_dropout(x, p, training)[0] if training and p else x
            ),
        )
        # CUDA's autocast runs these three in float32, the CPU's does not
        patch.setattr(F, "softmax", softmax_in_float32)
        patch.setattr(F, "layer_norm", layer_norm_in_float32)
        patch.setattr(torch, "pow", lambda x, exponent: power(x.float() if on("cpu") else x, exponent))
        # PEFT asks whether CUDA's autocast is on
        patch.setattr(torch, "is_autocast_enabled", lambda device="cpu": on("cpu"))
        patch.setattr(chunked_logprob, "_forward_tile", lambda *args, **kwargs: None)
        patch.setattr(chunked_logprob, "_backward_tile", lambda *args, **kwargs: None)
        patch.setattr(chunked_logprob, "_addmm_fp32", lambda *args: None)
        # a full batch needs no mask; transformers cannot see that in a tensor without values
        patch.setitem(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "sdpa", lambda *args, **kwargs: None)
        yield


def _on_meta(config: dict, run):
    dtype = getattr(torch, run.compute_dtype)
    options = {key: value for key, value in config.items() if key != "model_type"}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(config["model_type"], **options),
        dtype=dtype,
        attn_implementation="eager" if run.attention == "eager" else "sdpa",
    )
    if run.method == "qlora":
        for name, layer in list(model.named_modules()):
            if isinstance(layer, torch.nn.Linear) and layer is not model.get_output_embeddings():
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, _Fake4bit(layer, dtype, run.double_quant))
        model.is_loaded_in_4bit = True
    for parameter in model.parameters():
        parameter.requires_grad = run.method == "full"
    model.tie_weights()
    model.config.use_cache = False
    _fused_head()(model, outputs=("log_probs", "entropy", "is_top1"))
    if run.upcast_fp32:
        for parameter in model.parameters():
            if parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.float()
    if run.method != "full":
        lora = LoraConfig(
            r=run.rank,
            lora_dropout=run.dropout,
            target_modules=run.target_modules if isinstance(run.target_modules, str) else list(run.target_modules),
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, lora, autocast_adapter_dtype=False, low_cpu_mem_usage=True)
    if run.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if run.method != "full":
            model.enable_input_require_grads()
    return model


def _made_real(model, adapter_dtype: torch.dtype) -> None:
    """Give every parameter and buffer a storage, once."""
    made = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                adapter = parameter.requires_grad and adapter_dtype is not None
                dtype = adapter_dtype if adapter else parameter.dtype
                new = torch.nn.Parameter(
                    torch.empty(parameter.shape, dtype=dtype), requires_grad=parameter.requires_grad
                )
                made[id(parameter)] = new, parameter
            module._parameters[name] = made[id(parameter)][0]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def transient_peak(config: dict, run) -> int:
    """The most bytes that one forward and backward pass takes besides the model and its adapters.

    Args:
        config: as `AutoConfig.for_model` takes it.
        run: a `Settings` with attention "sdpa" (FlashAttention), "math" or "eager".
    """
    ledger = Ledger()
    dtype = getattr(torch, run.compute_dtype)
    with _as_on_a_gpu(run.attention):
        with torch.device("meta"):
            model = _on_meta(config, run)
        with FakeTensorMode(allow_non_fake_inputs=True), ledger:
            _made_real(model, getattr(torch, run.adapter_dtype) if run.method != "full" else None)
            model.train()
            ids = torch.ones(run.batch_size, run.max_length, dtype=torch.long)
            standing = ledger.peak = ledger.live
            with torch.autocast("cpu", dtype=dtype):
                loss = model(input_ids=ids, labels=ids, fused_lm_head=True).loss
            loss.backward()
    return ledger.peak - standing
