"""A decoder layer of each known family, written with the tape's sized tensors, as transformers, PEFT and bitsandbytes run it.

Best read side by side with `modeling_llama.py` and its siblings in transformers, `tuners/lora/` in PEFT and
`autograd/_functions.py` in bitsandbytes. `tests/memory/test_layers.py` runs the libraries' own layers on fake tensors and compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass

from qlora_helpers.memory.gpus import GPU
from qlora_helpers.memory.shape import Linear, ModelShape
from qlora_helpers.memory.tape import FLOAT32, Tape, Tensor
from qlora_helpers.settings import BLOCK_SIZES, DTYPES, Settings

__all__ = ["DEQUANTISED", "TILE", "DecoderLayer", "LayerSettings"]

DEQUANTISED, TILE = "dequantised weight", "logits tile"  # kinds of memory that a tape counts separately


@dataclass(frozen=True)
class LayerSettings:
    """What a layer needs to know about a run, made from its `Settings`, the model and the GPU.

    Fields that the method does not use have a fixed value, so that equal layers compare equal.

    Args:
        compute: width in bytes of matrix products: 16-bit, or float32 without autocast.
        stream: width of embeddings, norm weights and the residual stream: 4 if they were made float32.
        wide_norms: LayerNorm gives float32 under autocast, and bitsandbytes' layers return the dtype of their input, so the
            residual stream is float32 from the first layer on.
        adapter: width of LoRA's weights.
        weight: width of linear weights that are not in 4 bits.
        autocast: a mixed-precision context is on.
        float16: products are in float16.
        adapted: names of the layers that have an adapter.
        kernel: "flash", "efficient" (keys and values are repeated for it), "math" or "eager".
        masked: the kernel is given a mask of sequence x sequence elements.
    """

    batch_size: int
    max_length: int
    compute: int
    stream: int
    wide_norms: bool
    adapter: int
    weight: int
    autocast: bool
    float16: bool
    method: str
    double_quant: bool
    block_size: int
    rank: int
    dropout: bool
    adapted: frozenset[str]
    kernel: str
    masked: bool

    @classmethod
    def of(cls, shape: ModelShape, settings: Settings, gpu: GPU) -> LayerSettings:
        """How a run on a GPU runs the layers of a model. The settings' `compute_dtype` must be set."""
        compute = DTYPES[settings.compute_dtype]
        lora, four_bit = settings.method != "full", settings.method == "qlora"
        upcast = settings.upcast_fp32 and lora
        # from the window's length on transformers makes a mask, which FlashAttention does not take (masking_utils.py)
        masked = shape.sliding_window is not None and settings.max_length >= shape.sliding_window
        targets = shape.targets(settings.target_modules) if lora else ()
        return cls(
            batch_size=settings.batch_size,
            max_length=settings.max_length,
            compute=compute,
            stream=FLOAT32 if upcast else compute,
            wide_norms=shape.has_layer_norm and four_bit and settings.compute_dtype != "float32",
            adapter=DTYPES[settings.adapter_dtype] if lora else compute,
            weight=FLOAT32 if upcast and settings.method == "lora" else compute,
            autocast=settings.compute_dtype != "float32",
            float16=settings.compute_dtype == "float16",
            method=settings.method,
            double_quant=four_bit and settings.double_quant,
            block_size=settings.block_size if four_bit else BLOCK_SIZES[0],
            rank=settings.rank if lora else 1,
            dropout=lora and settings.dropout > 0,
            adapted=frozenset(target.name for target in targets),
            kernel=_kernel(shape, settings, gpu, masked),
            masked=masked,
        )

    @property
    def tokens(self) -> int:
        return self.batch_size * self.max_length

    @property
    def between(self) -> int:
        """Bytes of one element of the residual stream between two layers."""
        return FLOAT32 if self.wide_norms else self.stream


def _kernel(shape: ModelShape, settings: Settings, gpu: GPU, masked: bool) -> str:
    """The attention kernel that a run uses."""
    if shape.eager_only:
        return "eager"
    if settings.attention != "sdpa":
        return settings.attention
    if gpu.compute_capability < (8, 0) or masked:
        return "efficient"
    # FlashAttention takes 16 bits only, and the memory-efficient kernel takes no shared key heads
    if settings.compute_dtype == "float32":
        return "math" if shape.num_key_value_heads != shape.num_attention_heads else "efficient"
    return "flash"


class DecoderLayer:
    """One decoder layer on a tape: call it with its input."""

    def __init__(self, shape: ModelShape, how: LayerSettings, tape: Tape) -> None:
        self.shape, self.how, self.tape = shape, how, tape
        self.linears = {linear.name.rsplit(".")[-1]: linear for linear in shape.linears}

    def __call__(self, x: Tensor) -> Tensor:
        if self.shape.model_type == "gptj":
            return self._gptj(x)
        if self.shape.model_type == "gpt_neox":
            return self._gpt_neox(x)
        return self._llama(x)

    # ---- elementwise operations

    def cast(self, x: Tensor, width: int) -> Tensor:
        if x.width == width:
            return x
        new, elements, before = self.tape.new, x.elements, x.width
        return self.tape.apply(elements, width, (x,), lambda g: (new(elements, before),))

    def scale(self, x: Tensor) -> Tensor:
        """Multiply by a constant, or negate: nothing is saved."""
        new, elements, width = self.tape.new, x.elements, x.width
        return self.tape.apply(elements, width, (x,), lambda g: (new(elements, width),))

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        width = max(a.width, b.width)
        new, of_a, of_b, elements = self.tape.new, a.width, b.width, a.elements

        def backward(g):
            return tuple(g if of == width else new(elements, of) for of in (of_a, of_b))

        return self.tape.apply(elements, width, (a, b), backward)

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        """Each factor is saved for the gradient of the other."""
        new, elements, width = self.tape.new, a.elements, a.width
        saved = (a if b.node else None, b if a.node else None)

        def backward(g):
            return tuple(new(elements, width) if other is not None else None for other in reversed(saved))

        return self.tape.apply(elements, width, (a, b), backward)

    def dropout(self, x: Tensor) -> Tensor:
        """Saves its mask, one byte per element."""
        if not self.how.dropout:
            return x
        new, elements, width = self.tape.new, x.elements, x.width
        mask = new(elements, 1)

        def backward(g, mask=mask):
            return (new(elements, width),)

        return self.tape.apply(elements, width, (x,), backward)

    def activation(self, x: Tensor) -> Tensor:
        """SiLU or a fused GELU: saves its input."""
        new, elements, width = self.tape.new, x.elements, x.width
        return self.tape.apply(elements, width, (x,), lambda g, x=x: (new(elements, width),))

    # ---- linear layers

    def product(self, x: Tensor, out: int, weights: int, held: int, trained: bool) -> Tensor:
        """x @ W.T, with a weight held in `held` bytes per element; if the product has another width, the weight is copied.

        The copy is saved for the gradient of x; x itself is saved only for the gradient of a trained weight.
        """
        new, into, width, rows = self.tape.new, x.elements, self.how.compute, self.how.tokens
        copy = new(weights, width) if held != width else None
        saved = (x if trained else None, copy)
        needs = x.node is not None

        def backward(g, saved=saved):
            gradient = new(into, width) if needs else None
            if trained:
                of_weight = new(weights, width)
                if held != width:
                    of_weight = new(weights, held)
                self.tape.keep_weight_gradient(of_weight)
            return (gradient,)

        make = self.tape.with_weights if trained else self.tape.apply
        return make(rows * out, width, (x,), backward)

    def product_4bit(self, x: Tensor, linear: Linear) -> Tensor:
        """bitsandbytes' `MatMul4Bit`: the weight is dequantised in the forward and again in the backward pass; nothing is saved."""
        new, into, width = self.tape.new, x.elements, self.how.compute
        needs = x.node is not None

        def dequantised() -> Tensor:
            scales = new(-(-linear.weights // self.how.block_size), FLOAT32) if self.how.double_quant else None
            weight = new(linear.weights, width, DEQUANTISED)
            del scales
            return weight

        def backward(g):
            if not needs:
                return (None,)
            weight = dequantised()  # held until the product is done
            gradient = new(into, width)
            del weight
            return (gradient,)

        weight = dequantised()
        out = self.tape.apply(self.how.tokens * linear.out_features, width, (x,), backward)
        del weight
        return out

    def base(self, x: Tensor, linear: Linear) -> Tensor:
        how = self.how
        if how.method == "qlora":
            narrow = self.cast(x, how.compute)  # alive until the layer returns
            return self.cast(self.product_4bit(narrow, linear), x.width)
        x = self.cast(x, how.compute) if how.autocast else x
        return self.product(x, linear.out_features, linear.weights, how.weight, trained=how.method == "full")

    def linear(self, x: Tensor, name: str) -> Tensor:
        """A linear layer, with its adapter if it has one."""
        linear, how = self.linears[name], self.how
        result = self.base(x, linear)
        if linear.name not in how.adapted:
            return result
        if how.method == "qlora":
            result = self.scale(result)  # PEFT clones the 4-bit layer's result
        if how.method == "lora" or not how.autocast:
            x = self.cast(x, how.adapter)  # PEFT's LoRA on a 16-bit layer casts its input to the adapter's dtype
        dropped = self.dropout(x)
        narrow = self.cast(dropped, how.compute) if how.autocast else dropped
        low = self.product(narrow, how.rank, how.rank * linear.in_features, how.adapter, trained=True)
        del dropped, narrow
        delta = self.product(low, linear.out_features, how.rank * linear.out_features, how.adapter, trained=True)
        del low
        delta = self.scale(delta)
        out = self.add(result, delta)
        return self.cast(out, result.width)

    # ---- norms

    def rms_norm(self, x: Tensor, row: int) -> Tensor:
        """RMSNorm as in Llama: in float32; its input and the inverse root are saved."""
        new, elements, how = self.tape.new, x.elements, self.how
        before, rows, gemma = x.width, elements // row, self.shape.model_type == "gemma2"
        wide = self.cast(x, FLOAT32)
        # x.pow(2).mean(): one temporary of the input's size
        square = self.tape.apply(elements, FLOAT32, (wide,), lambda g, wide=wide: (new(elements, FLOAT32),))
        root = self.tape.apply(rows, FLOAT32, (square,), lambda g: (new(elements, FLOAT32),))
        del square
        needs = wide.node is not None

        def backward(g, wide=wide, root=root):
            of_x = new(elements, FLOAT32)
            of_root = new(elements, FLOAT32)  # summed to one per row
            of_root = new(rows, FLOAT32)
            return (of_x, of_root) if needs else (None, None)

        normed = self.tape.apply(elements, FLOAT32, (wide, root), backward)
        del wide, root
        width = FLOAT32 if gemma else before
        normed = self.cast(normed, width)
        out = self.weighted(normed, row, max(width, how.stream))
        return self.cast(out, before) if gemma else out

    def weighted(self, x: Tensor, row: int, width: int) -> Tensor:
        """x times the norm's weight; for a trained weight x is kept."""
        new, elements, of_x, trained = self.tape.new, x.elements, x.width, self.how.method == "full"
        saved = x if trained else None

        def backward(g, saved=saved):
            gradient = new(elements, width)
            if trained:
                of_weight = new(elements, width)
                of_weight = new(row, width)
                self.tape.keep_weight_gradient(of_weight)
            return (gradient if of_x == width else new(elements, of_x),)

        make = self.tape.with_weights if trained else self.tape.apply
        return make(elements, width, (x,), backward)

    def layer_norm(self, x: Tensor, row: int) -> Tensor:
        """LayerNorm: under autocast in float32, result included."""
        new, elements, trained = self.tape.new, x.elements, self.how.method == "full"
        wide = self.cast(x, FLOAT32) if self.how.autocast else x
        width = wide.width
        statistics = new(2 * elements // row, FLOAT32)

        def backward(g, saved=(wide, statistics)):
            if trained:
                self.tape.keep_weight_gradient(new(2 * row, self.how.weight))
            return (new(elements, width),)

        make = self.tape.with_weights if trained else self.tape.apply
        return make(elements, width, (wide,), backward)

    # ---- attention

    def rotary(self, x: Tensor, rotated: int | None = None) -> Tensor:
        """x * cos + rotate_half(x) * sin, on so many elements of each head; cos and sin are small and kept once per model."""
        new, elements, width = self.tape.new, x.elements, x.width
        part = elements if rotated is None else elements // self.shape.head_dim * rotated
        needs = x.node is not None
        head = x.view(part)
        cosine = self.scale(head)
        half = new(part // 2, width)
        turned = new(part, width)
        del half

        def back_to_x(g):  # the gradients of the two halves, each written into zeros
            half = new(part // 2, width)
            first = new(part, width)
            second = new(part, width)
            del half, second
            return (first if needs else None,)

        source = self.tape.apply(0, width, (head,), back_to_x)
        turned = Tensor(turned.buffer, part, width, source.node)
        sine = self.scale(turned)
        del turned, source
        out = self.add(cosine, sine)
        if part == elements:
            return out
        del cosine, sine

        def uncat(g):
            return (g.view(part), None)

        return self.tape.apply(elements, width, (out, x), uncat)

    def repeated(self, x: Tensor) -> Tensor:
        """Keys or values, once for each head that shares them."""
        groups = self.shape.num_attention_heads // self.shape.num_key_value_heads
        if groups == 1:
            return x
        new, elements, width = self.tape.new, x.elements, x.width
        return self.tape.apply(elements * groups, width, (x,), lambda g: (new(elements, width),))

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        how = self.how
        if how.kernel == "eager":
            return self._eager(q, self.repeated(k), self.repeated(v))
        if how.autocast:
            q, k, v = (self.cast(x, how.compute) for x in (q, k, v))
        if how.kernel == "math":
            return self._math(q, self.repeated(k), self.repeated(v))
        if how.kernel == "efficient":
            k, v = self.repeated(k), self.repeated(v)
        return self._fused(q, k, v)

    def _fused(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """FlashAttention or the memory-efficient kernel: saves its inputs, its result and one number per query and head."""
        new, width, heads, tokens = self.tape.new, q.width, self.shape.num_attention_heads, self.how.tokens
        of_q, of_k, grouped = q.elements, k.elements, k.elements != q.elements
        flash = self.how.kernel == "flash"
        # FlashAttention's backward pass accumulates in float32, with rows rounded up to 128 and head sizes to 32
        rounded = self.how.batch_size * heads * (-(-self.how.max_length // 128) * 128)
        logsumexp = new(heads * tokens, FLOAT32)
        mask = new(self.how.batch_size * self.how.max_length**2, width) if self.how.masked else None
        out = new(of_q, width)
        needs = any(x.node for x in (q, k, v))

        def backward(g, saved=(q, k, v, out.buffer, logsumexp, mask)):
            gradients = (new(of_q, width), new(of_k, width), new(of_k, width))
            delta = new(rounded if flash else heads * tokens, FLOAT32)
            if flash:
                sums = new(rounded * (-(-self.shape.head_dim // 32) * 32), FLOAT32)
                expanded = (new(of_q, width), new(of_q, width)) if grouped else None
                del sums, expanded
            del delta
            return gradients

        if not needs:
            return out
        result = self.tape.apply(0, width, (q, k, v), backward)
        return Tensor(out.buffer, of_q, width, result.node)

    @property
    def scores(self) -> int:
        """Elements of a layer's attention scores: one for every pair of tokens, in every head."""
        return self.how.batch_size * self.shape.num_attention_heads * self.how.max_length**2

    def matmul(self, a: Tensor, b: Tensor, elements: int) -> Tensor:
        """A product of two activations: each is saved for the other."""
        new, width, of_a, of_b = self.tape.new, a.width, a.elements, b.elements
        saved = (a if b.node else None, b if a.node else None)

        def backward(g, saved=saved):
            return (
                new(of_a, width) if saved[1] is not None else None,
                new(of_b, width) if saved[0] is not None else None,
            )

        return self.tape.apply(elements, width, (a, b), backward)

    def keeping_result(self, x: Tensor, width: int, softmax: bool = False) -> Tensor:
        """An operation whose gradient needs its result: tanh, or softmax, whose backward pass takes one more temporary."""
        new, elements, before = self.tape.new, x.elements, x.width
        out = new(elements, width)
        if x.node is None:
            return out

        def backward(g, saved=out.buffer):
            product = new(elements, width) if softmax else None  # g * result (torch, softmax_backward_cuda_out)
            gradient = new(elements, before)
            del product
            return (gradient,)

        return Tensor(out.buffer, elements, width, self.tape.apply(0, width, (x,), backward).node)

    def softmax(self, x: Tensor) -> Tensor:
        """In float32. torch reads float16 directly and casts bfloat16 first."""
        if not self.how.float16:
            x = self.cast(x, FLOAT32)
        return self.keeping_result(x, FLOAT32, softmax=True)

    def _math(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """torch's math kernel: in float32, with memory quadratic in the sequence."""
        new = self.tape.new
        before = q.width
        q, k, v = (self.cast(x, FLOAT32) for x in (q, k, v))
        mask = new(self.how.max_length**2, FLOAT32)
        q, k = self.scale(q), self.scale(k)
        scores = self.matmul(q, k, self.scores)
        masked = new(self.scores, 1)
        plain = new(self.scores, FLOAT32)  # torch's safe softmax makes one more
        weights = self.softmax(scores)
        del scores, masked, plain, mask
        out = self.matmul(weights, v, q.elements)
        return self.cast(out, before)

    def _eager(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention in Python, as transformers writes it: several copies of the scores."""
        narrow = self.how.compute if self.how.autocast else v.width
        scores = self.matmul(self.cast(q, narrow), self.cast(k, narrow), self.scores)
        scores = self.scale(scores)
        if self.shape.model_type == "gemma2":  # soft-capped: tanh saves its result
            scores = self.scale(scores)
            scores = self.keeping_result(scores, scores.width)
            scores = self.scale(scores)
        scores = self.scale(scores)  # plus the mask
        weights = self.softmax(scores)
        del scores
        weights = self.cast(self.cast(weights, v.width), narrow)
        out = self.matmul(weights, self.cast(v, narrow), q.elements)
        return self.scale(out)  # made contiguous

    # ---- the families

    def _llama(self, x: Tensor) -> Tensor:
        shape = self.shape
        gemma = shape.model_type == "gemma2"
        normed = self.rms_norm(x, shape.hidden_size)
        if shape.model_type == "phi3":
            q, k, v = self._split(
                self.linear(normed, "qkv_proj"), (shape.query_width, shape.key_value_width, shape.key_value_width)
            )
        else:
            q = self.linear(normed, "q_proj")
            q = self.rms_norm(q, shape.head_dim) if shape.model_type == "qwen3" else q
            k = self.linear(normed, "k_proj")
            k = self.rms_norm(k, shape.head_dim) if shape.model_type == "qwen3" else k
            v = self.linear(normed, "v_proj")
        rotated_q = self.rotary(q)
        rotated_k = self.rotary(k)
        del q, k
        mixed = self.attention(rotated_q, rotated_k, v)
        out = self.linear(mixed, "o_proj")
        del mixed, rotated_q, rotated_k, v, normed
        if gemma:
            out = self.rms_norm(out, shape.hidden_size)
        x = self.add(x, out)
        del out
        out = self._mlp(self.rms_norm(x, shape.hidden_size))
        if gemma:
            out = self.rms_norm(out, shape.hidden_size)
        return self.add(x, out)

    def _split(self, x: Tensor, widths: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Slices of a fused projection; their gradients are written into zeros of its size."""
        new, elements, width = self.tape.new, x.elements, x.width
        return tuple(
            Tensor(
                x.buffer,
                self.how.tokens * part,
                width,
                self.tape.apply(0, width, (x,), lambda g: (new(elements, width),)).node,
            )
            for part in widths
        )

    def _mlp(self, x: Tensor) -> Tensor:
        if self.shape.model_type == "phi3":
            i = self.shape.intermediate_size
            gate, up = self._split(self.linear(x, "gate_up_proj"), (i, i))
            product = self.multiply(up, self.activation(gate))
            del gate, up
            return self.linear(product, "down_proj")
        active = self.activation(self.linear(x, "gate_proj"))
        up = self.linear(x, "up_proj")
        product = self.multiply(active, up)
        del active, up
        return self.linear(product, "down_proj")

    def _gpt_neox(self, x: Tensor) -> Tensor:
        shape = self.shape
        h, rotated = shape.hidden_size, shape.rotary_dim
        q, k, v = self._split(self.linear(self.layer_norm(x, h), "query_key_value"), (h, h, h))
        rotated_q, rotated_k = self.rotary(q, rotated), self.rotary(k, rotated)
        del q, k
        attended = self.linear(self.attention(rotated_q, rotated_k, v), "dense")
        del rotated_q, rotated_k, v
        if not shape.use_parallel_residual:
            attended = self.add(attended, x)
        normed = self.layer_norm(x if shape.use_parallel_residual else attended, h)
        out = self.activation(self.linear(normed, "dense_h_to_4h"))
        out = self.add(self.linear(out, "dense_4h_to_h"), attended)
        return self.add(out, x) if shape.use_parallel_residual else out

    def _gptj(self, x: Tensor) -> Tensor:
        shape = self.shape
        h = shape.hidden_size
        normed = self.layer_norm(x, h)
        q, k, v = (self.linear(normed, name) for name in ("q_proj", "k_proj", "v_proj"))
        rotated = shape.rotary_dim or None  # none stated: the whole head
        k, q = self.rotary(k, rotated), self.rotary(q, rotated)
        # GPT-J casts queries and keys to float32 before attention
        mixed = self._eager(self.cast(q, FLOAT32), self.cast(k, FLOAT32), v)
        del q, k, v
        attended = self.linear(mixed, "out_proj")
        del mixed
        out = self.linear(self._gelu_new(self.linear(normed, "fc_in")), "fc_out")
        return self.add(self.add(attended, out), x)

    def _gelu_new(self, x: Tensor) -> Tensor:
        """GELU written out in Python: each step makes a tensor. Under autocast `pow` gives float32."""
        x = self.cast(x, FLOAT32) if self.how.autocast else x
        cube = self.activation(x)  # saves x
        inner = self.scale(self.add(x, self.scale(cube)))
        del cube
        tanh = self.keeping_result(inner, inner.width)
        del inner
        return self.multiply(self.scale(x), self.scale(tanh))
