"""Every keyword argument that the course passes to its libraries exists in the installed versions.

The calls are read from the code, not made, so calls that only a GPU or a long lesson reaches are checked, too. A
keyword that `**kwargs` silently swallows does not count as existing.
"""

import ast
import builtins
import importlib.metadata
import inspect
import pkgutil
import re
import textwrap
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

from data.scripts.measure import out_of_memory as measure_oom
from data.scripts.measure import speed_plan, speed_variants, variants
from qlora_helpers.evaluation.batches import padded
from qlora_helpers.memory import known_config
from qlora_helpers.models.loading import load_tokenizer
from qlora_helpers.settings import Settings
from qlora_helpers.training import faulty_runs
from tests import ROOT
from tests.support.short_runs import CPU

FOLDERS = ("qlora_helpers", "notebooks/source", "data", "tests/gpu")
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "gguf")

# What a call on a variable calls, by its last name: the code does not show the variable's type.
METHODS = {
    "amax": "torch.Tensor.amax",
    "attention": "torch.nn.functional.scaled_dot_product_attention",
    "clamp": "torch.Tensor.clamp",
    "mean": "torch.Tensor.mean",
    "sum": "torch.Tensor.sum",
    "normal_": "torch.Tensor.normal_",
    "repeat_interleave": "torch.Tensor.repeat_interleave",
    "load_state_dict": "torch.nn.Module.load_state_dict",
    "zero_grad": "torch.optim.Optimizer.zero_grad",
    "tokenizer": "transformers.PreTrainedTokenizerFast.__call__",
    "apply_chat_template": "transformers.PreTrainedTokenizerFast.apply_chat_template",
    "batch_decode": "transformers.PreTrainedTokenizerFast.batch_decode",
    "decode": "transformers.PreTrainedTokenizerFast.decode",
    "encode": "transformers.PreTrainedTokenizerFast.encode",
    "model": "transformers.LlamaForCausalLM.forward",
    "from_config": "transformers.AutoModelForCausalLM.from_config",
    "from_pretrained": "transformers.PreTrainedModel.from_pretrained",
    "get_text_config": "transformers.PretrainedConfig.get_text_config",
    "gradient_checkpointing_enable": "transformers.PreTrainedModel.gradient_checkpointing_enable",
    "parameters": "torch.nn.Module.parameters",
    "save_pretrained": "transformers.PreTrainedModel.save_pretrained",
    "generate": "transformers.LlamaForCausalLM.generate",
    "train": "trl.SFTTrainer.train",
    "load_adapter": "peft.PeftModel.load_adapter",
    "_save": "trl.SFTTrainer._save",
    "_save_checkpoint": "trl.SFTTrainer._save_checkpoint",
    "prediction_step": "trl.SFTTrainer.prediction_step",
    "preprocess_model": "transformers.quantizers.quantizer_bnb_4bit.Bnb4BitHfQuantizer.preprocess_model",
    "named_parameters": "torch.nn.Module.named_parameters",
    "add_tensor_info": "gguf.GGUFWriter.add_tensor_info",
    "get_name": "gguf.TensorNameMap.get_name",
}

# Calls on variables that do not belong to the libraries: not checked.
OTHERS = {
    r"(ax|axes|fig|left|other)\b.*": "matplotlib",
    r".*\.(add_argument|add_parser|add_subparsers|set_defaults)": "argparse",
    r".*\.(mkdir|open|read_text|unlink|write_text)": "pathlib",
    r".*\.format": "str",
    r"(self\.)?conversation\.ask": "qlora_helpers.conversation",
    r"context\.(Pipe|Process)": "multiprocessing",
    r"stream\.reconfigure": "io",
    r"file\.iter_batches": "pyarrow, the rows of a parquet file (qlora_helpers.chats.tables)",
    r"specifier\.contains": "packaging, a range of versions (qlora_helpers.commands.doctor)",
    r"self\.measurement\.begin": "qlora_helpers.memory.measurement",
    r"checked_by": "a function of qlora_helpers.validation",
    r"function": "the operation that torch dispatches",
    r"cls": "a class of the course",
    r"type\(self\.layer\)\.forward": "peft's layer, as it was (qlora_helpers.training.merge_aware)",
    r"self\.fault|answer": "what an exercise judges with, and a learner's function (qlora_helpers.course.exercises)",
    r"want|wanted|right_ones|tried": "what an exercise computes when it is asked (qlora_helpers.course.exercises)",
    r"inspect\.signature\(self\.fault\)\.bind": "inspect",
    r"size\[numpy\.isfinite\(size\)\]\.max": "numpy.ndarray",
    r"people\.sort": "list",
    r"backward|method": "what is wrapped (qlora_helpers.memory.timeline)",
    r"fused_head\(\)": "trl.trainer.utils.add_fused_lm_head, changed (qlora_helpers.memory.fake.on_a_gpu)",
    r"self\.torch\.empty": "torch, or the stand-in of a test (data.scripts.measure.allocator)",
    r"(SEVERAL|_SITE)\.sub": "re",
    r"plain|ignores": "the function that is replaced (qlora_helpers.memory.fake.on_a_gpu)",
    r"layers_forward": "the decoder layer's own forward, compiled (qlora_helpers.training.layer_options)",
    r"with_fused_head": "the model with TRL's output head (qlora_helpers.training.trainer)",
    r"ledger\.mark": "qlora_helpers.memory.fake.ledger",
    r"get_session\(\)\.head": "huggingface_hub's own client of the web (qlora_helpers.models.hub)",
    r"in_few\.save": "PIL, an image (qlora_helpers.course.plots)",
    r"pick": "min or max (qlora_helpers.memory.timeline)",
    r"self\.collator": "a trainer's collator, with what it was called with (data.scripts.measure.speed_clock)",
    r"(self\.)?process\.communicate": "subprocess",
    r"process\.children": "psutil",
    r"begin_nccl": "torch.distributed.init_process_group (data.scripts.measure.shared_gpu)",
}

# The receivers of the keywords that a callee passes on through its **kwargs; a list gives names.
PASSED_ON = {
    "transformers.AutoModelForCausalLM.from_pretrained": ["transformers.PreTrainedModel.from_pretrained"],
    "transformers.AutoModelForCausalLM.from_config": ["transformers.PreTrainedModel._from_config"],
    "transformers.AutoModelForImageTextToText.from_config": ["transformers.PreTrainedModel._from_config"],
    "transformers.quantizers.quantizer_bnb_4bit.Bnb4BitHfQuantizer.preprocess_model": [
        "transformers.quantizers.quantizer_bnb_4bit.Bnb4BitHfQuantizer._process_model_before_weight_loading",
    ],
    "transformers.AutoTokenizer.from_pretrained": [
        "transformers.PreTrainedTokenizerBase.from_pretrained",
        "transformers.PreTrainedTokenizerFast",
    ],
    "transformers.PreTrainedTokenizerFast": [
        "transformers.PreTrainedTokenizerBase",
        "transformers.PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES",
    ],
    "transformers.AutoConfig.for_model": ["transformers.LlamaConfig", "transformers.GPTJConfig"],
    "transformers.LlamaForCausalLM.generate": [
        "transformers.GenerationConfig",
        "transformers.LlamaForCausalLM.forward",
    ],
}


def oom_options(which: int) -> set[str]:
    """What `measure_oom` passes to SFTConfig (0) and to SFTTrainer (1)."""
    rows = measure_oom.all_rows()
    found = [measure_oom.eval_options(row, True)[which] for row in rows if row["what"] == "evaluation"]
    return set().union(*found, *([row.get("config_options", {}) for row in rows] if which == 0 else []))


def speed_options() -> set[str]:
    """What `speed_variants` passes to SFTConfig."""
    rows = [row for row in speed_plan.rows() if row["variant"] != "ours"]
    return set(speed_variants.RECIPE).union(*(speed_variants.sft_options(row, True, 1, Path()) for row in rows))


def given_to_dict(path: str, name: str) -> list[str]:
    """The keys of `name = dict(key=…)` in a file."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    made = [node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name]
    return [keyword.arg for call in made for keyword in call.keywords]


# The keys of expanded dictionaries that cannot be read from the code, by file and expression.
EXPANDED = {
    # what a library passes to a function of the course, which passes it back
    ("attention.py", "options"): lambda: (),
    ("trainer.py", "kwargs"): lambda: (),
    ("variants.py", "options"): lambda: {name for options, _ in variants.OF_PEFT.values() for name in options},
    ("13_which_adapter.py", "options"): lambda: ("init_lora_weights", "use_dora", "use_rslora"),
    ("several_gpus.py", "options"): lambda: known_config("Llama-3.1-8B").keys() - {"model_type"},
    ("04_qlora_run.py", "copied | changes"): lambda: given_to_dict("notebooks/source/04_qlora_run.py", "copied"),
    # what the trainer's collator returns
    ("08_stability.py", "batch"): lambda: ("input_ids", "attention_mask", "labels"),
    ("faulty_runs.py", "options"): lambda: faulty_runs._common(".", Settings(), CPU),
    # for PEFT, which takes adapter_names out before the model sees it: tests/adapters/test_files.py
    ("answers.py", "chosen"): lambda: (),
    ("loading.py", "options"): lambda: ("quantization_config",),
    ("answers.py", "batch"): lambda: padded([[1]], load_tokenizer(), "left"),
    ("facts.py", "prompts"): lambda: load_tokenizer()("a"),
    ("test_t4_gear.py", "batch"): lambda: load_tokenizer()("a"),
    ("test_t4_gear.py", "alone"): lambda: load_tokenizer()("a"),
    ("stand_in_models.py", "options"): lambda: known_config("Llama-3.1-8B").keys() - {"model_type"},
    ("memory.py", "options"): lambda: known_config("Llama-3.1-8B").keys() - {"model_type"},
    ("speed_variants.py", "fields"): lambda: known_config("Llama-3.1-8B").keys() - {"model_type"},
    ("speed_variants.py", "options"): lambda: speed_options(),
    ("memory.py", "config_options or {}"): lambda: oom_options(0),
    ("memory.py", "trainer_options"): lambda: oom_options(1),
    ("meta.py", "options"): lambda: ("dtype", "attn_implementation"),
    ("meta.py", "deepcopy(options)"): lambda: known_config("Llama-3.1-8B").keys() - {"model_type"},
    # a batch as TRL's collator makes it, and what TRL's output head adds
    ("trace.py", "batch"): lambda: ("input_ids", "attention_mask", "labels"),
    ("autocast.py", "kwargs"): lambda: ("dtype", "enabled"),
    ("on_a_gpu.py", "kwargs"): lambda: ("device", "dtype"),  # of the tile
}


@dataclass
class Findings:
    """What was found in one file: faults, the (callee, keyword) pairs checked, and the table entries used."""

    faults: list[str] = field(default_factory=list)
    held: list[tuple[str, str]] = field(default_factory=list)
    used: set = field(default_factory=set)


@cache
def accepted(name: str) -> frozenset[str]:
    """The keywords that a library's callable accepts.

    Raises:
        AttributeError, ImportError: there is no callable with this name.
    """
    callee = pkgutil.resolve_name(name)
    if isinstance(callee, list):
        return frozenset(callee)
    if hasattr(callee, "overloads"):  # one of torch.ops
        return frozenset(argument.name for argument in callee.default._schema.arguments)
    try:
        parameters = inspect.signature(callee).parameters.values()
    except ValueError:
        return documented(callee)
    names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)} - {"self"}
    for parameter in parameters:
        if parameter.kind is parameter.VAR_KEYWORD:
            # a function that passes its **kwargs on may `get` a keyword only to look at it
            ways = ("pop",) if name in PASSED_ON else ("pop", "get")
            made_by = (callee.__init__, callee.__new__) if inspect.isclass(callee) else (callee,)
            for function in filter(inspect.isroutine, map(inspect.unwrap, made_by)):
                names |= taken_from(parameter.name, function, ways) if hasattr(function, "__code__") else set()
    return frozenset(names).union(*map(accepted, PASSED_ON.get(name, [])))


def documented(callee) -> frozenset[str]:
    """The parameters of a C function, whose signature is only in its docstring."""
    signature = rf"(?:^|:: ){callee.__name__}\((.*?)\)(?: ->|$)"
    found = re.findall(signature, callee.__doc__ or "", re.MULTILINE | re.DOTALL)
    return frozenset(name for text in found for name in re.findall(r"(?:^|,)\s*\*?([a-z_]\w*)", text))


def taken_from(kwargs: str, function, ways: tuple[str, ...]) -> set[str]:
    """The names that a function itself takes out of its **kwargs: `kwargs.pop("name")`, if it keeps the value."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.Expr | ast.Assign)]
    dropped = [s.value for s in statements if isinstance(s, ast.Expr) or ast.unparse(s.targets[0]) == "_"]
    takes = [f"{kwargs}.{way}" for way in ways]
    return {
        node.args[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in takes and node not in dropped
        if isinstance(node.args[0], ast.Constant)
    }


def names_of(tree: ast.AST) -> dict[str, str]:
    """What each imported name refers to, including names imported in a function.

    A class of the course without its own `__init__` refers to its base.
    """
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                root = alias.name.partition(".")[0]
                names[alias.asname or root] = alias.name if alias.asname else root
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.bases:
            first, dot, rest = ast.unparse(node.bases[0]).partition(".")
            if first in names and "__init__" not in [getattr(part, "name", "") for part in node.body]:
                names[node.name] = names[first] + dot + rest
    return names


def keys_in(value: ast.expr, tree: ast.AST) -> list[str] | None:
    """The keys of an expanded dictionary: a literal, or a variable bound only to literals; None otherwise."""
    literals = [value]
    if isinstance(value, ast.Name):
        literals, changes = [], 0
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [value.id]:
                literals.append(node.value)
            if isinstance(getattr(node, "ctx", None), ast.Store):
                changes += ast.unparse(node).partition("[")[0] == value.id
            changes += isinstance(node, ast.arg) and node.arg == value.id
        if not literals or changes != len(literals):
            return None
    if not all(isinstance(literal, ast.Dict) for literal in literals):
        return None
    keys = [key.value if isinstance(key, ast.Constant) else None for literal in literals for key in literal.keys]
    return None if None in keys else keys


def hold(file: str, source: str) -> Findings:
    """Check every call in a file against the installed libraries."""
    found, tree = Findings(), ast.parse(source)
    names = names_of(tree)
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.bases]
    bases = {call: ast.unparse(node.bases[0]) for node in classes for call in ast.walk(node)}
    own = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)} | set(dir(builtins))
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        written = ast.unparse(call.func)
        place = f"{file}:{call.lineno}: {written}"
        if written.startswith("super().") and call in bases:
            written = written.replace("super()", bases[call], 1)
        first, dot, rest = written.partition(".")
        if first in names and re.fullmatch(r"[\w.]+", written):
            callee = names[first] + dot + rest
            if callee.partition(".")[0] not in LIBRARIES:
                continue
        elif not call.keywords or written.removeprefix("self.") in own:
            continue
        elif (last := written.rpartition(".")[2]) in METHODS:
            callee = METHODS[last]
            found.used.add(last)
        elif others := [pattern for pattern in OTHERS if re.fullmatch(pattern, written)]:
            found.used.update(others)
            continue
        else:
            found.faults.append(f"{place}: whose call is this? Add it to METHODS or OTHERS")
            continue
        library = callee.partition(".")[0]
        installed = f"{library} {importlib.metadata.version(library)}"
        try:
            pkgutil.resolve_name(callee)
        except (AttributeError, ImportError) as error:
            found.faults.append(f"{place}: {installed} has no {callee} ({error})")
            continue
        for keyword in call.keywords:
            passed = [keyword.arg] if keyword.arg else keys_in(keyword.value, tree)
            entry = (Path(file).name, ast.unparse(keyword.value))
            if passed is None and entry in EXPANDED:
                passed = sorted(EXPANDED[entry]())
                found.used.add(entry)
            if passed is None:
                found.faults.append(f"{place}: the keys of **{entry[1]} cannot be read. Add them to EXPANDED")
                continue
            for name in passed:
                found.held.append((callee, name))
                if name not in accepted(callee):
                    known = ", ".join(sorted(accepted(callee)))
                    found.faults.append(f"{place}: {installed} has no keyword {name!r} of {callee}. It has: {known}")
    return found


@cache
def found_in(path: Path) -> Findings:
    return hold(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_keyword_exists(path):
    assert not found_in(path).faults, "\n" + "\n".join(found_in(path).faults)


def test_the_calls_that_matter_are_among_those_held():
    for folder in FOLDERS:
        assert any(found_in(path).held for path in FILES if path.is_relative_to(ROOT / folder)), folder
    held = {name for path in FILES for name in found_in(path).held}
    assert held >= {
        ("transformers.BitsAndBytesConfig", "bnb_4bit_use_double_quant"),
        ("transformers.AutoModelForCausalLM.from_pretrained", "quantization_config"),
        ("transformers.AutoConfig.for_model", "tie_word_embeddings"),  # through **options
        ("transformers.GenerationConfig", "max_new_tokens"),
        ("transformers.PreTrainedTokenizerFast.apply_chat_template", "return_assistant_tokens_mask"),
        ("peft.LoraConfig", "target_modules"),
        ("trl.SFTConfig", "assistant_only_loss"),
        ("trl.SFTTrainer", "processing_class"),
        ("trl.SFTTrainer.train", "resume_from_checkpoint"),
        ("bitsandbytes.functional.quantize_4bit", "compress_statistics"),
        ("torch.randn", "generator"),
    }


def test_every_entry_of_the_tables_is_needed():
    used = set().union(*(found_in(path).used for path in FILES))
    assert not {*METHODS, *OTHERS, *EXPANDED} - used, "remove these from METHODS, OTHERS or EXPANDED"


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("from trl import SFTConfig\nSFTConfig(max_seq_length=1)", "SFTConfig: trl .* no keyword 'max_seq_length'"),
        ("def f():\n  import trl as t\n  t.SFTTrainer(tokenizer=None)", "SFTTrainer: trl .* no keyword 'tokenizer'"),
        ("import transformers\ntransformers.TrainingArguments(warmup_ratio=0.1)", "no keyword 'warmup_ratio'"),
        (
            "from transformers import BitsAndBytesConfig\nBitsAndBytesConfig(load_4bit_use_double_quant=True)",
            "no keyword 'load_4bit_use_double_quant' .* bnb_4bit_use_double_quant",
        ),
        (
            "from transformers import AutoModelForCausalLM as A\nA.from_pretrained('x', torch_dtyp=1)",
            "no keyword 'torch_dtyp' .* dtype",
        ),
        ("from transformers import AutoTokenizer as A\nA.from_pretrained('x', paddingside=1)", "'paddingside'"),
        ("from trl import SFTConfig\no = {'max_seq_length': 1}\nSFTConfig(**o)", "no keyword 'max_seq_length'"),
        ("from trl import SFTConfig\no = {}\no['a'] = 1\nSFTConfig(**o)", r"the keys of \*\*o cannot be read"),
        ("import torch\ntorch.randn(2, sed=1)", "torch.randn: torch .* no keyword 'sed' .* dtype, generator"),
        ("tensor.abs().amax(dims=1)", "no keyword 'dims' of torch.Tensor.amax. It has: dim, keepdim"),
        ("model.generate(max_new_token=1)", "no keyword 'max_new_token' .* max_new_tokens"),
        ("tokenizer.apply_chat_template([], return_assistant_mask=1)", "no keyword 'return_assistant_mask'"),
        ("trainer.train(resume_from=1)", "no keyword 'resume_from' .* resume_from_checkpoint"),
        ("import bitsandbytes as bnb\nbnb.functional.dequantise_4bit(1)", "has no .*dequantise_4bit"),
        ("import trl\nclass T(trl.SFTTrainer): ...\nT(tokenizer=None)", "no keyword 'tokenizer' of trl.SFTTrainer"),
        (
            "import torch\nclass M(torch.nn.Linear):\n  def f(self): super().__init__(1, 2, offset=3)",
            "keyword 'offset'",
        ),
        ("something.unheard_of(a=1)", "whose call is this"),
    ],
)
def test_a_fault_is_reported_with_its_place(source, fault):
    (reported,) = hold("lesson.py", source).faults
    line = source.count("\n") + 1
    assert re.match(rf"lesson\.py:{line}: .*{fault}", reported), reported


def test_a_keyword_that_a_library_takes_and_drops_does_not_count():
    def library(**options):
        options.pop("gone", None)
        _ = options.pop("gone_too", None)
        return options.pop("kept", None), options.get("read")

    assert taken_from("options", library, ("pop", "get")) == {"kept", "read"}
    assert taken_from("options", library, ("pop",)) == {"kept"}
